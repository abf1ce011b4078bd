"""W&B, online or offline. A resumed run goes on as the same W&B run: its id is kept in the run directory."""

from __future__ import annotations

import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coalm_nemo.training.callbacks.base import Callback, EvalReport, RunEnd, RunStart, SaveNote, StepReport

NAMES = {  # Megatron's own metric names, so that dashboards made for it work
    "lm_loss": "lm loss",
    "learning_rate": "learning-rate",
    "grad_norm": "grad-norm",
    "tokens_per_s": "throughput/tokens_per_sec",
    "supervised_tokens_per_s": "throughput/supervised_tokens_per_sec",
    "step_time_s": "throughput/step_time_sec",
    "supervised_tokens": "supervised-tokens",
    "epoch": "epoch",
}


class WeightsAndBiases(Callback):
    """Logs a step at a time."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = Path(run_dir)
        self.run: Any = None

    def on_start(self, start: RunStart) -> None:
        import wandb

        logging = start.config.logging
        self.run = wandb.init(
            project=logging.wandb_project,
            entity=logging.wandb_entity or None,
            name=logging.wandb_name or self.run_dir.name,
            id=run_id(self.run_dir),
            resume="allow",
            mode=logging.wandb,  # type: ignore[arg-type]
            dir=str(self.run_dir),
            config=asdict(start.config),
        )

    def on_step(self, report: StepReport) -> None:
        self.run.log({NAMES[k]: v for k, v in asdict(report).items() if k in NAMES}, step=report.step)

    def on_eval(self, report: EvalReport) -> None:
        self.run.log({"lm loss validation": report.validation_loss}, step=report.step)

    def on_save(self, note: SaveNote) -> None:
        self.run.log({"checkpoint/seconds": note.seconds, "checkpoint/bytes": note.size_bytes}, step=note.step)

    def on_end(self, end: RunEnd) -> None:
        if self.run is not None:
            self.run.finish(exit_code=0 if end.status != "non-finite" else 1)


def run_id(run_dir: Path) -> str:
    """The W&B id of this run directory: drawn once, then kept."""
    path = run_dir / "wandb_run_id.txt"
    if path.is_file():
        return path.read_text().strip()
    run_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(uuid.uuid4().hex[:12] + "\n")
    return path.read_text().strip()
