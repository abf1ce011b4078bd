"""`events.jsonl`: starts, saves, scores, samples, warnings and ends, each with its time. Never cut back: a step that was
trained twice has its save twice, and every start stays known.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coalm_nemo.provenance import code_version, data_summary, environment
from coalm_nemo.training.callbacks.base import Callback, RunEnd, RunStart, SamplesReport, SaveNote, ScoresReport
from coalm_nemo.training.callbacks.line_file import LineFile, last_lines, read_lines, to_stderr

EVENTS = "events.jsonl"


class EventsFile(Callback):
    """Appends to the run directory's events."""

    def __init__(self, run_dir: Path, warn: Callable[[str], None] = to_stderr) -> None:
        self.run_dir = Path(run_dir)
        self.warn = warn
        self.file: LineFile | None = None
        self.reached = _reached(self.run_dir)
        """How far the start before this one had come; read before `metrics.jsonl` is cut back to the checkpoint."""

    def on_start(self, start: RunStart) -> None:
        try:
            self.file = LineFile(self.run_dir / EVENTS, self.warn)
        except OSError as e:
            self.warn(f"{self.run_dir / EVENTS} cannot be opened ({e.strerror}); the run goes on without it")
            return
        self._write("start", start.first_step, reached=self.reached, **start_facts(start))

    def on_save(self, note: SaveNote) -> None:
        self._write("save", note.step, path=note.path, size_bytes=note.size_bytes, seconds=note.seconds)

    def on_scores(self, report: ScoresReport) -> None:
        self._write("scores", report.step, scores=dict(report.scores))

    def on_samples(self, report: SamplesReport) -> None:
        self._write("samples", report.step, samples=[asdict(s) for s in report.samples])

    def on_warning(self, sentence: str) -> None:
        self._write("warning", None, sentence=sentence)

    def on_end(self, end: RunEnd) -> None:
        self._write("end", end.step, status=end.status, seconds=end.seconds)
        if self.file is not None:
            self.file.close()
            self.file = None

    def _write(self, event: str, step: int | None, **facts: Any) -> None:
        if self.file is not None:
            head = {"event": event, "time": time.time()} | ({} if step is None else {"step": step})
            self.file.write({**head, **facts})


def start_facts(start: RunStart) -> dict[str, Any]:
    """What a start is known by afterwards: its place, layout, code, machines and data."""
    return {
        "total_steps": start.total_steps,
        "layout": {k: v for k, v in asdict(start.layout).items() if k != "derived"},
        "rows": start.rows,
        "items": start.items,
        "fill": start.fill,
        "plan": list(start.plan),
        "data": data_summary(start.config.data.train),
        "code": code_version(),
        "environment": environment(),
    }


def _reached(run_dir: Path) -> dict[str, float]:
    """{"step", "time"} of the last step that is written; {} if there is none."""
    steps = [line for line in last_lines(run_dir / "metrics.jsonl") if "lm_loss" in line]
    return {k: steps[-1][k] for k in ("step", "time") if k in steps[-1]} if steps else {}


def count_starts(run_dir: Path) -> int:
    """How often a run directory's run has started."""
    return sum(e.get("event") == "start" for e in read_lines(Path(run_dir) / EVENTS))
