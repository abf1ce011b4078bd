"""W&B, online or offline: one run for all starts of a run directory, kept by its id there.

W&B lives in a process of its own (`wandb_process.py`); this callback writes to its pipe and never waits, so that an
outage, a hang, a full disk or a fault of W&B costs the training nothing. What becomes of it is said once.
"""

from __future__ import annotations

import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coalm_nemo.training.callbacks.base import (
    Callback,
    EvalReport,
    RunEnd,
    RunStart,
    SamplesReport,
    SaveNote,
    ScoresReport,
    StepReport,
)
from coalm_nemo.training.callbacks.line_file import last_lines
from coalm_nemo.training.callbacks.lossy_process import KEPT_LINES, LossyProcess

NAMES = {  # Megatron's own metric names, so that dashboards made for it work
    "lm_loss": "lm loss",
    "learning_rate": "learning-rate",
    "grad_norm": "grad-norm",
    "step_time_s": "iteration-time",
    "tokens_per_s": "throughput/tokens_per_sec",
    "supervised_tokens_per_s": "throughput/supervised_tokens_per_sec",
    "tflops_per_device": "throughput/tflops/device",
    "tflops_per_device_full": "throughput/tflops_full_attention/device",
    "mfu_causal": "throughput/mfu_causal",
    "mfu_full": "throughput/mfu_full",
    "memory_allocated_bytes": "mem-max-allocated-bytes",
    "memory_reserved_bytes": "mem-max-reserved-bytes",
    "predicted_tokens_per_s": "throughput/planned_tokens_per_sec",
    "predicted_memory_bytes": "mem-planned-bytes",
    "supervised_tokens": "supervised-tokens",
    "tokens": "tokens",
    "fill": "fill",
    "epoch": "epoch",
}
NOT_LOGGED = ("step", "time")
COMMAND = (sys.executable, "-m", "coalm_nemo.training.callbacks.wandb_process")
LATER = "`coalm wandb sync {run_dir}` sends it"
ID_FILE = "wandb_run_id.txt"
STOPPED_FINISH_S = 10.0
"""Who stops a run by a signal may give it little time, and its checkpoint is what matters."""
OFFLINE_START_S = 120.0
"""Nothing but imports on a slow file system takes time then."""


