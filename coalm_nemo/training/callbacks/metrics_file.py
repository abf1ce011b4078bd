"""`metrics.jsonl`: one line a step, one line a validation; a resumed run continues the same file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coalm_nemo.training.callbacks.base import Callback, EvalReport, RunEnd, RunStart, ScoresReport, StepReport
from coalm_nemo.training.callbacks.line_file import LineFile, to_stderr


class MetricsFile(Callback):
    """Append as the run goes; each line is on disk before the next step starts."""

    def __init__(self, path: Path, warn: Callable[[str], None] = to_stderr) -> None:
        self.path = Path(path)
        self.warn = warn
        self.file: LineFile | None = None

    def on_start(self, start: RunStart) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        keep_until(self.path, start.first_step)
        self.file = LineFile(self.path, self.warn)

    def on_step(self, report: StepReport) -> None:
        self._write({k: v for k, v in asdict(report).items() if v is not None})

    def on_eval(self, report: EvalReport) -> None:
        self._write({"step": report.step, "validation_loss": report.validation_loss})

    def on_scores(self, report: ScoresReport) -> None:
        self._write({"step": report.step} | {f"eval/{name}": value for name, value in report.scores.items()})

    def on_end(self, end: RunEnd) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def _write(self, line: dict[str, Any]) -> None:
        assert self.file is not None
        self.file.write(line)


def keep_until(path: Path, step: int) -> None:
    """Drop lines of steps after `step`: the run goes on from there and will write them again."""
    if not path.is_file():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
    aside = path.with_suffix(".partial")
    aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(aside, path)


def _step_of(line: str) -> float:
    """The step of a line; a torn last line (the process was killed while writing) counts as beyond any step."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The step lines of a metrics.jsonl, in order."""
    lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "lm_loss" in line]
