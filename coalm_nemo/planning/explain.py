"""Why a layout is where it is: one line each, from the same numbers that ranked it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from coalm_nemo.planning.costs import StepTime
from coalm_nemo.planning.estimate import SPARE_GB, Estimate
from coalm_nemo.planning.hardware import GIB
from coalm_nemo.planning.memory import Parts
from coalm_nemo.planning.search import Found

CAUSES = {
    "linear": "matrix products",
    "attention": "attention",
    "elementwise": "memory traffic",
    "head": "vocabulary head",
    "tensor_comm": "TP communication",
    "context_comm": "CP communication",
    "pipeline_comm": "stage hand-over",
    "pass_overhead": "chunk passes",
    "bubble": "bubble",
    "data_comm": "DP communication",
    "optimizer": "optimizer",
}
"""StepTime's fields in words."""
PARTS = {
    "weights": "weights",
    "fp8_copies": "FP8 copies",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "logits": "logits",
    "work": "work",
    "overlap": "TP overlap",
    "nccl": "NCCL",
    "fragmentation": "fragmentation",
    "cuda": "CUDA",
}
"""Parts' fields in words."""


def shares(time: StepTime) -> dict[str, float]:
    """Part of the step by cause."""
    return {name: getattr(time, name) / time.total for name in CAUSES}


def why_best(best: Estimate) -> str:
    """What the step is spent on besides arithmetic."""
    found = shares(best.time)
    useful = found.pop("linear") + found.pop("attention")
    largest = sorted(found.items(), key=lambda item: -item[1])[:3]
    return f"{useful:.0%} arithmetic; then " + ", ".join(f"{CAUSES[n]} {v:.1%}" for n, v in largest)


def why_slower(other: Estimate, best: Estimate) -> str:
    """What costs the other layout more time a token than the best one."""
    other_recompute = (
        f" (recompute {other.layout.recompute})" if other.layout.recompute != best.layout.recompute else ""
    )
    slower, colon, causes = _what_costs(other, best).partition(":")
    return slower + other_recompute + colon + causes


def _what_costs(other: Estimate, best: Estimate) -> str:
    slower = other.time.total / best.time.total - 1
    more = {n: (getattr(other.time, n) - getattr(best.time, n)) / best.time.total for n in CAUSES}
    largest = [n for n in sorted(more, key=lambda n: -more[n]) if more[n] >= 0.001][:2]
    named = ", ".join(f"{CAUSES[n]} +{more[n]:.1%}" for n in largest)
    return f"{slower:.1%} slower: {named}" if named else f"{slower:.1%} slower"


def why_too_large(estimate: Estimate) -> str:
    """By how much it misses, and what the memory goes to."""
    parts = estimate.memory.worst
    largest = sorted((f.name for f in fields(Parts)), key=lambda n: -getattr(parts, n))[:2]
    named = ", ".join(f"{PARTS[n]} {getattr(parts, n) / GIB:.0f}" for n in largest)
    missing = SPARE_GB - estimate.spare / GIB
    return f"needs {missing:.1f} GB more than there is with {SPARE_GB:g} GB to spare ({named})"


def why(estimate: Estimate, best: Estimate) -> str:
    """One line about a layout of a ranked list."""
    if not estimate.fits:
        return why_too_large(estimate)
    return why_best(estimate) if estimate is best else why_slower(estimate, best)


def why_form(form: Estimate, best: Estimate) -> str:
    """One line about another form of the best split: how it differs, and why it is not taken."""
    changed = {
        "recompute": f"recompute {form.layout.recompute}",
        "moment_bytes": f"{'BF16' if form.layout.moment_bytes == 2 else 'FP32'} moments",
        "distributed_optimizer": f"{'distributed' if form.layout.distributed_optimizer else 'whole'} optimizer",
        "fp8_params": f"{'FP8' if form.layout.fp8_params else 'BF16'} parameters",
    }
    named = [words for name, words in changed.items() if getattr(form.layout, name) != getattr(best.layout, name)]
    if not form.fits:
        return f"{', '.join(named)}: {why_too_large(form)}"
    faster = best.time.total / form.time.total - 1
    kept = f"{faster:.1%} faster, but what changes least is kept" if faster > 0.0005 else _what_costs(form, best)
    return f"{', '.join(named)}: {kept}"


def why_others(found: Found, listed: int) -> Iterator[str]:
    """What became of the layouts that are not listed."""
    if len(found.fitting) > listed:
        last = found.fitting[-1]
        yield f"{len(found.fitting) - listed} more fit and are slower, down to {last.tokens_per_s_per_gpu:.0f} tokens/s/GPU"
    best = found.fitting[0] if found.fitting else None
    if best:
        yield f"the best one in its other forms; {len(found.forms)} are tried in turn, and the first that fits is taken:"
        yield from (f"    {why_form(form, best)}" for form in found.forms if form.layout != best.layout)
    faster = [e for e in found.too_large if best is None or e.tokens_per_s_per_gpu > best.tokens_per_s_per_gpu]
    if found.too_large:
        yield f"not fitting in any form: {len(found.too_large)}, of which {len(faster)} would be faster"
    for e in sorted(faster, key=lambda e: -e.tokens_per_s_per_gpu)[:3] or found.too_large[:3]:
        yield f"    {e.layout.short()}: {why_too_large(e)}"
    for rule, count in found.illegal.most_common(3):
        yield f"not legal ({count}): {rule}"
