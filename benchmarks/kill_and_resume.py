"""Kill a run with SIGKILL at random moments, ten times, and resume it each time on another layout.

The curve it ends with is compared with an uninterrupted run's, step by step.

    python -m benchmarks.kill_and_resume [--kills 10] [--seed 0]
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from coalm_nemo.training.callbacks.metrics_file import read_steps
from tests.conftest import write_rows
from tests.tiny_llama import make_tiny_llama

LAYOUTS = {
    "single": (1, []),
    "dp2": (2, []),
    "tp2": (2, ["parallel.tensor=2"]),
    "tp2_pp2_sp": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "pp2_vp2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "cp2": (2, ["parallel.context=2"]),
    "tp2_dp2": (4, ["parallel.tensor=2"]),
}
STEPS_A_KILL = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        words = common_words(Path(scratch), args.kills)
        whole, cut = Path(scratch) / "whole", Path(scratch) / "cut"
        finish(words, whole, "single")
        kill_and_resume(words, cut, args.kills, random.Random(args.seed))
        report(read_steps(whole / "metrics.jsonl"), read_steps(cut / "metrics.jsonl"))


def common_words(scratch: Path, kills: int) -> list[str]:
    model = make_tiny_llama(scratch / "model", num_layers=4)
    rows = write_rows(scratch / "rows.jsonl", 48)
    steps = STEPS_A_KILL * (kills + 1)
    return [
        f"model.hf_path={model}", f"data.train={rows}", f"train.steps={steps}", "batch.micro_size=2",
        "checkpoint.save_interval_steps=1", "checkpoint.keep_last=2", "logging.console_interval_steps=1000",
    ]  # fmt: skip


def kill_and_resume(words: list[str], run_dir: Path, kills: int, draw: random.Random) -> None:
    layouts = list(LAYOUTS)
    draw.shuffle(layouts)
    for number in range(kills):
        layout = layouts[number % len(layouts)]
        process = start(words, run_dir, layout)
        goal = newest_step(run_dir) + draw.randint(1, STEPS_A_KILL - 1)
        while newest_step(run_dir) < goal and process.poll() is None:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.5))  # anywhere: in a step, or in a save
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        print(f"kill {number + 1:>2}: {layout:<11} last checkpoint: step {newest_step(run_dir)}", flush=True)
    finish(words, run_dir, layouts[kills % len(layouts)])


def start(words: list[str], run_dir: Path, layout: str) -> subprocess.Popen[bytes]:
    nproc, parallel = LAYOUTS[layout]
    command = [sys.executable, "-m", "coalm_nemo.cli", "train", "--nproc", str(nproc), f"run.dir={run_dir}"]
    return subprocess.Popen([*command, *words, *parallel], start_new_session=True, stdout=subprocess.DEVNULL)


def finish(words: list[str], run_dir: Path, layout: str) -> None:
    code = start(words, run_dir, layout).wait()
    assert code == 0, f"{layout} ended with {code}"


def newest_step(run_dir: Path) -> int:
    return max((int(p.name.removeprefix("step_")) for p in (run_dir / "checkpoints").glob("step_*")), default=0)


def report(whole: list[dict[str, float]], cut: list[dict[str, float]]) -> None:
    same_steps = [s["step"] for s in whole] == [s["step"] for s in cut]
    same_rows = [(s["tokens"], s["supervised_tokens"]) for s in whole] == [
        (s["tokens"], s["supervised_tokens"]) for s in cut
    ]
    worst = max(abs(a["lm_loss"] - b["lm_loss"]) for a, b in zip(whole, cut, strict=True))
    print(f"{len(cut)} steps, each once and in order: {same_steps}; the same rows in each: {same_rows}")
    print(f"largest difference of the loss from the uninterrupted run: {worst:.1e}")
    sys.exit(0 if same_steps and same_rows and worst < 1e-6 else 1)


if __name__ == "__main__":
    main()