class WeightsAndBiases(Callback):
    """Tells W&B what happens. `warn` takes a sentence for the console."""

    def __init__(
        self, run_dir: Path, warn: Callable[[str], None], *, finish_s: float = 60.0, command: tuple[str, ...] = COMMAND
    ) -> None:
        self.run_dir = Path(run_dir)
        self.warn = warn
        self.finish_s = finish_s
        self.command = command
        self.process: LossyProcess | None = None
        self.ready = False
        self.first_message: dict[str, Any] = {}
        self.held: deque[dict[str, Any]] = deque(maxlen=KEPT_LINES)
        """What was told before the process was ready: told again to the offline process if online fails."""
        self.give_up_at = 0.0
        self.starts = 1
        self.latest_step = 0
        self.known_step = last_step(self.run_dir)
        """Told to W&B by earlier starts. The steps that this start repeats are not told again: one line, no step twice."""

    def on_start(self, start: RunStart) -> None:
        logging = start.config.logging
        from coalm_nemo.training.callbacks.events_file import count_starts

        if not start.config.checkpoint.resume:  # another run in the same directory
            (self.run_dir / ID_FILE).unlink(missing_ok=True)
            self.known_step = 0
        try:
            self.starts = max(1, count_starts(self.run_dir))
            self.first_message = {
                "mode": logging.wandb,
                "dir": str(self.run_dir),
                "id": run_id(self.run_dir),
                "project": logging.wandb_project,
                "entity": logging.wandb_entity,
                "name": logging.wandb_name or self.run_dir.absolute().name,
                "config": self._config(start),
                "timeout_s": logging.wandb_timeout_s,
                "earlier": [],
            }
            self._start(logging.wandb)
        except OSError as e:  # a full disk, a process limit
            self._give_up(f"W&B cannot be started ({e}); the training goes on without it")

    def on_step(self, report: StepReport) -> None:
        self._log(report.step, {**step_values(asdict(report)), "restarts": self.starts - 1})

    def on_eval(self, report: EvalReport) -> None:
        self._log(report.step, {"lm loss validation": report.validation_loss})

    def on_save(self, note: SaveNote) -> None:
        rate = note.size_bytes / 1e9 / max(note.seconds, 1e-9)
        values = {"seconds": note.seconds, "gigabytes": note.size_bytes / 1e9, "gigabytes_per_sec": rate}
        # Written in the background, it comes after later steps; W&B takes steps in order only.
        self._log(max(note.step, self.latest_step), {f"checkpoint/{k}": v for k, v in values.items()})

    def on_scores(self, report: ScoresReport) -> None:
        self._log(report.step, {f"eval/{name}": value for name, value in report.scores.items()})

    def on_samples(self, report: SamplesReport) -> None:
        rows = [[report.step, s.prompt, s.answer] for s in report.samples]
        self._log(report.step, {}, {"samples": {"columns": ["step", "prompt", "answer"], "rows": rows}})

    def on_end(self, end: RunEnd) -> None:
        if self.process is None:
            return
        self._tell({"finish": 0 if end.status != "non-finite" else 1})
        finish_s = self.finish_s if end.status != "stopped" else min(self.finish_s, STOPPED_FINISH_S)
        until = time.monotonic() + finish_s
        while self.process is not None and not self.ready and time.monotonic() < until:  # a run of a few seconds
            time.sleep(0.05)
            self._look()
        if self.process is None:
            return
        whole = self.process.close(max(1.0, until - time.monotonic()))
        if not whole:
            why = self._reason(self.process.heard()) or f"it has not taken everything within {finish_s:.0f} s"
            online = " --include-online" if self.first_message["mode"] == "online" else ""
            self.warn(f"W&B: {why}; " + LATER.format(run_dir=f"{self.run_dir}{online}"))
        elif self.first_message["mode"] == "online":
            mark_synced(self.run_dir, self.first_message["id"])
        self.process = None

    def _config(self, start: RunStart) -> dict[str, Any]:
        from coalm_nemo.training.callbacks.events_file import start_facts

        facts = start_facts(start)
        facts["data_manifest"] = facts.pop("data")  # `data` is a section of the configuration
        return {**asdict(start.config), **facts}

    def _start(self, mode: str) -> None:
        from coalm_nemo.training.wandb_sync import unsent_pieces

        earlier = [str(p) for p in unsent_pieces(self.run_dir)] if mode == "online" else []
        self.first_message.update(mode=mode, earlier=earlier)
        self.ready = False
        self.process = LossyProcess(self.command, self.run_dir / "wandb.log")
        self.process.tell(self.first_message)
        # One limit over all that a start does: some of W&B's own waits have none.
        limit_s = OFFLINE_START_S if mode == "offline" else self.first_message["timeout_s"]
        self.give_up_at = time.monotonic() + limit_s + 30.0 * len(earlier)

    def _log(self, step: int, values: Mapping[str, Any], tables: Mapping[str, Any] | None = None) -> None:
        self.latest_step = max(step, self.latest_step)
        if self.process is not None and step > self.known_step:
            self._tell({"step": step, "values": values, "tables": tables or {}})

    def _tell(self, message: dict[str, Any]) -> None:
        assert self.process is not None
        if not self.ready:
            self.held.append(message)
            self._look()
            return
        self.process.tell(message)
        self._look()

    def _look(self) -> None:
        """What the process has said, whether it still runs, and whether it takes too long to start."""
        if self.process is None:
            return
        heard = self.process.heard()
        if not self.ready and any("ready" in m for m in heard):
            self.ready = True
            for message in self.held:
                self.process.tell(message)
            self.held.clear()
        why = self._reason(heard)
        if why or not self.process.alive:
            self._failed(why or "its process has ended")
        elif not self.ready and time.monotonic() > self.give_up_at:
            self._failed("no answer in time")

    @staticmethod
    def _reason(heard: list[dict[str, Any]]) -> str:
        return next((str(m["failed"]) for m in heard if "failed" in m), "")

    def _failed(self, why: str) -> None:
        """Offline where online does not start; else without W&B. Either is said, once."""
        assert self.process is not None
        self.process.kill()
        self.process = None
        if self.ready or self.first_message["mode"] == "offline":
            self._give_up(f"W&B failed ({why}); the training goes on without it")
            return
        self.warn(f"W&B cannot be reached ({why}); logging goes on offline, and " + LATER.format(run_dir=self.run_dir))
        try:
            self._start("offline")
        except OSError as e:
            self._give_up(f"W&B cannot be started offline either ({e}); the training goes on without it")

    def _give_up(self, sentence: str) -> None:
        self.process = None
        self.held.clear()
        self.warn(sentence)


def step_values(report: Mapping[str, Any]) -> dict[str, float]:
    """A line of metrics.jsonl under Megatron's names; a measure without one keeps its own."""
    values: dict[str, float] = {}
    for key, value in report.items():
        if isinstance(value, Mapping):  # by source
            values.update({f"{key.replace('_', ' ')}/{name}": v for name, v in value.items() if v is not None})
        elif isinstance(value, int | float) and key not in NOT_LOGGED:
            values[NAMES.get(key, key)] = value
    return values


def run_id(run_dir: Path) -> str:
    """The W&B id of this run directory: drawn once, then kept."""
    path = run_dir / ID_FILE
    if path.is_file() and (known := path.read_text().strip()):
        return known
    run_dir.mkdir(parents=True, exist_ok=True)
    drawn = uuid.uuid4().hex[:12]
    aside = path.with_suffix(".partial")
    aside.write_text(drawn + "\n")
    aside.replace(path)
    return drawn


def last_step(run_dir: Path) -> int:
    """The last step that earlier starts told W&B; 0 if there are none. Asked before `metrics.jsonl` is cut back."""
    if not (run_dir / ID_FILE).is_file():
        return 0
    steps = (line.get("step") for line in last_lines(run_dir / "metrics.jsonl"))
    return max((s for s in steps if isinstance(s, int)), default=0)


def mark_synced(run_dir: Path, wandb_id: str) -> None:
    """Note that all pieces written so far are on the server, as `wandb sync` itself notes it."""
    for piece in run_dir.glob(f"wandb/run-*-{wandb_id}/run-{wandb_id}.wandb"):
        piece.with_suffix(".wandb.synced").touch()
