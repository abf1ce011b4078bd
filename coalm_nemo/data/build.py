"""`coalm data build`: sources -> rows -> tokens -> packs, in parallel, with bounded memory, whole or not at all.

The main process reads blocks and writes results in order; workers parse, render, tokenise and check. What comes out
depends on the sources, the options and the seed, not on how many workers there are.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from coalm_nemo.checkpoint.layout import atomic_directory, ensure_free_space, sha256_of
from coalm_nemo.data import block_worker
from coalm_nemo.data.blend import blended_order
from coalm_nemo.data.block_worker import BlockResult, BlockWorker
from coalm_nemo.data.build_config import BuildConfig, SourceEntry, describe
from coalm_nemo.data.packing import pack_rows_flat
from coalm_nemo.data.shards import (
    CHAT_TEMPLATE,
    MANIFEST,
    ShardWriter,
    read_manifest,
    write_manifest,
    write_order,
)
from coalm_nemo.data.sources.base import Block
from coalm_nemo.errors import UserError

LENGTH_BINS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


@dataclass
class Tally:
    """What became of one source."""

    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    parts: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, result: BlockResult) -> None:
        """Take one block's figures in."""
        self.rows += result.encoded.rows
        self.tokens += int(result.encoded.lengths.sum())
        self.supervised_tokens += int(result.encoded.supervised.sum())
        for mine, more in ((self.dropped, result.dropped), (self.parts, result.parts), (self.counts, result.counts)):
            mine.update(more)

    def to_json(self) -> dict[str, Any]:
        """For the manifest; counters sorted by name."""
        return {
            "rows": self.rows,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "dropped": dict(sorted(self.dropped.items())),
            "parts": dict(sorted(self.parts.items())),
            **dict(sorted(self.counts.items())),
        }


@dataclass(frozen=True)
class Built:
    """A finished set."""

    directory: Path
    manifest: dict[str, Any]
    reused: bool


Progress = Callable[[SourceEntry, Block, BlockResult], None]


def build(config: BuildConfig, out: Path, *, workers: int, progress: Progress | None = None) -> Built:
    """Build the set, or find that `out` already is it. Raises UserError; then nothing is left behind."""
    entries = config.entries()
    key = set_key(config, entries)
    if (out / MANIFEST).is_file() and (found := read_manifest(out)).get("key") == key:
        return Built(out, found, reused=True)
    ensure_free_space(out, 2 * sum(f.stat().st_size for e in entries for f in e.source.files()))
    with atomic_directory(out) as partial:
        manifest = _write_set(config, entries, partial, workers, progress or (lambda *_: None))
        write_manifest(partial, {"key": key, **manifest})
    return Built(out, read_manifest(out), reused=False)


def set_key(config: BuildConfig, entries: list[SourceEntry]) -> str:
    """SHA-256 over everything that decides the set's bytes: sources, tokenizer, template, options and code."""
    import tokenizers

    files = {e.name: _file_digests(e.source.files()) for e in entries}
    tokenizer = _file_digests(tokenizer_files(Path(config.tokenizer)))
    against = _file_digests([Path(f) for f in config.against])
    parts = [describe(config), files, tokenizer, against, _code_digest(), tokenizers.__version__]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def tokenizer_files(hf_dir: Path) -> list[Path]:
    """What decides tokens and template. Raises UserError where there is no tokenizer.json."""
    if not (hf_dir / "tokenizer.json").is_file():
        raise UserError(f"{hf_dir} holds no tokenizer.json; --tokenizer wants the model's Hugging Face directory")
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", CHAT_TEMPLATE)
    return [hf_dir / n for n in names if (hf_dir / n).is_file()]


def _file_digests(files: list[Path]) -> list[tuple[str, str]]:
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} does not exist")
    return [(f.name, sha256_of(f)) for f in files]


