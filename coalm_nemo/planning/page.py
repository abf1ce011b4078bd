"""A plan in words: what was asked, a line a layout, memory by stage, time by cause."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from coalm_nemo.planning.estimate import SPARE_GB, Estimate
from coalm_nemo.planning.explain import CAUSES, PARTS, shares, why
from coalm_nemo.planning.hardware import GIB
from coalm_nemo.planning.job import Job
from coalm_nemo.planning.memory import stage_memory
from coalm_nemo.planning.search import Found


def parts_table(e: Estimate) -> Iterator[str]:
    """Memory of a layout by part, a line a pipeline stage."""
    yield f"memory of {e.layout.short()} by part and pipeline stage, GiB"
    yield "stage  " + "  ".join(f"{words:>{max(len(words), 5)}}" for words in PARTS.values()) + "  total  spare"
    for stage in range(e.layout.pipeline):
        parts = stage_memory(e.job, e.layout, stage)
        cells = [f"{getattr(parts, name) / GIB:>{max(len(words), 5)}.1f}" for name, words in PARTS.items()]
        total = parts.total / GIB
        yield f"{stage:>5}  " + "  ".join(cells) + f"  {total:>5.1f}  {e.job.gpu.memory / GIB - total:>5.1f}"


def time_table(e: Estimate) -> Iterator[str]:
    """Seconds of a step by cause."""
    yield f"a step of {e.time.total:.2f} s, by cause"
    for name, words in CAUSES.items():
        if getattr(e.time, name):
            yield f"    {words:<18} {getattr(e.time, name):>7.3f} s {shares(e.time)[name]:>6.1%}"


def page(job: Job, listed: Sequence[Estimate]) -> Iterator[str]:
    """The plan as lines: what was asked, and a table."""
    yield (
        f"{job.name} {job.task} {job.precision} on {job.gpus} {job.gpu.name}: {job.global_batch} sequences of "
        f"{job.seq_len_tokens} tokens a step; memory in GiB on the fullest stage of {job.gpu.memory / GIB:.1f}"
    )
    yield ""
    names = [e.layout.short() for e in listed]
    width = max(map(len, names))
    yield f"{'layout':<{width}}  tokens/s/GPU  step s bubble memory spare         epoch  why"
    for name, e in zip(names, listed, strict=True):
        hours = e.epoch_gpu_hours
        yield (
            f"{name:<{width}}  {e.tokens_per_s_per_gpu:>12.0f} {e.time.total:>7.2f} {e.bubble_fraction:>6.1%} "
            f"{e.memory.worst.total / GIB:>6.1f} {e.spare / GIB:>5.1f} {hours / job.gpus:>5.2f}h {hours:>4.0f}GPUh  "
            f"{why(e, listed[0])}"
        )


def nothing_fits(job: Job, found: Found) -> str:
    """One sentence: what is nearest, or why nothing is legal."""
    where = f"{job.gpus} {job.gpu.name}"
    if found.too_large:
        nearest = max(found.too_large, key=lambda e: e.spare)
        return (
            f"no layout of {job.name} fits on {where} with {SPARE_GB:g} GB to spare; the nearest, "
            f"{nearest.layout.short()}, {why(nearest, nearest)}: use more GPUs, LoRA or shorter sequences"
        )
    rules = [rule for rule, _ in found.illegal.most_common()]
    other = [rule for rule in rules if not rule.startswith("GPUs do not divide")]  # of which some always are
    rule = (other or rules or ["nothing divides"])[0]
    return (
        f"no layout of {job.name} is legal on {where} with a global batch of {job.global_batch} ({rule}); "
        "change --gpus, --global-batch or --seq-len-tokens"
    )
