"""Run directories written by the callbacks that write real ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coalm_nemo.config import RunConfig, to_yaml
from coalm_nemo.training.callbacks import base
from coalm_nemo.training.callbacks.events_file import EventsFile
from coalm_nemo.training.callbacks.metrics_file import MetricsFile
from coalm_nemo.validate import Layout

MakeRun = Callable[..., Path]


class Clock:
    """Ten seconds a step, so that a run of hours is written at once."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def make_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRun:
    """`make_run(name, starts)`: starts are (first step, last step, status or None for killed)."""
    clock = Clock()
    monkeypatch.setattr("coalm_nemo.training.callbacks.events_file.time", clock)

    def make(
        name: str = "run", starts: tuple[tuple[int, int, str | None], ...] = ((0, 40, "finished"),), **options: Any
    ) -> Path:
        run_dir = tmp_path / name
        config = options.get("config") or RunConfig()
        config.run.dir = str(run_dir)
        for first, last, status in starts:
            _one_start(run_dir, config, clock, first, last, status, options)
            clock.now += 300
        (run_dir / "run.yaml").write_text(to_yaml(config))
        return run_dir

    return make


def _one_start(
    run_dir: Path, config: RunConfig, clock: Clock, first: int, last: int, status: str | None, options: dict[str, Any]
) -> None:
    watchers: list[base.Callback] = [EventsFile(run_dir), MetricsFile(run_dir / "metrics.jsonl")]
    start = base.RunStart(
        config, Layout(16, 2, 8, True, 8, ()), 100, 50, 0.9, first, options.get("total", 40), 0,
        plan=options.get("plan", ()),
    )  # fmt: skip
    for watcher in watchers[::-1]:
        watcher.on_start(start)
    for step in range(first + 1, last + 1):
        clock.now += 10
        for watcher in watchers:
            watcher.on_step(report(step, clock.now, options.get("sources")))
            if step % 10 == 0:
                watcher.on_eval(base.EvalReport(step, 1.0 / step, 100))
                watcher.on_save(base.SaveNote(step, f"{run_dir}/checkpoints/step_{step}", 4_000_000_000, 2.0))
    for watcher in watchers:
        for event in options.get("events", ()):
            tell(watcher, event)
        if status:
            watcher.on_end(base.RunEnd(status, last, 10.0 * (last - first)))


def report(step: int, now: float, sources: tuple[str, ...] | None) -> base.StepReport:
    return base.StepReport(
        step, 2.0 / step, 1.0 + math.sin(step), 1e-5, 1000, 400, 950.0, 380.0, 10.0, step / 40, time=now, fill=0.97,
        loss_by_source={s: 2.0 / step + i for i, s in enumerate(sources)} if sources else None,
        tflops_per_device=400.0, mfu_causal=0.41, mfu_full=0.44, memory_allocated_bytes=60 << 30,
        memory_reserved_bytes=70 << 30, predicted_tokens_per_s=1000.0, predicted_memory_bytes=64 << 30,
    )  # fmt: skip


def tell(watcher: base.Callback, event: object) -> None:
    if isinstance(event, base.SamplesReport):
        watcher.on_samples(event)
    elif isinstance(event, base.ScoresReport):
        watcher.on_scores(event)
    else:
        watcher.on_warning(str(event))
