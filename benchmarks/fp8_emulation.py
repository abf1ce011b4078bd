"""The demo's fine-tuning in fp32 and in each emulated FP8 recipe, same base, rows and order: what FP8 costs in loss.

    OMP_NUM_THREADS=1 python -m benchmarks.fp8_emulation [--steps 1150] [--out runs/fp8_emulation]

Two pipeline ranks without tensor parallelism: the demo's model is too narrow for blocks of 128 on two of its ranks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

DTYPES = ("fp32", "fp8_emulated_current", "fp8_emulated_blockwise", "fp8_emulated_delayed")
LAST = 50
"""Steps at the end whose mean loss is compared."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1150)
    parser.add_argument("--out", type=Path, default=Path("runs/fp8_emulation"))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES))
    args = parser.parse_args()
    prepare(args.out)
    results = {}
    for dtype in args.dtypes:
        started = time.monotonic()
        train(args.out, dtype, args.steps)
        results[dtype] = compare(args.out, dtype, args.dtypes[0]) | {"seconds": round(time.monotonic() - started)}
        print(json.dumps({dtype: results[dtype]}), flush=True)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def prepare(out: Path) -> None:
    """The demo's rows as packed shards."""
    from rich.console import Console

    from coalm_nemo.demo import rows as demo_rows
    from coalm_nemo.demo.pipeline import TRAINING_DIALOGUES, TRAINING_SEED, build_shards, prepare_directory

    paths = prepare_directory(out)
    demo_rows.write_rows(paths.rows, demo_rows.training_rows(TRAINING_SEED, TRAINING_DIALOGUES))
    build_shards(Console(highlight=False), paths)


def train(out: Path, dtype: str, steps: int) -> None:
    from coalm_nemo.demo.pipeline import NANO_BASE

    words = [
        "--recipe", "coalm_demo", "--nproc", "2", f"run.dir={out / dtype}", f"model.hf_path={NANO_BASE}",
        f"data.train={out / 'shards'}", f"train.steps={steps}", "parallel.tensor=1", f"precision.dtype={dtype}",
        "checkpoint.save_final=true",
    ]  # fmt: skip
    log = (out / f"{dtype}.log").open("w")
    subprocess.run([sys.executable, "-m", "coalm_nemo.cli", "train", *words], check=True, stdout=log, stderr=log)


def compare(out: Path, dtype: str, baseline: str) -> dict[str, float]:
    """Losses of the first and the last steps, and the largest distance of their running means from the baseline's."""
    ours, theirs = losses(out / dtype), losses(out / baseline)
    end, end_baseline = (sum(x[-LAST:]) / len(x[-LAST:]) for x in (ours, theirs))
    means = [
        sum(ours[i : i + LAST]) / sum(theirs[i : i + LAST]) - 1 for i in range(0, max(1, len(ours) - LAST + 1), LAST)
    ]
    return {
        "first_loss": ours[0],
        f"mean_of_last_{LAST}": end,
        "relative_to_baseline": end / end_baseline - 1,
        f"worst_{LAST}_steps": max(means, key=abs),
    }


def losses(run_dir: Path) -> list[float]:
    from coalm_nemo.training.callbacks.metrics_file import read_steps

    return [float(s["lm_loss"]) for s in read_steps(run_dir / "metrics.jsonl")]


if __name__ == "__main__":
    main()
