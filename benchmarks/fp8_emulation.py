"""The demo's fine-tuning in bf16 and in each emulated FP8 recipe, the same base, rows and order: what FP8 costs in loss.

    python -m benchmarks.fp8_emulation [--seeds 4] [--jobs 2] [--steps 1150] [--score] [--out runs/fp8_emulation]

Between FP8's products everything is bf16, as on a GPU. Each seed is another order of the rows; each run is one rank, and
`--jobs` of them run at once. A call that is repeated goes on where the last one ended.

Four figures a recipe, each as the mean over seeds and its standard error, relative to bf16: the loss of the last steps;
the loss of the trained weights on fixed rows, which is less noisy; that loss in bf16, which is what an export serves; and
the loss of bf16's weights in FP8, which is what the casts of the forward pass cost before any training.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BASELINE = "bf16"
RECIPES = ("fp8_emulated_current", "fp8_emulated_blockwise", "fp8_emulated_delayed")
LAST = 50
"""Steps at the end whose mean loss is compared."""
MEASURE_STEPS = 100
"""Steps at a learning rate that changes nothing, to take the loss of trained weights."""
FIRST_SEED = 42


@dataclass(frozen=True)
class Runs:
    """Where everything lies, and how long a run is."""

    out: Path
    steps: int

    def trained(self, dtype: str, seed: int) -> Path:
        return self.out / f"{dtype}_{seed}"

    def measured(self, weights: str, dtype: str, seed: int) -> Path:
        return self.out / f"{weights}_{seed}_in_{dtype}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1150)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--score", action="store_true", help="also export, and score calls and states (first seed)")
    parser.add_argument("--out", type=Path, default=Path("runs/fp8_emulation"))
    args = parser.parse_args()
    runs, seeds = Runs(args.out, args.steps), range(FIRST_SEED, FIRST_SEED + args.seeds)
    prepare(args.out)
    with ThreadPoolExecutor(args.jobs) as pool:
        for seed in seeds:  # seed by seed: what is there when it is stopped is whole
            list(pool.map(lambda dtype, s=seed: train(runs, dtype, s), (BASELINE, *RECIPES)))  # type: ignore[misc]
            pairs = [
                (w, d) for w in (BASELINE, *RECIPES) for d in {BASELINE, w} | (set(RECIPES) if w == BASELINE else set())
            ]
            list(pool.map(lambda pair, s=seed: measure(runs, *pair, s), pairs))  # type: ignore[misc]
            results = {dtype: summary(runs, dtype, range(FIRST_SEED, seed + 1)) for dtype in RECIPES}
            (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
            print(json.dumps({"seeds": seed + 1 - FIRST_SEED} | results, indent=1), flush=True)
    if args.score:
        for dtype in (BASELINE, *RECIPES):
            print(dtype, json.dumps(score(runs, dtype, FIRST_SEED)), flush=True)


def prepare(out: Path) -> None:
    """The demo's rows as packed shards."""
    from rich.console import Console

    from coalm_nemo.demo import rows as demo_rows
    from coalm_nemo.demo.pipeline import TRAINING_DIALOGUES, TRAINING_SEED, build_shards, prepare_directory

    if (out / "shards" / "manifest.json").is_file():
        return
    paths = prepare_directory(out)
    demo_rows.write_rows(paths.rows, demo_rows.training_rows(TRAINING_SEED, TRAINING_DIALOGUES))
    build_shards(Console(highlight=False), paths)


def train(runs: Runs, dtype: str, seed: int) -> None:
    from coalm_nemo.demo.pipeline import NANO_BASE

    words = [f"model.hf_path={NANO_BASE}", f"train.steps={runs.steps}", "checkpoint.save_final=true"]
    _run(runs, runs.trained(dtype, seed), dtype, seed, words, runs.steps)


def measure(runs: Runs, weights: str, dtype: str, seed: int) -> None:
    """The loss of trained weights in a precision, on some of the rows in the seed's order."""
    checkpoint = runs.trained(weights, seed) / "checkpoints" / f"step_{runs.steps:08}"
    words = [
        f"model.checkpoint={checkpoint}", f"train.steps={MEASURE_STEPS}", "schedule.warmup_steps=0",
        "optimizer.lr=1e-12", "checkpoint.save_final=false",
    ]  # fmt: skip
    _run(runs, runs.measured(weights, dtype, seed), dtype, seed, words, MEASURE_STEPS)


def _run(runs: Runs, directory: Path, dtype: str, seed: int, words: list[str], steps: int) -> None:
    """`coalm train` on one rank, unless it has been run."""
    if (directory / "metrics.jsonl").is_file() and len(losses(directory)) == steps:
        return
    common = [
        "--recipe", "coalm_demo", f"run.dir={directory}", f"run.seed={seed}", f"data.train={runs.out / 'shards'}",
        "parallel.tensor=1", "parallel.pipeline=1", f"precision.dtype={dtype}",
        *(["precision.emulation_weights=bf16"] if dtype != BASELINE else []),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with directory.with_suffix(".log").open("w") as log:
        command = [sys.executable, "-m", "coalm_nemo.cli", "train", *common, *words]
        subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)


def summary(runs: Runs, dtype: str, seeds: range) -> dict[str, Any]:
    """Relative gaps to bf16: mean, standard error, and by seed."""
    last, after, weights, casts = [], [], [], []
    for seed in seeds:
        ours, theirs = (losses(runs.trained(d, seed)) for d in (dtype, BASELINE))
        last.append(_ratio(ours[-LAST:], theirs[-LAST:]))
        plain = losses(runs.measured(BASELINE, BASELINE, seed))
        after.append(_ratio(losses(runs.measured(dtype, dtype, seed)), plain))
        weights.append(_ratio(losses(runs.measured(dtype, BASELINE, seed)), plain))
        casts.append(_ratio(losses(runs.measured(BASELINE, dtype, seed)), plain))
    named = {
        f"last_{LAST}_steps": last,
        "trained_weights": after,
        "trained_weights_in_bf16": weights,
        "bf16_weights_in_fp8": casts,
    }
    return {name: _spread(gaps) for name, gaps in named.items()}


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.mean(ours) / statistics.mean(theirs) - 1


def _spread(gaps: list[float]) -> dict[str, Any]:
    error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else None
    return {"mean": statistics.mean(gaps), "standard_error": error, "by_seed": gaps}


def score(runs: Runs, dtype: str, seed: int) -> dict[str, dict[str, float]]:
    """Calls and states on the demo's held-out dialogues, percent: measure -> set -> figure."""
    from coalm_nemo.demo.pipeline import HELD_OUT_DIALOGUES, HELD_OUT_SEED
    from coalm_nemo.demo.score import as_table, held_out_items, score_directory

    run_dir = runs.trained(dtype, seed)
    export = run_dir / "export"
    if not export.is_dir():
        checkpoint = run_dir / "checkpoints" / f"step_{runs.steps:08}"
        command = [
            sys.executable,
            "-m",
            "coalm_nemo.cli",
            "convert",
            "export",
            "--ckpt",
            str(checkpoint),
            "--out",
            str(export),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    table = as_table(score_directory(export, held_out_items(HELD_OUT_SEED, HELD_OUT_DIALOGUES)))
    return {measure: {name: value["percent"] for name, value in sets.items()} for measure, sets in table.items()}


def losses(run_dir: Path) -> list[float]:
    from coalm_nemo.training.callbacks.metrics_file import read_steps

    return [float(s["lm_loss"]) for s in read_steps(run_dir / "metrics.jsonl")]


if __name__ == "__main__":
    main()
