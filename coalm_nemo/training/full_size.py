"""A run of any number of GPUs built on one core, without memory: `coalm train --gpus N --dry-run`.

Every rank's model chunks, gradient buffers and optimizer are made by the code that trains, on the meta device under a
fake process group: what divides wrongly, or a pipeline layout that megatron-core refuses, shows before anything is queued.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from coalm_nemo.config import RunConfig, SpeedSection
from coalm_nemo.errors import UserError
from coalm_nemo.models.llama import LlamaConfig
from coalm_nemo.validate import check_run


@dataclass(frozen=True)
class RankShare:
    """What one rank holds, in elements."""

    rank: int
    stage: int
    """Pipeline stage."""
    layers: tuple[int, ...]
    """Layers of each of its chunks."""
    parameters: int
    trained: int
    """Parameters that want a gradient: all, or the adapters."""
    own: int
    """Parameters counted once over the tensor-parallel group: this rank's split ones, and on its first rank the others."""
    gradients: int
    """Elements of the gradient buffers."""
    optimizer: int
    """Elements that this rank's optimizer keeps masters and moments of."""
    fp8: int
    """Of its parameters, those that an FP8 run multiplies in FP8."""
    nf4: int
    """Of its parameters, those that QLoRA keeps in four bits."""


@dataclass(frozen=True)
class FullSize:
    """All ranks that were built."""

    world_size: int
    shares: tuple[RankShare, ...]
    parameters: int
    """Of the whole model, padding included; 0 where not all ranks of one replica were built."""
    seconds: float


def build_full_size(
    run: RunConfig, llama: LlamaConfig, world_size: int, ranks: Sequence[int] | None = None
) -> FullSize:
    """Build `ranks` (all, if None). Raises UserError where the layout is wrong or the parts do not make the model."""
    check_run(run, llama, world_size)
    started = time.monotonic()
    wanted = range(world_size) if ranks is None else ranks
    counted = copy.deepcopy(run)
    counted.optimizer.moments = "fp32"  # as many elements; the other kind wants Transformer Engine to be made at all
    counted.speed = SpeedSection()  # the same elements without CUDA's kernels
    with _meta_device():
        shares = tuple(_build(counted, llama, world_size, rank) for rank in wanted)
    replicas = world_size // (run.parallel.tensor * run.parallel.pipeline)
    whole = sum(s.own for s in shares) // replicas if ranks is None else 0
    if ranks is None and whole != (expected := _expected(run, llama)):
        raise UserError(f"the ranks together hold {whole:,} parameters, but the model has {expected:,}")
    return FullSize(world_size, shares, whole, time.monotonic() - started)


def _expected(run: RunConfig, llama: LlamaConfig) -> int:
    """The model's parameters with the vocabulary padded for this tensor-parallel size; tied ends are held twice."""
    from coalm_nemo.models.lora import num_parameters

    padding = llama.padded_vocab_size(run.parallel.tensor) - llama.vocab_size
    tables = 1 if llama.tied_embeddings else 2
    again = llama.tied_embeddings and run.parallel.pipeline > 1
    table = llama.padded_vocab_size(run.parallel.tensor) * llama.hidden_size
    adapters = num_parameters(llama, run.lora) if run.lora.rank else 0
    return llama.num_parameters() + padding * llama.hidden_size * tables + (table if again else 0) + adapters


@contextmanager
def _meta_device() -> Iterator[None]:
    """New tensors have a shape and no memory, those that megatron-core asks of "the current GPU" too."""
    import torch

    from coalm_nemo.platform import Platform

    Platform("cpu", "gloo", transformer_engine=False).activate(0)
    current, torch.cuda.current_device = torch.cuda.current_device, lambda: torch.device("meta")  # type: ignore
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.cuda.current_device = current


def _build(run: RunConfig, llama: LlamaConfig, world_size: int, rank: int) -> RankShare:
    from megatron.core import parallel_state

    from coalm_nemo.models.nf4 import hollow_weights
    from coalm_nemo.platform import Platform
    from coalm_nemo.training.fake_groups import fake_world
    from coalm_nemo.training.setup import build_trainee

    platform = Platform("cpu", "gloo", transformer_engine=False)
    with fake_world(run, world_size, rank):
        trainee = build_trainee(llama, run, platform, 1, lambda models: None)
        models = trainee.models()
        parameters = [p for model in models for p in model.parameters()]
        first = parallel_state.get_tensor_model_parallel_rank() == 0
        split = [p for p in parameters if getattr(p, "tensor_model_parallel", False)]
        return RankShare(
            rank,
            parallel_state.get_pipeline_model_parallel_rank(),
            tuple(len(model.decoder.layers) for model in models),
            sum(p.numel() for p in parameters),
            sum(p.numel() for p in parameters if p.requires_grad),
            sum(p.numel() for p in (parameters if first else split)),
            sum(buffer.numel for chunk in trainee.chunks for buffer in chunk.buffers),
            _optimizer_elements(trainee.optimizer),
            sum(_fp8_elements(run, llama, model) for model in models) if run.precision.fp8 else 0,
            sum(linear.weight.numel() for m in models for layer in hollow_weights(m) for _, linear in layer),
        )


def _fp8_elements(run: RunConfig, llama: LlamaConfig, model: Any) -> int:
    """Weights of the fused linear layers (adapters stay BF16) of layers that are not kept in BF16."""
    from coalm_nemo.models.lora import FUSED

    start, end = run.precision.bf16_layers_at_start, llama.num_layers - run.precision.bf16_layers_at_end
    layers = [layer for layer in model.decoder.layers if start < layer.layer_number <= end]  # counted from 1
    return sum(layer.get_submodule(name).weight.numel() for layer in layers for name in FUSED)


def _optimizer_elements(optimizer: Any) -> int:
    from coalm_nemo.training.setup import inner_optimizers

    return sum(
        p.numel() for inner in inner_optimizers(optimizer) for group in inner.param_groups for p in group["params"]
    )
