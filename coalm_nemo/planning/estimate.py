"""One layout's memory, time and bubble together: what `coalm plan` prints a line of."""

from __future__ import annotations

from dataclasses import dataclass

from coalm_nemo.planning.constants import Constants, fitted
from coalm_nemo.planning.costs import StepTime, step_time
from coalm_nemo.planning.flops import CAUSAL, FULL, model_flops_utilisation
from coalm_nemo.planning.hardware import GIB
from coalm_nemo.planning.job import COALM_IT_ROWS, COALM_IT_TOKENS, Job, Layout
from coalm_nemo.planning.memory import Memory, memory
from coalm_nemo.planning.pipeline import bubble_fraction

SPARE_GB = 6.0
"""What has to stay free for a layout to count as one that fits: published peaks are met within 5 %."""


@dataclass(frozen=True)
class Estimate:
    """A layout and what it is predicted to need."""

    job: Job
    layout: Layout
    memory: Memory
    time: StepTime

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.job.global_batch * self.job.seq_len_tokens / self.time.total / self.job.gpus

    @property
    def bubble_fraction(self) -> float:
        layout = self.layout
        return bubble_fraction(layout.pipeline, layout.virtual_pipeline, layout.micro_batches(self.job))

    @property
    def spare(self) -> float:
        """Bytes left on the fullest stage, reserve included."""
        return self.job.gpu.memory - self.memory.worst.total

    @property
    def fits(self) -> bool:
        """With `SPARE_GB` to spare."""
        return self.spare >= SPARE_GB * GIB

    @property
    def epoch_gpu_hours(self) -> float:
        """GPU-hours for all tokens of CoALM-IT once; without packing, for its rows padded to full sequences: a bound."""
        tokens = COALM_IT_TOKENS if self.job.packed else COALM_IT_ROWS * self.job.seq_len_tokens
        return tokens / self.tokens_per_s_per_gpu / 3600

    def mfu(self, counting: float = CAUSAL) -> float:
        """Model FLOPs utilisation; `counting` CAUSAL or FULL."""
        return model_flops_utilisation(self.job, self.tokens_per_s_per_gpu, counting)

    @property
    def both_mfu(self) -> tuple[float, float]:
        """Causal, and the older counting."""
        return self.mfu(CAUSAL), self.mfu(FULL)


def estimate(job: Job, layout: Layout, constants: Constants | None = None) -> Estimate:
    """Predict one legal layout."""
    return Estimate(job, layout, memory(job, layout), step_time(job, layout, constants or fitted()))
