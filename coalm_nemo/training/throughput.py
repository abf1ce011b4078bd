"""A running job's FLOPs, MFU and memory, by the planner's own functions, so that plan and log can be laid side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from coalm_nemo.config import RunConfig
from coalm_nemo.models.llama import LlamaConfig
from coalm_nemo.planning.adapt import PRECISIONS, expected, expected_lines
from coalm_nemo.planning.estimate import Estimate
from coalm_nemo.planning.flops import CAUSAL, FULL, attended_tokens, lora_parameters, model_flops_per_token
from coalm_nemo.planning.hardware import GIB, Gpu, gpu_of_device
from coalm_nemo.planning.memory import stage_memory

CHECKED_AFTER_STEPS = 3
"""The optimizer's states and NCCL's buffers are there after the first step, the allocator has settled after some."""
MEMORY_TOLERANCE = 0.10
SPEED_AFTER_STEPS, SPEED_TOLERANCE = 20, 0.25
"""Containers differ by a tenth from the same plan; a quarter says that something is wrong."""


@dataclass(frozen=True)
class Measured:
    """One step, in StepReport's names. None is not known here: no peak for this device or precision, no CUDA memory."""

    tflops_per_device: float
    """Model FLOPs, attention counted causal: what `mfu_causal` is of."""
    tflops_per_device_full: float
    """The older counting, attention in full."""
    mfu_causal: float | None
    mfu_full: float | None
    memory_allocated_bytes: int | None
    """The run's peak on rank 0 since its first step."""
    memory_reserved_bytes: int | None
    predicted_tokens_per_s: float | None
    predicted_memory_bytes: int | None
    """Peak on rank 0, as `memory_allocated_bytes` counts it."""


class Meter:
    """Measures steps on every rank; what it has to say goes to `tell` on the first one."""

    def __init__(
        self,
        run: RunConfig,
        llama: LlamaConfig,
        world_size: int,
        lengths: np.ndarray,
        fill: float,
        device: torch.device,
        warn: Callable[[str], None],
    ) -> None:
        self.run, self.llama, self.world_size, self.lengths = run, llama, world_size, lengths
        self.device, self.warn = device, warn
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.gpu = gpu_of_device(name)
        self.peak = peak_of(self.gpu, run.precision.dtype)
        known = self.gpu.name if self.gpu else "h100-80gb"
        self.plan = expected(run, llama, world_size, known, attended(lengths) if run.data.packing else 0.0)
        self.fill = fill
        self.speeds: list[float] = []
        self.steps = 0

    def lines(self) -> Iterator[str]:
        """The plan in words, for the start; where this device is not one the planner knows, of H100 and said so."""
        if self.plan is None:
            return
        if self.gpu is None:
            yield f"the plan is that of {self.plan.job.gpu.name}, which this device is not: memory and speed are not compared"
        yield from expected_lines(self.plan)

    def measure(self, rows: list[int], tokens: int, seconds: float) -> Measured:
        """One step over `rows`, which took `seconds`. Costs some microseconds a thousand rows."""
        per_second = tokens / seconds / self.world_size
        causal, full = (per_second * self.flops_per_token(rows, counting) for counting in (CAUSAL, FULL))
        self._compare_speed(tokens / seconds)
        cuda = self.device.type == "cuda"
        compared = self.plan if self.gpu else None
        return Measured(
            tflops_per_device=causal / 1e12,
            tflops_per_device_full=full / 1e12,
            mfu_causal=causal / self.peak if self.peak else None,
            mfu_full=full / self.peak if self.peak else None,
            memory_allocated_bytes=torch.cuda.max_memory_allocated(self.device) if cuda else None,
            memory_reserved_bytes=torch.cuda.max_memory_reserved(self.device) if cuda else None,
            predicted_tokens_per_s=self.predicted_tokens_per_s,
            predicted_memory_bytes=round(compared.memory.first.allocated) if compared else None,
        )

    def flops_per_token(self, rows: list[int], counting: float) -> float:
        """Model FLOPs of a token of these rows, by the sum of their squared lengths."""
        seen, lora = attended(self.lengths[rows]), self.run.lora
        if not lora.rank:
            return model_flops_per_token(self.llama, seen, counting)
        adapters = lora_parameters(self.llama, lora.rank, ",".join(lora.targets))
        return model_flops_per_token(self.llama, seen, counting, "lora", adapters)

    @property
    def predicted_tokens_per_s(self) -> float | None:
        """Of all GPUs, real tokens as the log counts them; None where rows are padded, as long as their batch has it."""
        if self.plan is None or self.gpu is None or not self.run.data.packing:
            return None
        return self.plan.tokens_per_s_per_gpu * self.world_size * self.fill

    def after_step(self) -> None:
        """Once, after the first steps and on CUDA: every rank's peak memory against the plan of its stage. Collective."""
        self.steps += 1
        if self.device.type != "cuda":
            return
        if self.steps == 1:  # what loading a checkpoint took is no part of the plan
            torch.cuda.reset_peak_memory_stats(self.device)
        if self.steps == CHECKED_AFTER_STEPS:
            peaks = gather_peaks(torch.cuda.max_memory_allocated(self.device), self.device)
            if self.plan and self.gpu and torch.distributed.get_rank() == 0:
                for sentence in compare_memory(self.plan, peaks):
                    self.warn(sentence)

    def _compare_speed(self, tokens_per_s: float) -> None:
        """Once: the median of the first steps against the plan."""
        if self.predicted_tokens_per_s is None or len(self.speeds) == SPEED_AFTER_STEPS:
            return
        self.speeds.append(tokens_per_s)
        if len(self.speeds) == SPEED_AFTER_STEPS:
            ratio = statistics.median(self.speeds) / self.predicted_tokens_per_s
            if ratio < 1 - SPEED_TOLERANCE:
                self.warn(
                    f"{statistics.median(self.speeds):,.0f} tokens/s are {1 - ratio:.0%} below the planned "
                    f"{self.predicted_tokens_per_s:,.0f}; see `coalm plan` for what a step should be spent on"
                )


