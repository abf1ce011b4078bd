"""What the switches of `speed` need: of the rest of the run, and of the machine. docs/performance.md explains them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from coalm_nemo.config import RunConfig
from coalm_nemo.errors import UserError
from coalm_nemo.platform import Platform

FUSION_KERNEL = "fused_weight_gradient_mlp_cuda"
"""Apex's extension, with which megatron-core's output layer adds its weight gradient into the buffer."""


def overlaps_tensor(run: RunConfig) -> bool:
    """Whether `speed.tensor_overlap` has communication to hide on this layout."""
    return run.speed.tensor_overlap and run.parallel.tensor > 1 and run.parallel.sequence


def defers_embedding(run: RunConfig) -> bool:
    """Whether `speed.defer_embedding_gradient` has a pipeline whose end it can fill."""
    return run.speed.defer_embedding_gradient and run.parallel.pipeline > 1


def explain_idle(run: RunConfig) -> Iterator[tuple[str, str]]:
    """(switch, why it does nothing) for what is on and has nothing to do on this layout."""
    if run.speed.tensor_overlap and not overlaps_tensor(run):
        yield "tensor overlap", "it hides the communication of sequence parallelism, and there is none"
    if run.speed.defer_embedding_gradient and not defers_embedding(run):
        yield "deferred embedding gradient", "it fills the time in which a pipeline drains, and PP is 1"


def check_speed(run: RunConfig) -> None:
    """Raises UserError for the first switch that the rest of the run rules out."""
    for key, need in _needs(run):
        raise UserError(f"speed.{key}=true needs {need}; without it: speed.{key}=false")


def _needs(run: RunConfig) -> Iterator[tuple[str, str]]:
    """(switch, what it lacks)."""
    low = run.precision.dtype == "bf16" or run.precision.fp8
    if overlaps_tensor(run):
        yield from (("tensor_overlap", need) for need in _tensor_overlap_needs(run))
    if run.speed.gradient_fusion and run.lora.rank:
        yield "gradient_fusion", "lora.rank=0 (adapters' gradients are added by torch, and the base has none)"
    if run.speed.gradient_fusion and not low:
        yield "gradient_fusion", f"bf16 or FP8, and precision.dtype is {run.precision.dtype}"
    if defers_embedding(run) and not run.speed.gradient_fusion:
        yield "defer_embedding_gradient", "speed.gradient_fusion=true"
    if defers_embedding(run) and run.parallel.overlap_grad_reduce:
        # megatron-core 0.16 reduces the output layer's bucket before what was deferred is in it, and says nothing
        why = "the overlapped reduction would miss what is deferred"
        yield "defer_embedding_gradient", f"parallel.overlap_grad_reduce=false and overlap_param_gather=false ({why})"
    if run.speed.fused_loss and run.precision.weights == "float32":
        yield "fused_loss", f"bf16 weights (its gradients are bf16), and precision.dtype is {run.precision.dtype}"
    if run.speed.cuda_graphs:
        yield from (("cuda_graphs", need) for need in _graph_needs(run))


def _tensor_overlap_needs(run: RunConfig) -> Iterator[str]:
    """Its buffers have one size and one form."""
    if not run.data.packing:
        yield "data.packing=true (its buffers have one size, and rows that are not packed have many)"
    if run.evaluation.every_steps:
        yield "evaluation.every_steps=0 (its buffers have one size, and answers have many)"
    if run.lora.rank:
        yield "lora.rank=0 (adapters take their input from the communication that it hides)"
    if run.precision.fp8 == "blockwise":
        yield "another precision.dtype than fp8_blockwise (Transformer Engine's buffers cannot carry its scales)"
    if run.precision.dtype != "bf16" and not run.precision.fp8:
        yield f"bf16 or Transformer Engine's FP8, and precision.dtype is {run.precision.dtype}"


def _graph_needs(run: RunConfig) -> Iterator[str]:
    if run.data.packing:
        yield "data.packing=false (where packed rows begin and end is a part of what is recorded)"
    if run.lora.rank:
        yield "lora.rank=0 (adapters are not among what megatron-core records)"
    if run.train.recompute != "none":
        yield "train.recompute=none (a recorded layer cannot be run again in the backward pass)"
    if run.evaluation.every_steps:
        yield "evaluation.every_steps=0 (answers have other lengths than what is recorded)"


def refuse_missing(run: RunConfig, platform: Platform) -> None:
    """Raises UserError for switches that this machine cannot do, all of them in one sentence."""
    missing = list(_missing(run, platform))
    if missing:
        lacking = ", ".join(sorted({need for _, need in missing}))
        off = " ".join(f"speed.{key}=false" for key, _ in missing)
        where = "a GPU" if platform.is_cuda else "the CPU"
        raise UserError(f"this run is on {where} and lacks {lacking}; without what needs it: {off}")


def _missing(run: RunConfig, platform: Platform) -> Iterator[tuple[str, str]]:
    speed = run.speed
    if not platform.transformer_engine:
        if overlaps_tensor(run):
            yield "tensor_overlap", "Transformer Engine"
        if platform.is_cuda and defers_embedding(
            run
        ):  # in megatron-core's own linear layers it would hold up all of them
            yield "defer_embedding_gradient", "Transformer Engine"
    if not platform.is_cuda:
        cuda = ("gradient_fusion", "defer_embedding_gradient", "fused_loss", "cuda_graphs")
        yield from ((key, "CUDA") for key in cuda if getattr(speed, key))
        return
    if speed.gradient_fusion and importlib.util.find_spec(FUSION_KERNEL) is None:
        yield "gradient_fusion", f"Apex's {FUSION_KERNEL}"
        if speed.defer_embedding_gradient:
            yield "defer_embedding_gradient", f"Apex's {FUSION_KERNEL}"
    if speed.cuda_graphs and not platform.transformer_engine:
        yield "cuda_graphs", "Transformer Engine"
