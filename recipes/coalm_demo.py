"""The demo's fine-tuning: the nano base on four CPU ranks."""

from __future__ import annotations

from coalm_nemo.config import RunConfig


def coalm_demo() -> RunConfig:
    """TP2 x PP2 with sequence parallelism, packed rows, fp32: about four million tokens."""
    run = RunConfig()
    run.run.dir = "runs/coalm_demo"
    run.precision.dtype = "fp32"
    run.parallel.tensor = 2
    run.parallel.pipeline = 2
    run.data.packing = True
    run.data.pack_multiple = 1  # no context parallelism here, and rows are short
    run.train.seq_len_tokens = 1024
    run.batch.global_size = 4
    run.train.steps = 1150
    run.optimizer.lr = 3e-3
    run.optimizer.weight_decay = 0.0
    run.schedule.name = "linear"
    run.schedule.warmup_steps = 20
    run.logging.console_interval_steps = 50
    return run