def gather_peaks(peak: int, device: torch.device) -> list[tuple[int, float]]:
    """(pipeline stage, bytes) of every rank, from each one's own. Collective."""
    from megatron.core import parallel_state

    mine = torch.tensor([parallel_state.get_pipeline_model_parallel_rank(), peak], dtype=torch.float64, device=device)
    gathered = torch.zeros(2 * torch.distributed.get_world_size(), dtype=torch.float64, device=device)
    torch.distributed.all_gather_into_tensor(gathered, mine)
    return [(int(stage), bytes_) for stage, bytes_ in gathered.view(-1, 2).tolist()]


def compare_memory(plan: Estimate, peaks: list[tuple[int, float]]) -> Iterator[str]:
    """A sentence a pipeline stage whose fullest rank is more than a tenth off the plan; `peaks`: (stage, bytes) by rank."""
    for stage in sorted({stage for stage, _ in peaks}):
        measured = max(peak for where, peak in peaks if where == stage)
        planned = stage_memory(plan.job, plan.layout, stage).allocated
        less_is_fine = not plan.job.packed  # the plan is for rows as long as they can be
        if abs(measured / planned - 1) > MEMORY_TOLERANCE and not (less_is_fine and measured < planned):
            yield (
                f"stage {stage} has held {measured / GIB:.1f} GiB at most, and the plan was {planned / GIB:.1f} "
                f"({measured / planned - 1:+.0%})"
            )


def attended(lengths: np.ndarray) -> float:
    """Sum of squared lengths over their sum; 0 for no rows."""
    exact = lengths.astype(np.float64)
    return attended_tokens(float(exact.sum()), float(exact @ exact)) if len(lengths) else 0.0


def peak_of(gpu: Gpu | None, dtype: str) -> float | None:
    """FLOP/s to hold a run against; None for a device or a precision without a published one."""
    if gpu is None or dtype not in PRECISIONS:
        return None
    return gpu.peak("fp8" if dtype.startswith("fp8") else "bf16")
