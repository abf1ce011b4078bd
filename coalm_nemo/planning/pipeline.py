"""Pipeline schedules: who holds what, who waits for whom.

1F1B and its interleaved form, Narayanan et al. 2021 (arXiv 2104.04473), sections 2.2.1 and 2.2.2, as Megatron-Core
runs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from coalm_nemo.models.llama import LlamaConfig
from coalm_nemo.planning.job import Layout


def bubble_fraction(pipeline: int, virtual_pipeline: int, micro_batches: int) -> float:
    """Idle part of a step with equal stages: (p - 1) / (v m + p - 1)."""
    waiting = pipeline - 1
    return waiting / (virtual_pipeline * micro_batches + waiting)


def chunk_layers(model: LlamaConfig, layout: Layout, stage: int) -> list[int]:
    """Transformer layers of each chunk of a stage: chunk c of stage r is the (c p + r)-th part of the model."""
    slots = (model.num_layers + (2 if layout.count_embedding_and_loss else 0)) // layout.chunks
    layers = [slots] * layout.virtual_pipeline
    if layout.count_embedding_and_loss:
        layers[0] -= stage == 0
        layers[-1] -= stage == layout.pipeline - 1
    return layers


def passes_in_flight(layout: Layout, micro_batches: int, stage: int) -> int:
    """Forward passes of chunks whose activations a stage holds at its fullest."""
    p, v = layout.pipeline, layout.virtual_pipeline
    if v == 1:
        return min(p - stage, micro_batches)
    warm_up = 2 * (p - stage - 1) + (v - 1) * p
    return min(warm_up + 1, micro_batches * v)


def chunk_bf16_layers(model: LlamaConfig, layout: Layout, stage: int) -> list[int]:
    """Of `chunk_layers`, those among the first and last ones that an FP8 run keeps in BF16."""
    start, end = layout.bf16_layers_at_start, model.num_layers - layout.bf16_layers_at_end
    if not (start or layout.bf16_layers_at_end):
        return [0] * layout.virtual_pipeline
    found, ends_before = [], layout.count_embedding_and_loss
    slots = (model.num_layers + 2 * ends_before) // layout.chunks
    for chunk, layers in enumerate(chunk_layers(model, layout, stage)):
        part = chunk * layout.pipeline + stage
        first = part * slots - (ends_before and part > 0)
        found.append(sum(i < start or i >= end for i in range(first, first + layers)))
    return found


def chunk_passes_in_flight(layout: Layout, micro_batches: int, stage: int) -> list[int]:
    """Of each chunk, the passes whose activations a stage holds at its fullest.

    Interleaved, the warm-up runs p micro-batches through a chunk before it goes on to the next one.
    """
    p, v = layout.pipeline, layout.virtual_pipeline
    passes = passes_in_flight(layout, micro_batches, stage)
    if v == 1:
        return [passes]
    rounds, rest = divmod(passes, p * v)
    return [rounds * p + min(max(rest - chunk * p, 0), p) for chunk in range(v)]


def layers_in_flight(layers: list[int], passes: list[int]) -> int:
    """Layer activations (each of one micro-batch) held at the fullest: layers of each chunk, times its passes."""
    return sum(a * b for a, b in zip(layers, passes, strict=True))


def deciding_stages(layout: Layout) -> list[int]:
    """The stages of which one is the fullest and one the slowest: the two at either end; those between are alike."""
    p = layout.pipeline
    return sorted({0, min(1, p - 1), max(p - 2, 0), p - 1})


@dataclass(frozen=True)
class Pass:
    """One chunk's forward or backward pass of one micro-batch on one stage, with its time span."""

    stage: int
    chunk: int
    micro_batch: int
    forward: bool
    start: float
    end: float


def stage_order(layout: Layout, micro_batches: int, stage: int) -> Iterator[tuple[int, int, bool]]:
    """(chunk, micro-batch, is forward) in the order in which a stage runs them."""
    p, v = layout.pipeline, layout.virtual_pipeline
    total = micro_batches * v
    warm_up = min(total, p - stage - 1 if v == 1 else 2 * (p - stage - 1) + (v - 1) * p)
    for k in range(total + warm_up):
        if k < total:
            yield (*_chunk_of(k, p, v, forward=True), True)
        if k >= warm_up:
            yield (*_chunk_of(k - warm_up, p, v, forward=False), False)


def _chunk_of(k: int, p: int, v: int, forward: bool) -> tuple[int, int]:
    """Chunk and micro-batch of a stage's k-th forward or backward pass."""
    if v == 1:
        return 0, k
    group, place = divmod(k, p * v)
    chunk, within = divmod(place, p)
    return (chunk if forward else v - 1 - chunk), group * p + within


def timeline(layout: Layout, micro_batches: int, forward_s: float, backward_s: float) -> list[Pass]:
    """Every pass of a step with its time, each as early as its input and its stage allow; chunks of equal time.

    `micro_batches` must be a multiple of the pipeline size when chunks are interleaved.
    """
    orders = [list(stage_order(layout, micro_batches, r)) for r in range(layout.pipeline)]
    done: dict[tuple[int, int, bool], float] = {}
    places, clocks = [0] * layout.pipeline, [0.0] * layout.pipeline
    passes: list[Pass] = []
    while len(passes) < sum(map(len, orders)):
        for stage, order in enumerate(orders):
            while places[stage] < len(order):
                chunk, micro, forward = order[places[stage]]
                ready = _ready(layout, done, chunk * layout.pipeline + stage, micro, forward)
                if ready is None:
                    break
                start = max(clocks[stage], ready)
                clocks[stage] = start + (forward_s if forward else backward_s)
                done[chunk * layout.pipeline + stage, micro, forward] = clocks[stage]
                passes.append(Pass(stage, chunk, micro, forward, start, clocks[stage]))
                places[stage] += 1
    return passes


def _ready(
    layout: Layout, done: dict[tuple[int, int, bool], float], part: int, micro: int, forward: bool
) -> float | None:
    """When the input of a pass is there; None if what makes it has not run yet."""
    last = layout.chunks - 1
    if forward:
        return 0.0 if part == 0 else done.get((part - 1, micro, True))
    return done.get((last, micro, True)) if part == last else done.get((part + 1, micro, False))
