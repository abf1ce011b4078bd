"""What was built without memory, in GiB by pipeline stage, beside what the planner says of the same stage."""

from __future__ import annotations

from dataclasses import dataclass

from coalm_nemo.config import RunConfig
from coalm_nemo.errors import UserError
from coalm_nemo.models.llama import LlamaConfig
from coalm_nemo.planning.adapt import PRECISIONS
from coalm_nemo.planning.command import PlanRequest, layout_of, make_job
from coalm_nemo.planning.hardware import GIB
from coalm_nemo.planning.memory import NF4_BYTES, stage_memory
from coalm_nemo.training.full_size import FullSize, RankShare

TOLERANCE, SMALL_BYTES = 0.02, 64 * 2**20
"""How far the planner may be from what is built; buffers are padded by some MiB, which a tiny model shows."""


@dataclass(frozen=True)
class StageBytes:
    """Bytes of the fullest rank of a pipeline stage; weights with their FP8 forms."""

    weights: float
    gradients: float
    optimizer: float

    def off(self, other: StageBytes) -> float:
        """Largest relative difference."""
        return max(abs(a / b - 1) for a, b in self._pairs(other))

    def far_from(self, other: StageBytes) -> bool:
        """Off by more than what padding explains."""
        return any(abs(a - b) > max(TOLERANCE * b, SMALL_BYTES) for a, b in self._pairs(other))

    def _pairs(self, other: StageBytes) -> list[tuple[float, float]]:
        return [(getattr(self, n), getattr(other, n)) for n in ("weights", "gradients", "optimizer")]


def built_bytes(run: RunConfig, shares: list[RankShare]) -> StageBytes:
    """Of one stage's ranks, the largest of each part. A weight's FP8 form and its transpose take a byte each."""
    weight = 4 if run.precision.weights == "float32" else 2
    gradient = 4 if run.precision.gradients == "fp32" else 2
    state = 4 + 2 * (4 if run.optimizer.moments == "fp32" else 2)  # masters and two moments
    eight = 0.0 if run.precision.fp8_params else 2.0  # beside BF16 weights; instead of them, two bytes as well
    four = NF4_BYTES - weight  # instead of them
    return StageBytes(
        max(weight * s.parameters + eight * s.fp8 + four * s.nf4 for s in shares),
        max(gradient * s.gradients for s in shares),
        max(state * s.optimizer for s in shares),
    )


def planned_bytes(run: RunConfig, llama: LlamaConfig, gpus: int, stage: int) -> StageBytes | None:
    """The planner's bytes of a stage; None in a precision that it does not plan."""
    if run.precision.dtype not in PRECISIONS:
        return None
    parts = stage_memory(make_job(PlanRequest(gpus), run, llama), layout_of(run), stage)
    return StageBytes(parts.weights + parts.fp8_copies, parts.gradients, parts.optimizer)


def report(run: RunConfig, llama: LlamaConfig, full: FullSize) -> None:
    """A line a pipeline stage (its largest rank). Raises UserError where the planner is off by more than 2 %."""
    wrong = []
    print(f"stage  ranks  layers  {'parameters':>14}  weights  gradients  optimizer (GiB)  planner off by")
    for stage in sorted({s.stage for s in full.shares}):
        mine = [s for s in full.shares if s.stage == stage]
        built, planned = built_bytes(run, mine), planned_bytes(run, llama, full.world_size, stage)
        if planned and built.far_from(planned):
            wrong.append(stage)
        top = max(mine, key=lambda s: s.parameters)
        sizes = f"{built.weights / GIB:>7.2f}  {built.gradients / GIB:>9.2f}  {built.optimizer / GIB:>15.2f}"
        off = f"{built.off(planned):.2%}" if planned else "not planned"
        print(f"{stage:>5}  {len(mine):>5}  {sum(top.layers):>6}  {top.parameters:>14,}  {sizes}  {off:>14}")
    whole = f"; together the model's {full.parameters:,} parameters" if full.parameters else ""
    print(f"{len(full.shares)} of {full.world_size} ranks built in {full.seconds:.1f} s{whole}")
    if wrong:
        raise UserError(
            f"the planner is more than {TOLERANCE:.0%} off what was built on stages {wrong}; do not rely on it"
        )
