"""The loop's own time a step: everything that `coalm train` does beside forward, backward and the optimizer.

The real run of one rank on the demo's base, small enough that the rest shows: feed, random state, the loss's collective,
report, callbacks with their files, FLOP meter, watchdog, straggler check, save poll, garbage collection.

    OMP_NUM_THREADS=1 python -m benchmarks.loop_profile [--steps 300] [--prefetch 1] [--json FILE]
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEP_MS = 100.0
"""The step that the loop's own time is held against."""
WARM_UP_STEPS = 10
TRAINING = ("forward and backward", "optimizer")


class Clock:
    """Seconds by part, a row a step; a step begins where the loop asks for its batch."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.began: tuple[float, float] | None = None
        self.parts: dict[str, float] = defaultdict(float)

    def next_step(self) -> None:
        now = time.perf_counter(), time.thread_time()
        if self.began is not None:
            self.parts["step"], self.parts["step, CPU"] = now[0] - self.began[0], now[1] - self.began[1]
            self.steps.append(dict(self.parts))
        self.parts.clear()
        self.began = now

    def time(self, owner: Any, name: str, part: str, first: Callable[[], None] = lambda: None) -> None:
        """Count the calls of `owner.name` to `part`."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            first()
            wall, own = time.perf_counter(), time.thread_time()
            try:
                return original(*args, **kwargs)
            finally:
                self.parts[part] += time.perf_counter() - wall
                self.parts[f"{part}, CPU"] += time.thread_time() - own

        setattr(owner, name, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--prefetch", type=int, default=1, help="speed.prefetch_steps")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = summarise(profile(Path(scratch), args.steps, args.prefetch))
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def profile(scratch: Path, steps: int, prefetch: int) -> list[dict[str, float]]:
    """Train in `scratch`; seconds of every step by part."""
    from coalm_nemo.config import build_config
    from coalm_nemo.demo import rows as demo_rows
    from coalm_nemo.demo.pipeline import NANO_BASE
    from coalm_nemo.training import worker
    from coalm_nemo.training.ranks import Ranks
    from recipes import load_recipe

    worker.quiet_libraries()
    rows = scratch / "rows.jsonl"
    demo_rows.write_rows(rows, demo_rows.training_rows(1, 200))
    words = [
        f"run.dir={scratch / 'run'}", f"model.hf_path={NANO_BASE}", f"data.train={rows}", f"train.steps={steps}",
        "parallel.tensor=1", "parallel.pipeline=1", "batch.global_size=4", "train.seq_len_tokens=256",
        "data.overlong=drop", "logging.console_interval_steps=10", f"speed.prefetch_steps={prefetch}",
        "checkpoint.save_final=false",
    ]  # fmt: skip
    run = build_config(load_recipe("coalm_demo"), [], words)
    clock = Clock()
    watch(clock)
    worker.train(run, Ranks(0, 0, 1, "single"))
    return clock.steps


def watch(clock: Clock) -> None:
    """Put the clock around the parts of a step."""
    from coalm_nemo.training import loop, setup, step
    from coalm_nemo.training.checkpointing import Checkpointer
    from coalm_nemo.training.garbage import CollectTogether
    from coalm_nemo.training.prefetch import Prefetcher
    from coalm_nemo.training.throughput import Meter
    from coalm_nemo.training.watchdog import Watchdog

    clock.time(Prefetcher, "next", "feed", clock.next_step)
    clock.time(step, "run_schedule", "forward and backward")
    clock.time(loop, "seed_everything", "random state")
    clock.time(step, "reduce_losses", "loss over the ranks")
    clock.time(loop.Loop, "_report", "report and callbacks")
    clock.time(Meter, "after_step", "memory check")
    clock.time(Watchdog, "_arm", "watchdog")
    clock.time(loop.Loop, "_look_for_stragglers", "straggler check")
    clock.time(Checkpointer, "poll", "save poll")
    clock.time(CollectTogether, "after_step", "garbage collection")
    build = setup.build_trainee

    def built(*args: Any, **kwargs: Any) -> Any:
        trainee = build(*args, **kwargs)
        for owner, name in ((trainee.optimizer, "step"), (trainee.optimizer, "zero_grad"), (trainee.scheduler, "step")):
            clock.time(owner, name, "optimizer")
        for chunk in trainee.chunks:
            clock.time(chunk, "zero_grad_buffer", "optimizer")
        return trainee

    setup.build_trainee = built


def summarise(steps: list[dict[str, float]]) -> dict[str, Any]:
    """Milliseconds of a step by part: median and mean of wall time, mean of this thread's CPU time."""
    kept = steps[WARM_UP_STEPS:]
    for row in kept:
        for suffix in ("", ", CPU"):
            row[f"own{suffix}"] = row[f"step{suffix}"] - sum(row.get(f"{part}{suffix}", 0.0) for part in TRAINING)
            named = [
                p for p in row if p.endswith(", CPU") == bool(suffix) and not p.startswith(("step", "own", *TRAINING))
            ]
            row[f"the rest{suffix}"] = row[f"own{suffix}"] - sum(row[p] for p in named)
    names = sorted({n for row in kept for n in row if not n.endswith(", CPU")})
    parts = {
        name: _figures([r.get(name, 0.0) for r in kept], [r.get(f"{name}, CPU", 0.0) for r in kept]) for name in names
    }
    share = {kind: parts["own"][kind] / STEP_MS for kind in parts["own"]}
    return {"steps": len(kept), "parts_ms": parts, f"own_share_of_{STEP_MS:.0f}_ms": share}


def _figures(wall: list[float], own: list[float]) -> dict[str, float]:
    figures = {"median": statistics.median(wall), "mean": statistics.fmean(wall), "cpu_mean": statistics.fmean(own)}
    return {name: round(1e3 * seconds, 4) for name, seconds in figures.items()}


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    parts = result["parts_ms"]
    whole = ("own", "step", *TRAINING)
    order = [*sorted((n for n in parts if n not in whole), key=lambda n: -parts[n]["median"]), *whole]
    rows = [f"| {n} | {parts[n]['median']:.3f} | {parts[n]['mean']:.3f} | {parts[n]['cpu_mean']:.3f} |" for n in order]
    head = ["| part, ms a step | median | mean | mean of CPU time |", "|---|---:|---:|---:|"]
    share = result[f"own_share_of_{STEP_MS:.0f}_ms"]
    shares = f"median {share['median']:.2%}, mean {share['mean']:.2%}, CPU {share['cpu_mean']:.2%}"
    told = f"own time of a step of {STEP_MS:.0f} ms: {shares}"
    return "\n".join([*head, *rows, "", f"{told}; {result['steps']} steps"])


if __name__ == "__main__":
    main()
