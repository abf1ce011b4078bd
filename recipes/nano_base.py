"""Pre-training of the demo's nano base: a Llama of about a million parameters that can copy from its context."""

from __future__ import annotations

from coalm_nemo.config import RunConfig


def nano_base() -> RunConfig:
    """From random weights; the stages change only data, sequence length and steps."""
    run = RunConfig()
    run.run.dir = "runs/nano_base"
    run.model.init = "random"
    run.precision.dtype = "fp32"
    run.optimizer.lr = 3e-3
    run.schedule.name = "constant"
    run.logging.console_interval_steps = 50
    return run