def _code_digest() -> str:
    """Hash of this package's data code: an improved source or format never passes for the old one."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(here.rglob("*.py")):
        digest.update(file.relative_to(here).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


def _write_set(
    config: BuildConfig, entries: list[SourceEntry], out: Path, workers: int, progress: Progress
) -> dict[str, Any]:
    worker = BlockWorker(config)
    tallies = {e.name: Tally() for e in entries}
    overlaps: list[dict[str, str]] = []
    with ShardWriter(out) as writer:
        for index, block, result in _encoded_blocks(worker, config, entries, workers):
            writer.append(result.encoded, index)
            tallies[entries[index].name].add(result)
            overlaps += result.overlaps
            progress(entries[index], block, result)
        writer.finish()
    for name, tally in tallies.items():
        _check_source(name, tally)
    if config.against:
        (out / "overlaps.jsonl").write_text("".join(json.dumps(o, ensure_ascii=False) + "\n" for o in overlaps))
    _copy_tokenizer(config, worker.encoder.format.template, out / "tokenizer")
    return {
        "tokenizer_sha256": sha256_of(Path(config.tokenizer) / "tokenizer.json"),
        "template": worker.encoder.format.name,
        "chat_template_sha256": _text_digest((out / "tokenizer" / CHAT_TEMPLATE).read_text(encoding="utf-8")),
        "options": describe(config),
        "largest_token": writer.largest_token,
        "sources": {name: tally.to_json() for name, tally in tallies.items()},
        "contamination": {**worker.contamination_figures(), "dropped_rows": len(overlaps)} if config.against else None,
        **_order_and_figures(config, entries, out, writer.digest.copy()),
    }


def _encoded_blocks(
    worker: Any, config: BuildConfig, entries: list[SourceEntry], workers: int
) -> Iterator[tuple[int, Block, BlockResult]]:
    """Every block with its result, in order; at most 2 x workers blocks are in flight."""
    blocks = ((i, block) for i, entry in enumerate(entries) for block in entry.source.blocks())
    if workers <= 1:
        for index, block in blocks:
            yield index, block, worker.encode(index, block)
        return
    # Forked workers share the parent's tokenizer; each tokenises on one thread, so that N workers use N cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with block_worker.start_pool(worker, workers) as pool:
        waiting: deque[tuple[int, Block, Future[BlockResult]]] = deque()
        try:
            for index, block in blocks:
                waiting.append((index, block, pool.submit(block_worker.encode, index, block)))
                if len(waiting) > 2 * workers:
                    index, block, future = waiting.popleft()
                    yield index, block, future.result()
            while waiting:
                index, block, future = waiting.popleft()
                yield index, block, future.result()
        except BrokenProcessPool as e:
            raise UserError("a worker process was killed, perhaps for want of memory; use fewer --workers") from e
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _check_source(name: str, tally: Tally) -> None:
    if not tally.rows:
        reasons = ", ".join(f"{reason} {count}" for reason, count in tally.dropped.most_common(5)) or "it holds none"
        raise UserError(f"source {name}: no row is left ({reasons})")
    if not 0 < tally.supervised_tokens < tally.tokens:
        raise UserError(f"source {name}: {tally.supervised_tokens} of {tally.tokens} tokens are supervised")


def _order_and_figures(config: BuildConfig, entries: list[SourceEntry], out: Path, digest: Any) -> dict[str, Any]:
    sources, supervised = np.load(out / "sources.npy"), np.load(out / "supervised.npy")
    lengths = np.diff(np.load(out / "offsets.npy"))
    order = blended_order(entries, sources, config.seed)
    packs = pack_rows_flat(lengths[order] - 1, config.seq_len_tokens, config.pack_multiple, config.seed)
    write_order(out, order, packs)
    for array in (order, packs.offsets, packs.rows):
        digest.update(np.ascontiguousarray(array).data)
    blended = lengths[order].astype(np.int64)
    bins = np.histogram(blended, bins=[0, *LENGTH_BINS, 2**31])[0].tolist()
    positions = int((blended - 1).sum())
    return {
        "content_sha256": digest.hexdigest(),
        "rows": len(order),
        "tokens": int(blended.sum()),
        "supervised_tokens": int(supervised[order].sum()),
        "supervised_share": round(float(supervised[order].sum() / blended.sum()), 6),
        "fill": round(positions / (len(packs) * config.seq_len_tokens), 6),
        "packing": {"seq_len_tokens": config.seq_len_tokens, "multiple": config.pack_multiple, "packs": len(packs)},
        "blend": _blend_figures(entries, sources[order], blended, supervised[order]),
        "length_histogram": {str(top): n for top, n in zip([*LENGTH_BINS, "more"], bins, strict=True) if n},
        "sum_of_squared_lengths": int((blended**2).sum()),
    }


def _blend_figures(
    entries: list[SourceEntry], sources: np.ndarray, lengths: np.ndarray, supervised: np.ndarray
) -> dict[str, Any]:
    figures = {}
    for index, entry in enumerate(entries):
        mine = sources == index
        rows, tokens, targets = int(mine.sum()), int(lengths[mine].sum()), int(supervised[mine].sum())
        figures[entry.name] = {
            "rows": rows,
            "tokens": tokens,
            "supervised_tokens": targets,
            "share_of_rows": round(rows / len(sources), 6),
            "share_of_tokens": round(tokens / int(lengths.sum()), 6),
            "share_of_supervised": round(targets / int(supervised.sum()), 6),
        }
    return figures


def _copy_tokenizer(config: BuildConfig, template: str, out: Path) -> None:
    """The tokenizer with the template of training: the base's own, or ours where it has none."""
    from coalm_nemo.data.chat import load_tokenizer

    out.mkdir()
    for file in tokenizer_files(Path(config.tokenizer)):
        shutil.copyfile(file, out / file.name)
    own = load_tokenizer(Path(config.tokenizer)).chat_template
    (out / CHAT_TEMPLATE).write_text(str(own or template), encoding="utf-8")


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
