"""Curves and probe -> a verdict, a table, JSON and a picture."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coalm_nemo.fp8_check.variants import CONTROL_CHANGE, Variants

if TYPE_CHECKING:
    from coalm_nemo.fp8_check.probe import Probe

COMPARED_PART = 4
"""The last quarter of the steps is compared: its mean is less noisy than a step's loss."""
LOW_COSINE = 0.95
"""A matrix whose FP8 gradient points elsewhere than this is named."""


@dataclass(frozen=True)
class Curves:
    """Loss of every step; shorter than the others where a loss was not finite."""

    baseline: list[float]
    fp8: list[float]
    control: list[float] | None = None

    def gap(self, other: list[float] | None) -> float | None:
        """How much higher the other's mean loss over the last quarter is, relative; None where it did not get there."""
        steps = len(self.baseline)
        if not other or len(other) < steps:
            return None
        last = max(1, steps // COMPARED_PART)
        return sum(other[-last:]) / sum(self.baseline[-last:]) - 1


@dataclass(frozen=True)
class Verdict:
    """One word, and why."""

    passed: bool
    word: str
    """pass | within noise | fail"""
    reason: str


def judge(curves: Curves, tolerance: float) -> Verdict:
    """Pass where FP8's loss is within `tolerance` of the baseline's, or below it.

    A gap above it that a change of a thousandth in the learning rate makes as well says nothing about FP8: then more
    steps are needed, and the gate does not pass.
    """
    gap, noise = curves.gap(curves.fp8), curves.gap(curves.control)
    if gap is None:
        return Verdict(False, "fail", f"the FP8 loss was not finite at step {len(curves.fp8) + 1}")
    said = f"the FP8 loss is {gap:+.2%} from the baseline's over the last {1 / COMPARED_PART:.0%} of the steps"
    if gap <= tolerance:
        return Verdict(True, "pass", f"{said}; {tolerance:.2%} is allowed")
    if noise is not None and abs(noise) >= abs(gap) / 2:
        return Verdict(False, "within noise", f"{said}, and noise alone moves it by {noise:+.2%}: run more --steps")
    return Verdict(False, "fail", f"{said}; {tolerance:.2%} is allowed")


def write_result(variants: Variants, curves: Curves, found: Probe, out: Path, tolerance: float) -> int:
    """fp8_check.json and fp8_check.png in `out`, the table on the screen; the exit code."""
    from coalm_nemo.fp8_check.picture import draw

    verdict = judge(curves, tolerance)
    layers = by_matrix(found)
    result = {
        "verdict": verdict.word,
        "reason": verdict.reason,
        "baseline": variants.baseline.precision.dtype,
        "fp8": variants.fp8.precision.dtype,
        "steps": variants.fp8.train.steps,
        "loss_gap": curves.gap(curves.fp8),
        "noise": curves.gap(curves.control),
        "tolerance": tolerance,
        "losses": vars(curves),
        "matrices": layers,
    }
    out.mkdir(parents=True, exist_ok=True)
    draw(result, out / "fp8_check.png")
    partial = out / ".fp8_check.json"
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(out / "fp8_check.json")
    _print(result, out)
    return 0 if verdict.passed else 1


def by_matrix(found: Probe) -> dict[str, dict[str, Any]]:
    """`layer:path` -> cosine of the gradients, ratio of their norms, relative error and flushed part of each cast."""
    names = sorted(found.casts, key=lambda n: (int(n.split(":")[0]), n))
    result: dict[str, dict[str, Any]] = {}
    for name in names:
        alignment = found.gradients.get(name)
        size = (alignment.fp8 / alignment.baseline) ** 0.5 if alignment and alignment.baseline else None
        result[name] = {
            "gradient_cosine": alignment.cosine if alignment else None,
            "gradient_norm_ratio": size,
            **{f"{part}_error": error.relative for part, error in found.casts[name].items()},
            **{f"{part}_flushed": e.flushed / max(e.elements, 1) for part, e in found.casts[name].items()},
        }
    return result


def _print(result: dict[str, Any], out: Path) -> None:
    print(f"\n{'matrix':38} {'cosine':>8} {'norm':>7}   relative error of the cast: input, weight, gradient")
    for name, m in result["matrices"].items():
        cosine = (
            f"{m['gradient_cosine']:8.5f} {m['gradient_norm_ratio'] or 0:7.4f}" if m["gradient_cosine"] else " " * 16
        )
        print(f"{name:38} {cosine}   {m['input_error']:7.3%} {m['weight_error']:7.3%} {m['gradient_error']:7.3%}")
    low = [n for n, m in result["matrices"].items() if (m["gradient_cosine"] or 1) < LOW_COSINE]
    if low:
        print(
            f"gradients below a cosine of {LOW_COSINE}: {', '.join(low)}; precision.bf16_layers_at_start and "
            "bf16_layers_at_end keep a layer out of FP8"
        )
    if result["noise"] is not None:
        print(f"noise: a learning rate {CONTROL_CHANGE:.1%} higher moves the baseline's loss by {result['noise']:+.2%}")
    print(f"{result['fp8']} against {result['baseline']}, {result['steps']} steps")
    print(f"{result['verdict'].upper()}: {result['reason']}")
    print(f"{out / 'fp8_check.json'}, {out / 'fp8_check.png'}")
