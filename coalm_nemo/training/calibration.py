"""Delayed scaling starts with no history: its scales must not be those of nothing, nor of another model.

A scale from the largest values of the last passes is 1 before there were any; after bf16 weights are loaded it says
nothing about them (TransformerEngine issues 567 and 982). A few passes over the first batch fill the history.
"""

from __future__ import annotations

from pathlib import Path

import torch

from coalm_nemo.config import RunConfig
from coalm_nemo.training import fp8_state
from coalm_nemo.training.feed import Feed
from coalm_nemo.training.setup import Trainee, seed_everything
from coalm_nemo.training.step import run_schedule

PASSES = 3
"""In the first, gradients are cast with scale 1, and what lies below them is too small to be seen; the next ones see it."""


def wants_calibration(run: RunConfig) -> bool:
    """Whether scales are taken from earlier passes."""
    return "delayed" in (run.precision.fp8, run.precision.emulated_fp8)


def restore_or_calibrate(trainee: Trainee, feed: Feed, device: torch.device, checkpoint: Path | None) -> None:
    """The scales of the checkpoint that the run goes on from; of the base's weights, where it has none."""
    found = checkpoint is not None and fp8_state.restore(trainee.models(), checkpoint)
    everywhere = torch.tensor([float(found)], device=device)
    torch.distributed.all_reduce(everywhere, op=torch.distributed.ReduceOp.MIN)
    if not everywhere.item():
        calibrate(trainee, feed, device)


def calibrate(trainee: Trainee, feed: Feed, device: torch.device) -> None:
    """Forward and backward over the run's first batch; its gradients are thrown away and no weight moves."""
    batch = feed.global_batch(0, None)
    for _ in range(PASSES):
        seed_everything(feed.run.run.seed, 0)
        for chunk in trainee.chunks:
            chunk.zero_grad_buffer()
        run_schedule(trainee.chunks, feed.micro_batches(batch, device), batch.length, forward_only=False)
    for chunk in trainee.chunks:
        chunk.zero_grad_buffer()
