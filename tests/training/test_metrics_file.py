"""metrics.jsonl: one line a step, continued by a resumed run without a line lost, doubled or torn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from coalm_nemo.config import RunConfig
from coalm_nemo.training.callbacks.base import EvalReport, RunEnd, RunStart, StepReport
from coalm_nemo.training.callbacks.metrics_file import MetricsFile, keep_until, read_steps
from coalm_nemo.validate import Layout


def step(number: int) -> StepReport:
    return StepReport(number, 1.0 / number, 0.5, 1e-3, 10, 4, 100.0, 40.0, 0.1, number / 10)


def start(first_step: int) -> RunStart:
    return RunStart(RunConfig(), Layout(1, 1, 1, False, 1, ()), 10, 10, 1.0, first_step, 10, 0)


def run(path: Path, first_step: int, last_step: int, *, ends: bool = True) -> None:
    metrics = MetricsFile(path)
    metrics.on_start(start(first_step))
    for number in range(first_step + 1, last_step + 1):
        metrics.on_step(step(number))
    if ends:
        metrics.on_end(RunEnd("finished", last_step, 1.0))


def steps_of(path: Path) -> list[int]:
    return [line["step"] for line in read_steps(path)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_a_step_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    run(path, 0, 3, ends=False)
    assert steps_of(path) == [1, 2, 3]
    assert lines(path)[1] == {
        "step": 2, "lm_loss": 0.5, "grad_norm": 0.5, "learning_rate": 1e-3, "tokens": 10, "supervised_tokens": 4,
        "tokens_per_s": 100.0, "supervised_tokens_per_s": 40.0, "step_time_s": 0.1, "epoch": 0.2,
        "time": 0.0, "fill": 1.0,
    }  # fmt: skip


def test_validation_lines_are_no_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.on_start(start(0))
    metrics.on_step(step(1))
    metrics.on_eval(EvalReport(1, 0.25, 100))
    metrics.on_end(RunEnd("finished", 1, 1.0))
    assert lines(path)[1] == {"step": 1, "validation_loss": 0.25}
    assert steps_of(path) == [1]


def test_a_resumed_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    run(path, 0, 5, ends=False)  # killed after step 5; the checkpoint is of step 3
    run(path, 3, 7)
    assert steps_of(path) == [1, 2, 3, 4, 5, 6, 7]


def test_starting_anew_starts_the_file_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    run(path, 0, 5)
    run(path, 0, 2)
    assert steps_of(path) == [1, 2]


def test_nothing_to_keep(tmp_path: Path) -> None:
    keep_until(tmp_path / "metrics.jsonl", 5)
    assert not list(tmp_path.iterdir())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(0, 7), st.integers(0, 400))
def test_a_torn_last_line_is_dropped(tmp_path_factory: Any, written: int, kept: int, cut: int) -> None:
    """Cut the file anywhere within its last line, then resume from any checkpoint."""
    path = tmp_path_factory.mktemp("torn") / "metrics.jsonl"
    run(path, 0, written)
    content = path.read_bytes()
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    path.write_bytes(content[: max(last, len(content) - cut)])
    whole = len(path.read_bytes()) >= len(content) - 1  # all but the line feed is a whole line
    keep_until(path, kept)
    assert steps_of(path) == list(range(1, min(kept, written if whole else written - 1) + 1))
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_lines_of_another_kind_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "lm_loss": 1}\n[1]\nnull\n{"loss": 2}\n{"step": null}\n{"step": 2, "lm_loss": 1}\n')
    keep_until(path, 9)
    assert steps_of(path) == [1, 2]
