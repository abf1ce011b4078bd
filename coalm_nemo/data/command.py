"""`coalm data build`: progress while it runs, a table when it is done."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coalm_nemo.data.block_worker import BlockResult
from coalm_nemo.data.build import Progress, build
from coalm_nemo.data.build_config import BuildConfig, SourceEntry, load_build_config
from coalm_nemo.data.sources.base import Block
from coalm_nemo.data.stats import print_table


def build_command(
    out: Path,
    config_file: Path | None,
    sources: Sequence[str],
    overrides: Sequence[str],
    given: dict[str, Any],
    workers: int,
    as_json: bool,
) -> None:
    """Build and report. Raises UserError."""
    config = load_build_config(config_file, sources, overrides, **given)
    start = time.perf_counter()
    with _progress(config, quiet=as_json) as progress:
        built = build(config, Path(out), workers=workers or len(os.sched_getaffinity(0)), progress=progress)
    if as_json:
        print(json.dumps(built.manifest, ensure_ascii=False))
        return
    print_table(built.manifest)
    if built.reused:
        print(f"{out} already is this set; nothing was built")
        return
    seconds = time.perf_counter() - start
    read = sum(s["tokens"] for s in built.manifest["sources"].values())
    print(f"{out}: {read:,} tokens in {seconds:.1f} s, {read / seconds:,.0f} tokens/s")


@contextmanager
def _progress(config: BuildConfig, quiet: bool) -> Iterator[Progress]:
    """A bar over the sources' bytes, on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    total = sum(f.stat().st_size for e in config.entries() for f in e.source.files())
    tokens = 0
    columns = (
        TextColumn("{task.description:12}"),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task, start = bar.add_task("reading", total=total, rate=""), time.perf_counter()

        def advance(entry: SourceEntry, block: Block, result: BlockResult) -> None:
            nonlocal tokens
            tokens += int(result.encoded.lengths.sum())
            rate = f"{tokens / (time.perf_counter() - start) / 1e6:.2f} M tokens/s"
            bar.update(task, advance=_bytes(block), description=entry.name, rate=rate)

        yield advance


def _bytes(block: Block) -> int:
    if isinstance(block.payload, bytes):
        return len(block.payload)
    if isinstance(block.payload, tuple):
        return sum(map(len, block.payload))
    return block.file.stat().st_size if block.payload is None else 0
