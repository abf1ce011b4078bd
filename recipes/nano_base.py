"""Pre-training of the demo's nano base: a Llama of 0.6 million parameters that learns to copy from its context."""

from __future__ import annotations

from coalm_nemo.config import RunConfig


def nano_base() -> RunConfig:
    """One stage of the curriculum; the stages change only rows, sequence length, batch and schedule."""
    run = RunConfig()
    run.run.dir = "runs/nano_base"
    run.precision.dtype = "fp32"
    run.optimizer.lr = 3e-3
    run.optimizer.weight_decay = 0.0
    run.schedule.warmup_steps = 100
    run.logging.console_interval_steps = 200
    return run
