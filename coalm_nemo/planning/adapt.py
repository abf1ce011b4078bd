"""A recipe on another number of GPUs: its layout found again by the planner, its hyperparameters as they are."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from coalm_nemo.config import RunConfig
from coalm_nemo.errors import UserError
from coalm_nemo.models.llama import LlamaConfig
from coalm_nemo.planning.command import PlanRequest, changes_of, layout_of, make_job
from coalm_nemo.planning.estimate import Estimate, estimate
from coalm_nemo.planning.explain import PARTS
from coalm_nemo.planning.hardware import GIB
from coalm_nemo.planning.page import nothing_fits
from coalm_nemo.planning.search import search

PRECISIONS = ("bf16", "fp8_current", "fp8_blockwise", "fp8_delayed", "fp8_scaled_mm")
"""What the planner has peaks for; it counts every kind of FP8 as current scaling."""


def expected(
    run: RunConfig, llama: LlamaConfig, gpus: int, gpu: str = "h100-80gb", attended: float = 0.0
) -> Estimate | None:
    """What the planner says of a run on `gpus`; None in a precision it knows no peak of (fp32, emulated FP8)."""
    if run.precision.dtype not in PRECISIONS:
        return None
    request = PlanRequest(gpus, gpu=gpu, attended_tokens=attended)
    return estimate(make_job(request, run, llama), layout_of(run))


def expected_lines(e: Estimate) -> Iterator[str]:
    """Memory by part and speed of a run, as it is told before it starts."""
    causal, full = e.both_mfu
    epoch = "an epoch of CoALM-IT" if e.job.packed else "an epoch of CoALM-IT, if every row were padded in full"
    yield (
        f"expected speed: {e.tokens_per_s_per_gpu:,.0f} tokens/s/GPU, {e.time.total:.2f} s a step, bubble "
        f"{e.bubble_fraction:.1%}, MFU {causal:.1%} (attention in full: {full:.1%})"
    )
    yield f"expected time: {epoch}: {e.epoch_gpu_hours:,.0f} GPU-hours, {e.epoch_gpu_hours / e.job.gpus:.2f} h"
    stages = {0: e.memory.first, e.memory.worst_stage: e.memory.worst}
    for stage, parts in stages.items():
        named = ", ".join(f"{words} {getattr(parts, name) / GIB:.1f}" for name, words in PARTS.items())
        which = "the fullest stage, " if stage == e.memory.worst_stage else "stage "
        total = f"{parts.total / GIB:.1f} of {e.job.gpu.memory / GIB:.1f}"
        yield f"expected memory, GiB, on {which}{stage}: {named}; in all {total}"


def adapt(run: RunConfig, own: RunConfig, laid_out_for: tuple[int, ...], gpus: int) -> tuple[RunConfig, list[str]]:
    """`run` for `gpus` GPUs, and what was done and why.

    A layout that the caller chose (it is not `own`, the recipe's) stays; so does the recipe's on the GPUs it is for.
    The global batch stays too: another one is another training. Raises UserError where nothing fits.
    """
    if not laid_out_for or gpus in laid_out_for:
        return run, []
    usual = ", ".join(map(str, laid_out_for))
    if (run.parallel, run.batch.micro_size, run.train.recompute) != (
        own.parallel,
        own.batch.micro_size,
        own.train.recompute,
    ):
        return run, [f"layout: as given; the recipe's own is for {usual} GPUs"]
    found = search(make_job(PlanRequest(gpus), run), layout_of(run))
    if not found.fitting:
        raise UserError(nothing_fits(make_job(PlanRequest(gpus), run), found))
    best = found.fitting[0]
    changed = copy.deepcopy(run)
    for key, value in changes_of(best).items():
        section, name = key.split(".")
        setattr(getattr(changed, section), name, value)
    notes = [
        f"layout: {best.layout.short()}, found by the planner: the recipe's own is for {usual} GPUs, and this is the fastest "
        f"of {len(found.fitting)} that fit on {gpus}"
    ]
    return changed, [*notes, *_larger_batch(run, best, laid_out_for[-1])]


def _larger_batch(run: RunConfig, best: Estimate, usual_gpus: int) -> Iterator[str]:
    """What the batch that grows with the GPUs would bring, where that is more than a tenth."""
    gpus = best.job.gpus
    batch = run.batch.global_size * gpus // usual_gpus
    if batch <= run.batch.global_size:
        return
    more = search(make_job(PlanRequest(gpus, global_batch=batch), run), layout_of(run)).fitting
    if more and more[0].tokens_per_s_per_gpu > 1.1 * best.tokens_per_s_per_gpu:
        yield (
            f"batch: {run.batch.global_size}, the recipe's, gives {best.tokens_per_s_per_gpu:.0f} tokens/s/GPU; "
            f"batch.global_size={batch} would give {more[0].tokens_per_s_per_gpu:.0f} ({more[0].layout.short()})"
        )
