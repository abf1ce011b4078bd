"""All legal layouts of a job, those that fit ranked by predicted tokens/s/GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product

from coalm_nemo.planning.constants import Constants, fitted
from coalm_nemo.planning.costs import step_time
from coalm_nemo.planning.estimate import SPARE_GB, Estimate
from coalm_nemo.planning.hardware import GIB
from coalm_nemo.planning.job import Job, Layout
from coalm_nemo.planning.legality import why_illegal
from coalm_nemo.planning.memory import Memory, memory

WIDTHS = (1, 2, 4, 8)
"""Sizes tried for tensor and context parallelism: tensor parallelism stays inside a node."""
MAX_PIPELINE = 32
FORMS = tuple(product(("none", "selective", "full"), (4, 2), (True, False)))
"""(recompute, bytes a moment, distributed optimizer), what changes least first: a split takes the first that fits."""


@dataclass
class Found:
    """What a search saw."""

    fitting: list[Estimate] = field(default_factory=list)
    """Best first."""
    too_large: list[Estimate] = field(default_factory=list)
    """In their smallest form; what lacks least first."""
    illegal: Counter[str] = field(default_factory=Counter)
    """Splits by the rule they break."""
    forms: list[Estimate] = field(default_factory=list)
    """The best split in every form."""


def search(job: Job, base: Layout | None = None, micro_batch: int = 0, constants: Constants | None = None) -> Found:
    """Every legal layout of a job. `base` says what is not searched (precision of gradients, FP8 parameters, ...)."""
    found, values = Found(), constants or fitted()
    for split in splits(job, base or Layout(), micro_batch):
        if reason := why_illegal(job, split):
            found.illegal[_rule(reason)] += 1
            continue
        estimate = _smallest_change(job, split, values)
        (found.fitting if estimate.fits else found.too_large).append(estimate)
    found.fitting.sort(key=lambda e: -e.tokens_per_s_per_gpu)
    found.too_large.sort(key=lambda e: -e.spare)
    if found.fitting:
        found.forms = [_estimate(job, form, values) for form in forms(job, found.fitting[0].layout)]
    return found


def splits(job: Job, base: Layout, micro_batch: int = 0) -> Iterator[Layout]:
    """Splits over tensor, pipeline (and chunks), context and micro-batch; packed rows come one pack a pass."""
    micro_sizes = (micro_batch,) if micro_batch else ((1, 2, 4) if job.task == "pretrain" else (1,))
    for tensor in WIDTHS:
        for context in WIDTHS:
            for pipeline, virtual, counted in _pipelines(job, job.gpus // (tensor * context)):
                for micro in micro_sizes:
                    yield replace(
                        base,
                        tensor=tensor,
                        context=context,
                        pipeline=pipeline,
                        virtual_pipeline=virtual,
                        count_embedding_and_loss=counted,
                        micro_batch=micro,
                    )


def _pipelines(job: Job, most: int) -> Iterator[tuple[int, int, bool]]:
    """(pipeline, virtual pipeline, embedding and loss counted) that the layers divide by."""
    for pipeline in range(1, min(most, MAX_PIPELINE) + 1):
        for counted in (False, True) if pipeline > 1 else (False,):
            slots = job.model.num_layers + 2 * counted
            if slots % pipeline:
                continue
            each = slots // pipeline
            for virtual in range(1, each + 1) if pipeline > 1 else (1,):
                same_as_uncounted = counted and pipeline * virtual == 2
                if each % virtual == 0 and not same_as_uncounted:
                    yield pipeline, virtual, counted


def forms(job: Job, split: Layout) -> Iterator[Layout]:
    """A split with every recomputation, precision of moments, and with or without the distributed optimizer.

    BF16 moments and FP8 parameters are the distributed optimizer's; under LoRA there is too little to optimize for either
    to matter.
    """
    for recompute, moment_bytes, distributed in FORMS:
        if (moment_bytes == 2 and not (job.trains_all and distributed)) or (not job.trains_all and not distributed):
            continue
        yield replace(
            split,
            recompute=recompute,
            moment_bytes=moment_bytes,
            distributed_optimizer=distributed,
            fp8_params=split.fp8_params and distributed,
        )


def _smallest_change(job: Job, split: Layout, constants: Constants) -> Estimate:
    """The split in the first form that fits, else in its smallest."""
    smallest: tuple[float, Layout, Memory] | None = None
    for layout in forms(job, split):
        needed = memory(job, layout)
        if job.gpu.memory - needed.worst.total >= SPARE_GB * GIB:
            return Estimate(job, layout, needed, step_time(job, layout, constants))
        if smallest is None or needed.worst.total < smallest[0]:
            smallest = needed.worst.total, layout, needed
    assert smallest is not None
    return Estimate(job, smallest[1], smallest[2], step_time(job, smallest[1], constants))


def _estimate(job: Job, layout: Layout, constants: Constants) -> Estimate:
    return Estimate(job, layout, memory(job, layout), step_time(job, layout, constants))


def _rule(reason: str) -> str:
    """The reason without its numbers, so that splits can be counted by it."""
    return " ".join(w for w in reason.replace("=", " = ").split() if not w.isdecimal() and w != "=")
