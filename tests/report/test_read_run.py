"""What a run directory says: restarts and their causes, torn lines, a run that goes on."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

import pytest

from coalm_nemo.errors import UserError
from coalm_nemo.report.read_run import Run, read_run
from coalm_nemo.report.timeline import repeated_steps
from tests.report.conftest import MakeRun

THREE = ((0, 17, None), (10, 25, "stopped"), (25, 40, "finished"))


def test_restarts_with_causes_and_repeated_steps(make_run: MakeRun) -> None:
    run = read_run(make_run(starts=THREE))
    assert [(s.step, s.last_step, s.cause) for s in run.starts] == [
        (0, 17, "killed"), (10, 25, "stopped"), (25, 40, "finished"),
    ]  # fmt: skip
    assert repeated_steps(run.starts) == [0, 7, 0]
    assert [round(s.ended - s.began) for s in run.starts] == [170, 150, 150]
    assert (run.step, run.total_steps, run.status) == (40, 40, "finished")
    assert list(run.series["lm_loss"].steps) == list(range(1, 41))
    assert [e["step"] for e in run.of("save")] == [10, 20, 30, 40]


def test_what_slurm_notes(make_run: MakeRun) -> None:
    """Three starts, and between the first two a job that found a bad node and never came to train."""
    run_dir = make_run(starts=THREE)
    starts = read_run(run_dir).starts

    def row(seconds: float, what: str, nodes: str) -> str:
        return f"{datetime.fromtimestamp(seconds).isoformat(timespec='seconds')}\t77\t{what}\t17\t10\t{nodes}\n"

    rows = [
        row(starts[0].began - 20, "start", "node[1-2]"), row(starts[0].ended + 30, "node lost", "node[1-2]"),
        row(starts[0].ended + 31, "start", "node[3-4]"), row(starts[0].ended + 60, "bad node", "node[3-4]"),
        row(starts[1].began - 20, "start", "node[5-6]"), row(starts[1].ended, "time limit", "node[5-6]"),
        row(starts[2].began - 20, "start", "node[5-6]"), "torn\n", "2026-01-01\tx\n",
    ]  # fmt: skip
    (run_dir / "slurm_events.tsv").write_text("".join(rows))
    again = read_run(run_dir).starts
    assert [s.nodes for s in again] == ["node[1-2]", "node[5-6]", "node[5-6]"]
    assert [s.job for s in again] == ["77"] * 3
    assert [s.cause for s in again] == ["node lost", "time limit", "finished"]


def test_a_torn_last_line_everywhere(make_run: MakeRun) -> None:
    run_dir = make_run(starts=((0, 12, None),))
    for name in ("metrics.jsonl", "events.jsonl"):
        with (run_dir / name).open("ab") as file:
            file.write(b'{"step": 13, "lm_l\xff')
    assert read_run(run_dir).step == 12


@pytest.mark.parametrize(("ago_s", "status"), [(5.0, "running"), (86_400.0, "silent")])
def test_going_on_or_silent(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, ago_s: float, status: str) -> None:
    run_dir = make_run(starts=((0, 12, None),))
    last = read_run(run_dir).starts[-1].ended
    monkeypatch.setattr(time, "time", lambda: last + ago_s)
    assert read_run(run_dir).status == status


def test_metrics_alone(tmp_path: Path) -> None:
    """A run of an earlier version, or one that another tool copied in part."""
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "lm_loss": 2.0}\n{"step": 2, "lm_loss": NaN, "new": true}\n[]\n'
    )
    run = read_run(tmp_path)
    assert (run.step, run.status, run.config, run.starts) == (2, "finished", {}, [])
    assert isinstance(run, Run)


def test_a_damaged_configuration(make_run: MakeRun) -> None:
    run_dir = make_run()
    (run_dir / "run.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not valid YAML"):
        read_run(run_dir)
