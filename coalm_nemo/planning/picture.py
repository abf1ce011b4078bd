"""The plan as a picture: memory of each layout against the card, and the best one's pipeline over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coalm_nemo.planning.estimate import Estimate
from coalm_nemo.planning.explain import PARTS
from coalm_nemo.planning.hardware import GIB
from coalm_nemo.planning.pipeline import timeline

COLORS = (
    "#1f4e79", "#4a86c5", "#7fb2e5", "#b9d6f2", "#e08e45", "#c0504d", "#8064a2", "#5b8c5a", "#a8c686", "#9aa3ad", "#d5d9de"
)  # fmt: skip
FORWARD, BACKWARD, GRID, LIMIT = "#4a86c5", "#e08e45", "#e4e7eb", "#c0392b"
MOST_ROUNDS = 2
"""Rounds of micro-batches (one a stage) in the timeline; the middle of a long step looks the same throughout."""


def draw_plan(estimates: Sequence[Estimate], path: Path) -> Path:
    """Write a PNG; returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    height = 2.6 + 0.32 * len(estimates) + 0.3 * estimates[0].layout.pipeline
    ratios = (1.2 + 0.32 * len(estimates), 1.0 + 0.3 * estimates[0].layout.pipeline)
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(12, height), constrained_layout=True, height_ratios=ratios)
    draw_memory(top, estimates)
    draw_timeline(bottom, estimates[0])
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def draw_memory(axes: Any, estimates: Sequence[Estimate]) -> None:
    """A bar a layout: the fullest stage by part, and the card's memory as a line."""
    names = [f"{e.layout.short()}   {e.tokens_per_s_per_gpu:.0f} tokens/s/GPU" for e in estimates]
    left = [0.0] * len(estimates)
    for (part, label), color in zip(PARTS.items(), COLORS, strict=True):
        widths = [getattr(e.memory.worst, part) / GIB for e in estimates]
        axes.barh(range(len(estimates)), widths, left=left, color=color, label=label, height=0.7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    limit = estimates[0].job.gpu.memory / GIB
    axes.axvline(limit, color=LIMIT, linewidth=1.5)
    axes.text(limit, -0.75, f"{estimates[0].job.gpu.name}: {limit:.1f} GiB", color=LIMIT, ha="right", va="bottom")
    axes.set_yticks(range(len(estimates)), names)
    axes.invert_yaxis()
    axes.set_xlabel("GiB on the fullest pipeline stage")
    axes.grid(color=GRID, axis="x")
    axes.figure.legend(loc="outside upper center", ncols=(len(PARTS) + 1) // 2, frameon=False)


def draw_timeline(axes: Any, best: Estimate) -> None:
    """Forward and backward passes of each stage; shades are chunks, white is waiting."""
    layout = best.layout
    shown = min(layout.micro_batches(best.job), MOST_ROUNDS * layout.pipeline)
    for one in timeline(layout, shown, 1.0, 2.0):
        shade = 1 - 0.65 * one.chunk / max(layout.virtual_pipeline, 1)
        color = FORWARD if one.forward else BACKWARD
        axes.barh(one.stage, one.end - one.start, left=one.start, color=color, alpha=shade, height=0.85, linewidth=0)
    axes.set_yticks(range(layout.pipeline), [f"stage {r}" for r in range(layout.pipeline)])
    axes.invert_yaxis()
    axes.set_xlabel("time, in forward passes of one chunk")
    total = layout.micro_batches(best.job)
    some = f"drawn with {shown} of its {total} micro-batches" if shown < total else f"{total} micro-batches"
    bubble = f"bubble of the whole step {best.bubble_fraction:.1%}"
    axes.set_title(f"{layout.short()}\n{some}; {bubble}\nforward blue, backward orange, a shade a chunk", loc="left")
