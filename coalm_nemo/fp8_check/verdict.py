"""Runs and probe -> a verdict, a table, JSON and a picture."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coalm_nemo.fp8_check.variants import CONTROL_CHANGE, Variants

if TYPE_CHECKING:
    from coalm_nemo.fp8_check.probe import Probe

COMPARED_PART = 4
"""Trained weights are measured on the last quarter's rows: the loss of a step is noisier, and of other weights each time."""
LOW_COSINE = 0.95
"""A matrix whose FP8 gradient points elsewhere than this is named."""


@dataclass(frozen=True)
class Trained:
    """One run."""

    losses: list[float]
    """Of every step; shorter than asked for where one was not finite."""
    after: float | None
    """Loss of the trained weights, in the run's own precision, on the last quarter's rows; None where it did not end."""


@dataclass(frozen=True)
class Runs:
    """The runs of one seed."""

    baseline: Trained
    fp8: Trained
    control: Trained | None = None
    seed: int = 0

    def gap(self, other: Trained | None) -> float | None:
        """How much higher the other's loss is after training, relative; None where it did not get there."""
        if other is None or other.after is None or self.baseline.after is None:
            return None
        return other.after / self.baseline.after - 1


def rows_measured(steps: int) -> range:
    """The steps whose batches the trained weights are measured on."""
    return range(steps - max(1, steps // COMPARED_PART), steps)


@dataclass(frozen=True)
class Verdict:
    """One word, and why."""

    passed: bool
    word: str
    """pass | within noise | fail"""
    reason: str


@dataclass(frozen=True)
class Gap:
    """How much higher FP8's loss is, relative, and how much of that means nothing."""

    mean: float
    """Over the seeds."""
    noise: float | None
    """Standard error of the mean; with one seed, what the control moved the loss by. None: not measured."""
    seeds: int

    def __str__(self) -> str:
        error = f" +- {self.noise:.2%} (standard error of {self.seeds} seeds)" if self.seeds > 1 else ""
        return f"{self.mean:+.2%}{error}"


def measure_gap(pairs: list[Runs]) -> Gap | None:
    """None where a run did not get to its end."""
    gaps = [runs.gap(runs.fp8) for runs in pairs]
    found = [g for g in gaps if g is not None]
    if len(found) < len(pairs):
        return None
    if len(found) == 1:
        return Gap(found[0], pairs[0].gap(pairs[0].control), 1)
    return Gap(statistics.mean(found), statistics.stdev(found) / len(found) ** 0.5, len(found))


def judge(pairs: list[Runs], tolerance: float) -> Verdict:
    """Pass where FP8's loss is within `tolerance` of the baseline's, or below it; `pairs`: one a seed.

    A gap above it that noise makes as well (a change of a thousandth in the learning rate; with several seeds, twice
    the standard error) says nothing about FP8: then more steps or seeds are needed, and the gate does not pass.
    """
    gap = measure_gap(pairs)
    if gap is None:
        return Verdict(False, "fail", _lost(pairs))
    said = f"after training the FP8 loss is {gap} from the baseline's"
    if gap.mean <= tolerance:
        return Verdict(True, "pass", f"{said}; {tolerance:.2%} is allowed")
    if gap.noise is not None and abs(gap.noise) >= abs(gap.mean) / 2:
        if gap.seeds > 1:
            return Verdict(False, "within noise", f"{said}, which may be noise alone: run more --seeds")
        return Verdict(
            False, "within noise", f"{said}, and noise alone moves it by {gap.noise:+.2%}: run more --steps or --seeds"
        )
    return Verdict(False, "fail", f"{said}; {tolerance:.2%} is allowed")


def _lost(pairs: list[Runs]) -> str:
    """Which run did not get to its end."""
    runs = next(runs for runs in pairs if runs.gap(runs.fp8) is None)
    seed = f" (seed {runs.seed})" if len(pairs) > 1 else ""
    if runs.baseline.after is None:
        step = len(runs.baseline.losses) + 1
        return f"the baseline's own loss was not finite at step {step}{seed}: the run diverges without FP8"
    return f"the FP8 loss was not finite at step {len(runs.fp8.losses) + 1}{seed}"


def write_result(variants: Variants, pairs: list[Runs], found: Probe, out: Path, tolerance: float) -> int:
    """fp8_check.json and fp8_check.png in `out`, the table on the screen; the exit code."""
    from coalm_nemo.fp8_check.picture import draw

    verdict, gap = judge(pairs, tolerance), measure_gap(pairs)
    result = {
        "verdict": verdict.word,
        "reason": verdict.reason,
        "baseline": variants.baseline.precision.dtype,
        "fp8": variants.fp8.precision.dtype,
        "steps": variants.fp8.train.steps,
        "loss_gap": gap.mean if gap else None,
        "noise": gap.noise if gap else None,
        "tolerance": tolerance,
        "seeds": [asdict(runs) | {"loss_gap": runs.gap(runs.fp8)} for runs in pairs],
        "matrices": by_matrix(found),
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
    if len(result["seeds"]) > 1:
        print("loss gap by seed: " + ", ".join(_percent(s["loss_gap"]) for s in result["seeds"]))
    elif result["noise"] is not None:
        print(f"noise: a learning rate {CONTROL_CHANGE:.1%} higher moves the baseline's loss by {result['noise']:+.2%}")
    print(f"{result['fp8']} against {result['baseline']}, {result['steps']} steps")
    print(f"{result['verdict'].upper()}: {result['reason']}")
    print(f"{out / 'fp8_check.json'}, {out / 'fp8_check.png'}")


def _percent(gap: float | None) -> str:
    return "not finite" if gap is None else f"{gap:+.2%}"
