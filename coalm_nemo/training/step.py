"""One optimizer step and one validation pass over megatron-core's schedules."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from coalm_nemo.data.batch import MicroBatch
from coalm_nemo.training.setup import Trainee


class NonFiniteError(Exception):
    """The loss or the gradient norm is inf or NaN."""


@dataclass(frozen=True)
class StepResult:
    """The same on every rank."""

    loss: float
    """Mean over the supervised tokens of the global batch."""
    supervised_tokens: int
    grad_norm: float
    learning_rate: float
    stop_asked: bool
    """Some rank was told to stop."""
    source_losses: tuple[float | None, ...] = ()
    """Mean over each source's supervised tokens, None for one that has none here; empty where it is not logged."""


def train_step(
    trainee: Trainee, batches: list[MicroBatch], length: int, device: torch.device, stop: bool
) -> StepResult:
    """Forward, backward, reduce, clip, update. `length`: sequence length before context parallelism cuts it.

    The loss is summed over supervised tokens of all micro-batches and ranks and divided once by their number, so a
    token weighs the same wherever it falls. Raises NonFiniteError before weights are touched by a non-finite loss.
    """
    for chunk in trainee.chunks:
        chunk.zero_grad_buffer()
    trainee.optimizer.zero_grad()
    losses = run_schedule(trainee.chunks, batches, length, forward_only=False)
    loss, tokens, stopping, by_source = reduce_losses(losses, device, stop, batches[0].source_count)
    if not math.isfinite(loss):
        raise NonFiniteError(f"the loss is {loss}")
    learning_rate = float(trainee.optimizer.param_groups[0]["lr"])
    _, grad_norm, _ = trainee.optimizer.step()
    if not math.isfinite(grad_norm):
        raise NonFiniteError(f"the gradient norm is {grad_norm}")
    trainee.scheduler.step(increment=1)
    return StepResult(loss, tokens, float(grad_norm), learning_rate, stopping, by_source)


def evaluate(trainee: Trainee, batches: list[MicroBatch], length: int, device: torch.device) -> tuple[float, int]:
    """(loss sum, supervised tokens) of one global batch, without gradients."""
    for chunk in trainee.chunks:
        chunk.eval()
    with torch.no_grad():
        losses = run_schedule(trainee.chunks, batches, length, forward_only=True)
    for chunk in trainee.chunks:
        chunk.train()
    mean, tokens, _, _ = reduce_losses(losses, device, False, batches[0].source_count)
    return mean * tokens, tokens


def run_schedule(chunks: list[Any], batches: list[MicroBatch], length: int, *, forward_only: bool) -> list[Tensor]:
    """All micro-batches through the pipeline. On the last stage: [loss sum, tokens] of each; elsewhere nothing."""
    micro_size = batches[0].tokens.size(0)
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in chunks] if len(chunks) > 1 else iter(batches),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=micro_size,
        forward_only=forward_only,
    )


def forward_step(batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Any]:
    """megatron-core's forward_step_func: output of this stage and the loss function for the last one."""
    batch = next(batches)
    output = model(
        input_ids=batch.tokens,
        position_ids=batch.position_ids,
        attention_mask=None,
        labels=batch.labels,
        packed_seq_params=batch.packed_seq_params,
    )
    return output, partial(supervised_loss, batch)


def supervised_loss(batch: MicroBatch, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """losses [b, s] -> (summed loss, supervised tokens, for the log [sum, tokens, sum of each source, tokens of each]).

    With `calculate_per_token_loss` megatron-core divides the gradients by the global number of tokens at the end.
    """
    masked = losses.float() * batch.loss_mask
    total, tokens = masked.sum(), batch.loss_mask.sum()
    # The schedule changes the loss in place: what is logged has to be a copy.
    report = torch.stack([total.detach().double(), tokens.double()])
    if batch.sources is not None:
        report = torch.cat([report, by_source(batch, masked.detach()), by_source(batch, batch.loss_mask)])
    return total, tokens.int(), report


def by_source(batch: MicroBatch, values: Tensor) -> Tensor:
    """Sums of values [b, s] over each source's positions: fp64 [sources]."""
    assert batch.sources is not None
    sums = torch.zeros(batch.source_count, dtype=torch.float64, device=values.device)
    return sums.index_add_(0, batch.sources.flatten(), values.flatten().double())


def reduce_losses(
    losses: list[Tensor], device: torch.device, stop: bool, sources: int = 0
) -> tuple[float, int, bool, tuple[float | None, ...]]:
    """Mean loss, supervised tokens, "somebody was told to stop" and each source's mean loss over the world, in one
    collective."""
    totals = torch.zeros(3 + 2 * sources, dtype=torch.float64, device=device)
    if losses and parallel_state.get_tensor_model_parallel_rank() == 0:
        totals[1:] = torch.stack(losses).sum(0)
    totals[0] = float(stop)
    torch.distributed.all_reduce(totals)
    stops, loss_sum, tokens, *rest = totals.tolist()
    means = tuple(s / n if n else None for s, n in zip(rest[:sources], rest[sources:], strict=True))
    return loss_sum / max(tokens, 1.0), int(tokens), stops > 0, means
