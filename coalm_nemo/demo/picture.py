"""The demo in one picture: the loss over steps, and what is right before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coalm_nemo.demo.score import METRICS, SPLIT_NAMES
from coalm_nemo.training.callbacks.metrics_file import read_steps

AXIS_LABELS = {"combinations": "unseen\ncombi-\nnations", "words": "unseen\nwords", "names": "unseen\nreal\nnames"}
BEFORE, AFTER, GRID = "#b8bec6", "#2f6db5", "#e4e7eb"


def draw_result(metrics: Path, result: dict[str, Any], path: Path) -> Path:
    """Write a PNG; returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), constrained_layout=True, width_ratios=(1, 1.25))
    draw_loss(left, metrics)
    draw_scores(right, result)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def draw_loss(axes: Any, metrics: Path) -> None:
    """Loss of each step, thin, and its running mean, thick; a logarithmic axis shows the late gains too."""
    steps = read_steps(metrics)
    numbers, losses = [s["step"] for s in steps], [s["lm_loss"] for s in steps]
    axes.plot(numbers, losses, color=AFTER, alpha=0.25, linewidth=0.8)
    axes.plot(numbers, running_mean(losses), color=AFTER, linewidth=2)
    axes.set_yscale("log")
    axes.set_title("loss on supervised tokens", loc="left")
    axes.set_xlabel("step")
    axes.grid(color=GRID)


def running_mean(values: list[float], keep: float = 0.9) -> list[float]:
    """Exponential mean, corrected for its start as Adam's moments are."""
    out, mean = [], 0.0
    for count, value in enumerate(values, 1):
        mean = keep * mean + (1 - keep) * value
        out.append(mean / (1 - keep**count))
    return out


def draw_scores(axes: Any, result: dict[str, Any]) -> None:
    """Bars in pairs, before and after, a group a metric."""
    bars = [(metric, split) for metric in METRICS for split in SPLIT_NAMES]
    places = [i + 0.7 * (i // len(SPLIT_NAMES)) for i in range(len(bars))]
    for name, color, shift in (("before", BEFORE, -0.2), ("after", AFTER, 0.2)):
        heights = [result[name][split][metric]["percent"] for metric, split in bars]
        drawn = axes.bar([p + shift for p in places], heights, width=0.38, color=color, label=name)
        axes.bar_label(drawn, fmt="%.0f", fontsize=8, color="#444444")
    axes.set_xticks(places, [AXIS_LABELS[s] for _, s in bars], fontsize=8)
    for group, label in enumerate(METRICS.values()):
        middle = places[group * len(SPLIT_NAMES) + 1]
        axes.text(middle, 109, label, ha="center", fontsize=10)
    axes.set_ylim(0, 116)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("% right, held-out dialogues")
    axes.grid(axis="y", color=GRID)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
