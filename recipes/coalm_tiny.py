"""CoALM's SFT on a laptop: the cluster's code path with numbers that two CPU cores can carry."""

from __future__ import annotations

from coalm_nemo.config import RunConfig


def coalm_tiny() -> RunConfig:
    """Any small Llama in fp32; the layout is the caller's (`parallel.*`), the default one rank."""
    run = RunConfig()
    run.run.dir = "runs/coalm_tiny"
    run.precision.dtype = "fp32"
    run.train.seq_len_tokens = 512
    run.batch.global_size = 8
    run.optimizer.lr = 1e-3
    run.schedule.name = "cosine"
    run.logging.console_interval_steps = 10
    return run
