"""The check on one page: both losses, their gap, and what the casts lose in each matrix."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

SMOOTHED_PART = 20
"""Losses are drawn as means over a twentieth of the steps; of one seed, each step faintly behind."""


def draw(result: dict[str, Any], path: Path) -> None:
    """PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ((loss, gap), (cosine, cast)) = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    figure.suptitle(
        f"{result['fp8']} against {result['baseline']}: {result['verdict']}\n{result['reason']}", fontsize=11
    )
    _losses(loss, result)
    _gap(gap, result)
    _by_matrix(
        cosine, result, {"gradient_cosine": "cosine of FP8's and the baseline's gradient"}, "cosine, first batch"
    )
    parts = {f"{p}_error": p for p in ("input", "weight", "gradient")}
    _by_matrix(cast, result, parts, "relative error of the cast to FP8")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _smooth(losses: list[float], window: int) -> list[float]:
    return [sum(losses[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(losses))]


def _losses(axes: Any, result: dict[str, Any]) -> None:
    window = max(1, result["steps"] // SMOOTHED_PART)
    for name, colour in (("baseline", "tab:blue"), ("fp8", "tab:orange")):
        for number, seed in enumerate(result["seeds"]):
            losses = seed[name]["losses"]
            steps = range(1, len(losses) + 1)
            if len(result["seeds"]) == 1:
                axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.7)
            label = None if number else result[name]
            axes.plot(steps, _smooth(losses, window), color=colour, label=label, linewidth=1.2)
    axes.set(title="loss", xlabel="step", yscale="log")
    for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        which("{x:g}")
    axes.legend()


def _gap(axes: Any, result: dict[str, Any]) -> None:
    seeds = result["seeds"]
    ours = [_gap_curve(seed, "fp8", result["steps"]) for seed in seeds]
    if len(seeds) > 1:
        for curve in ours:
            axes.plot(range(1, len(curve) + 1), curve, color="tab:orange", alpha=0.25, linewidth=0.7)
        mean = [statistics.mean(values) for values in zip(*ours, strict=False)]
        axes.plot(
            range(1, len(mean) + 1), mean, color="tab:orange", label=f"{result['fp8']}, mean of {len(seeds)} seeds"
        )
    else:
        axes.plot(range(1, len(ours[0]) + 1), ours[0], color="tab:orange", label=result["fp8"])
        if seeds[0]["control"]:
            control = _gap_curve(seeds[0], "control", result["steps"])
            axes.plot(range(1, len(control) + 1), control, color="tab:gray", label="control (noise)")
    for side in (-1, 1):
        axes.axhline(side * 100 * result["tolerance"], color="tab:red", linestyle=":", linewidth=1)
    axes.set(title="loss against the baseline's, while training", xlabel="step", ylabel="%")
    axes.legend()


def _gap_curve(seed: dict[str, Any], name: str, steps: int) -> list[float]:
    """Percent that the smoothed loss is above the baseline's, step by step."""
    window = max(1, steps // SMOOTHED_PART)
    pairs = zip(_smooth(seed[name]["losses"], window), _smooth(seed["baseline"]["losses"], window), strict=False)
    return [100 * (a / b - 1) for a, b in pairs]


def _by_matrix(axes: Any, result: dict[str, Any], fields: dict[str, str], title: str) -> None:
    matrices = result["matrices"]
    kinds = sorted({name.partition(":")[2] for name in matrices})
    for number, kind in enumerate(kinds):
        layers = {int(n.partition(":")[0]): m for n, m in matrices.items() if n.endswith(f":{kind}")}
        for (field, label), style in zip(fields.items(), ("-", "--", ":"), strict=False):
            points = [(layer, m[field]) for layer, m in layers.items() if m[field] is not None]
            text = kind.rpartition(".")[2] + (f", {label}" if len(fields) > 1 else "")
            axes.plot(
                *zip(*points, strict=True) if points else ([], []), style, marker=".", color=f"C{number}", label=text
            )
    axes.set(title=title, xlabel="layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=7, ncol=2)
