"""The check on one page: both losses, their gap, and what the casts lose in each matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SMOOTHED_PART = 20
"""Losses are drawn as means over a twentieth of the steps, and each step faintly behind."""


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
        losses = result["losses"][name]
        steps = range(1, len(losses) + 1)
        axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.7)
        axes.plot(steps, _smooth(losses, window), color=colour, label=result[name])
    axes.set(title="loss", xlabel="step", yscale="log")
    for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        which("{x:g}")
    axes.legend()


def _gap(axes: Any, result: dict[str, Any]) -> None:
    window = max(1, result["steps"] // SMOOTHED_PART)
    base = _smooth(result["losses"]["baseline"], window)
    for name, colour, label in (("fp8", "tab:orange", result["fp8"]), ("control", "tab:gray", "control (noise)")):
        losses = result["losses"].get(name)
        if losses:
            pairs = zip(_smooth(losses, window), base, strict=False)
            axes.plot(range(1, len(losses) + 1), [100 * (a / b - 1) for a, b in pairs], color=colour, label=label)
    for side in (-1, 1):
        axes.axhline(side * 100 * result["tolerance"], color="tab:red", linestyle=":", linewidth=1)
    axes.set(title="loss against the baseline's (dotted: allowed)", xlabel="step", ylabel="%")
    axes.legend()


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
