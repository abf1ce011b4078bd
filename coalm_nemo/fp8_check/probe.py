"""One batch through the base's weights in both precisions: gradients side by side, and what the casts lose by layer.

No optimizer, no data-parallel wrapper: each rank keeps the gradients of its own rows and its own share of the weights,
and only dot products cross ranks. Matrices are megatron-core's fused linear layers (parallel_linears.LINEARS).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from coalm_nemo.config import RunConfig
from coalm_nemo.data.batch import MicroBatch
from coalm_nemo.models.fp8_emulation import BlockScaling, CurrentScaling, Quantised
from coalm_nemo.models.gpt import LlamaModel, build_chunks
from coalm_nemo.models.llama import LlamaConfig
from coalm_nemo.models.lora import input_of_matrix
from coalm_nemo.models.parallel_linears import LINEARS
from coalm_nemo.platform import Platform
from coalm_nemo.training.step import run_schedule

LoadWeights = Callable[[list[LlamaModel]], None]


@dataclass
class CastError:
    """What a cast to FP8 lost of a tensor; sums, so that ranks and micro-batches add up."""

    squares: float = 0.0
    squared_error: float = 0.0
    elements: float = 0.0
    flushed: float = 0.0
    """Elements that were not zero and became it."""

    def add(self, x: Tensor, codes: Quantised) -> None:
        flat = x.detach().float()
        values = codes.values()
        self.squares += float(flat.square().sum())
        self.squared_error += float((flat - values).square().sum())
        self.elements += flat.numel()
        self.flushed += float(((values == 0) & (flat != 0)).sum())

    @property
    def relative(self) -> float:
        """Root of the squared error over the squares."""
        return (self.squared_error / self.squares) ** 0.5 if self.squares else 0.0


@dataclass
class Alignment:
    """Two gradients of a matrix: the sums that their cosine and their relative size need."""

    dot: float = 0.0
    baseline: float = 0.0
    fp8: float = 0.0

    @property
    def cosine(self) -> float:
        size = (self.baseline * self.fp8) ** 0.5
        return self.dot / size if size else 1.0


@dataclass
class Probe:
    """By matrix, named `layer:path`."""

    gradients: dict[str, Alignment]
    casts: dict[str, dict[str, CastError]]
    """Matrix -> "input", "weight", "gradient"."""


def probe(
    llama: LlamaConfig,
    baseline: RunConfig,
    fp8: RunConfig,
    platform: Platform,
    load: LoadWeights,
    batches: list[MicroBatch],
    length: int,
) -> Probe:
    """This rank's share of both. The model is built twice, one after the other."""
    casts: dict[str, dict[str, CastError]] = {}
    scaling = (
        BlockScaling() if (fp8.precision.fp8 or fp8.precision.emulated_fp8) == "blockwise" else CurrentScaling(None)
    )
    plain = _gradients(llama, baseline, platform, load, batches, length, lambda c: _watch_casts(c, scaling, casts))
    ours = _gradients(llama, fp8, platform, load, batches, length, lambda chunks: None)
    return Probe({name: _align(plain[name], ours[name]) for name in plain}, casts)


def _gradients(
    llama: LlamaConfig,
    run: RunConfig,
    platform: Platform,
    load: LoadWeights,
    batches: list[MicroBatch],
    length: int,
    watch: Callable[[list[LlamaModel]], None],
) -> dict[str, Tensor]:
    chunks = build_chunks(llama, run, platform)
    load(chunks)
    watch(chunks)
    chunks[0].config.finalize_model_grads_func = None
    run_schedule(list(chunks), batches, length, forward_only=False)
    found: dict[str, Tensor] = {}
    for name, linear in _matrices(chunks):
        grads = [p.grad.detach().flatten().float().cpu() for p in linear.parameters() if p.grad is not None]
        if grads:
            found[name] = torch.cat(grads)
    return found


def _matrices(chunks: list[LlamaModel]) -> list[tuple[str, Any]]:
    return [
        (f"{layer.layer_number}:{path}", layer.get_submodule(path))
        for chunk in chunks
        for layer in chunk.decoder.layers
        for path in LINEARS
    ]


def _align(baseline: Tensor, fp8: Tensor) -> Alignment:
    a, b = baseline.double(), fp8.double()
    return Alignment(float(a @ b), float(a @ a), float(b @ b))


def _watch_casts(
    chunks: list[LlamaModel], scaling: CurrentScaling | BlockScaling, casts: dict[str, dict[str, CastError]]
) -> None:
    """Cast what passes through each matrix of the baseline, beside the computation, and keep what is lost."""
    for name, linear in _matrices(chunks):
        errors = casts.setdefault(name, {part: CastError() for part in ("input", "weight", "gradient")})
        linear.register_forward_hook(_cast_hook(scaling, errors))


def _cast_hook(scaling: CurrentScaling | BlockScaling, errors: dict[str, CastError]) -> Callable[..., None]:
    def hook(linear: Any, args: tuple[Any, ...], output: Any) -> None:
        if not torch.is_grad_enabled():  # recomputation runs the layer twice
            return
        x = input_of_matrix(linear, args[0]).detach().flatten(0, -2)
        codes, weight = scaling.inputs(x, linear.weight.detach())
        errors["input"].add(x, codes)
        if not errors["weight"].elements:
            errors["weight"].add(linear.weight, weight)
        if output[0].requires_grad:
            output[0].register_hook(lambda dy: errors["gradient"].add(_flat(dy), scaling.gradient(_flat(dy))))

    return hook


def _flat(x: Tensor) -> Tensor:
    return x.detach().flatten(0, -2)


def gather(own: Probe) -> Probe:
    """All ranks' shares added up, the same on every rank."""
    shares: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(shares, own)
    total = Probe({}, {})
    for share in shares:
        for name, alignment in share.gradients.items():
            _add(total.gradients.setdefault(name, Alignment()), alignment)
        for name, parts in share.casts.items():
            for part, error in parts.items():
                _add(total.casts.setdefault(name, {}).setdefault(part, CastError()), error)
    return total


def _add(total: Any, more: Any) -> None:
    for name, value in asdict(more).items():
        setattr(total, name, getattr(total, name) + value)
