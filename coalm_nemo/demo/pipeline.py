"""`coalm demo`: the main job end to end, as the commands a user would type.

Rows -> packed shards; Hugging Face base -> Megatron checkpoint -> SFT on 4 ranks (TP2 x PP2, sequence parallelism) ->
Hugging Face model, scored before and after on dialogues that training never saw.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from coalm_nemo.demo import rows as demo_rows
from coalm_nemo.demo.score import (
    HELD_OUT,
    METRICS,
    SPLIT_NAMES,
    SplitScore,
    as_table,
    held_out_items,
    score_directory,
)
from coalm_nemo.errors import UserError

NANO_BASE = Path(__file__).parent / "nano_base"
TRAINING_SEED, HELD_OUT_SEED = 1, 1001
TRAINING_DIALOGUES, HELD_OUT_DIALOGUES = 6000, 120


@dataclass(frozen=True)
class DemoPaths:
    """Everything the demo writes, below one directory."""

    out: Path

    @property
    def rows(self) -> Path:
        return self.out / "rows.jsonl"

    @property
    def shards(self) -> Path:
        return self.out / "shards"

    @property
    def megatron_base(self) -> Path:
        return self.out / "megatron_base"

    @property
    def run(self) -> Path:
        return self.out / "run"

    @property
    def tuned(self) -> Path:
        return self.out / "coalm"


def run_demo(out: Path, nproc: int = 4, seed: int = 0) -> dict[str, Any]:
    """Run everything below `out`; returns (and writes to `out/demo.json`) the scores before and after."""
    paths, console, started = prepare_directory(out), Console(highlight=False), time.monotonic()
    console.print(f"The demo's world: {len(demo_rows.SERVICES)} services; its base: {NANO_BASE}")
    rows = demo_rows.training_rows(TRAINING_SEED + seed, TRAINING_DIALOGUES)
    demo_rows.write_rows(paths.rows, rows)
    console.print(f"{len(rows)} training rows -> {paths.rows}")
    items = held_out_items(HELD_OUT_SEED + seed, HELD_OUT_DIALOGUES)
    console.print(f"scoring the base on {len(items)} held-out prompts with plain transformers ...")
    before = score_directory(NANO_BASE, items, paths.out / "items_before.jsonl")
    build_shards(console, paths)
    run_main_job(console, NANO_BASE, paths, ["--recipe", "coalm_demo", f"data.train={paths.shards}"], nproc)
    console.print(f"scoring {paths.tuned} on the same prompts ...")
    after = score_directory(paths.tuned, items, paths.out / "items_after.jsonl")
    result = {"before": as_table(before), "after": as_table(after), "seconds": round(time.monotonic() - started)}
    finish(console, paths, result, before, after)
    return result


def prepare_directory(out: Path) -> DemoPaths:
    """An empty directory to work in. Raises UserError if there is something in it already."""
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; remove it or choose another with --out")
    out.mkdir(parents=True, exist_ok=True)
    return DemoPaths(out)


def build_shards(console: Console, paths: DemoPaths) -> None:
    """The rows rendered, masked, tokenised and packed, for the sequence length of the demo's recipe."""
    from recipes.coalm_demo import coalm_demo

    recipe = coalm_demo()
    length, multiple = recipe.train.seq_len_tokens, recipe.data.pack_multiple
    options: list[str | Path] = ["--tokenizer", NANO_BASE, "--seq-len-tokens", str(length), f"pack_multiple={multiple}"]
    command(console, ["data", "build", "--source", f"chat={paths.rows}", *options, "--out", paths.shards])


def run_main_job(console: Console, base: Path, paths: DemoPaths, train_words: list[str], nproc: int) -> None:
    """import, verify, train, export: each a command of its own, printed before it runs."""
    command(console, ["convert", "import", "--hf", base, "--out", paths.megatron_base])
    command(console, ["convert", "verify", "--hf", base, "--ckpt", paths.megatron_base])
    recipe, words = train_words[:2], train_words[2:]
    start = [f"model.checkpoint={paths.megatron_base}", f"run.dir={paths.run}"]
    command(console, ["train", *recipe, "--nproc", str(nproc), *start, *words])
    newest = sorted((paths.run / "checkpoints").glob("step_*"))[-1]
    command(console, ["convert", "export", "--ckpt", newest, "--out", paths.tuned])


def command(console: Console, words: list[str | Path]) -> None:
    """Run `coalm WORDS`. Raises UserError if it fails; what it printed stands above."""
    console.print(f"\n[bold]$ coalm {' '.join(str(w) for w in words)}[/bold]")
    done = subprocess.run([sys.executable, "-m", "coalm_nemo.cli", *(str(w) for w in words)])
    if done.returncode:
        raise UserError(f"`coalm {words[0]}` failed with exit code {done.returncode}; its message stands above")


def finish(
    console: Console,
    paths: DemoPaths,
    result: dict[str, Any],
    before: dict[Any, SplitScore],
    after: dict[Any, SplitScore],
) -> None:
    """Print the table, draw the picture, write demo.json."""
    from coalm_nemo.demo.picture import draw_result

    picture = draw_result(paths.run / "metrics.jsonl", result, paths.out / "demo.png")
    (paths.out / "demo.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    console.print()
    console.print(result_table(before, after))
    console.print(f"loss curve and scores: {picture}")
    console.print(f"the model: {paths.tuned} (any Hugging Face program loads it); {result['seconds']} s in all")


def result_table(before: dict[Any, SplitScore], after: dict[Any, SplitScore]) -> Table:
    """Percent right before and after, a line a metric and split."""
    table = Table(title="held-out dialogues, greedy decoding")
    for name, side in (
        ("", "left"),
        ("held out", "left"),
        ("before", "right"),
        ("after", "right"),
        ("prompts", "right"),
    ):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for metric, label in METRICS.items():
        for split in HELD_OUT:
            old, new = getattr(before[split], metric), getattr(after[split], metric)
            table.add_row(label, SPLIT_NAMES[split], f"{old.percent:.1f} %", f"{new.percent:.1f} %", str(new.total))
    return table
