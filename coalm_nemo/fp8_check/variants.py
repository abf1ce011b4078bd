"""The runs that are compared: the baseline, the baseline with a change that means nothing, and the FP8 run."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from coalm_nemo.config import RunConfig, SpeedSection
from coalm_nemo.errors import UserError

CONTROL_CHANGE = 1e-3
"""Relative change of the learning rate in the control: what it moves the loss by is the noise of so short a run."""


@dataclass(frozen=True)
class Variants:
    """Same seed, rows and order; they differ in `precision`, and the control in its learning rate."""

    baseline: RunConfig
    fp8: RunConfig
    control: RunConfig | None

    def named(self) -> dict[str, RunConfig]:
        """In the order in which they run."""
        runs = {"baseline": self.baseline, "fp8": self.fp8}
        return runs | ({"control": self.control} if self.control else {})

    def at_seed(self, seed: int) -> Variants:
        """The same runs with another order of rows (and dropout)."""
        found = copy.deepcopy(self)
        for run in found.named().values():
            run.run.seed = seed
        return found


def make_variants(run: RunConfig, steps: int, baseline: str, control: bool) -> Variants:
    """`run` must ask for FP8, real or emulated. Raises UserError where it does not.

    The baseline is bf16, or fp32 where emulated FP8 keeps fp32 between its products: what differs is FP8 alone.
    """
    if not run.precision.any_fp8:
        raise UserError(
            f"precision.dtype is {run.precision.dtype}, and there is nothing to compare; give --precision fp8_current "
            "(without Transformer Engine fp8_scaled_mm or fp8_emulated_current)"
        )
    if steps < 1:
        raise UserError(f"--steps {steps}: at least one step is needed")
    fp8 = copy.deepcopy(run)
    fp8.train.steps = steps
    fp8.speed = SpeedSection()  # numbers are compared, and their probe has no gradient buffers to fuse into
    plain = copy.deepcopy(fp8)
    plain.precision.dtype = baseline or ("fp32" if run.precision.weights == "float32" else "bf16")
    if plain.precision.dtype not in ("fp32", "bf16"):
        raise UserError(f"--baseline {baseline}: use bf16 or fp32")
    plain.precision.fp8_params = False
    plain.precision.bf16_layers_at_start = plain.precision.bf16_layers_at_end = 0
    if plain.precision.dtype == "fp32":
        plain.precision.gradients = "fp32"
    return Variants(plain, fp8, _control(plain) if control else None)


def _control(baseline: RunConfig) -> RunConfig:
    changed = copy.deepcopy(baseline)
    changed.optimizer.lr *= 1 + CONTROL_CHANGE
    return changed
