"""QLoRA's base (Dettmers et al. 2023): frozen linear layers kept in 4-bit NormalFloat, made bf16 again where they are used.

Blocks of 64 elements along a row share one fp32 scale: 4.5 bits a weight. A product makes its matrix in the forward and
once more in the backward pass, so that one layer's matrix is there at a time. Blocks lie within rows, so a split of a
weight over tensor-parallel ranks leaves them whole where its rows are multiples of 64 (`validate.py` sees to that), and
the numbers are the same on every layout. Scales are not quantised a second time (the paper's double quantisation saves
0.37 bits a weight).

Shape letters: s sequence, b batch, i input, o output features of this rank.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor

from coalm_nemo.models.parallel_linears import LINEARS, replace_product

ROW_PARALLEL = ("self_attention.linear_proj", "mlp.linear_fc2")
BLOCK = 64
ELEMENTS_AT_ONCE = 1 << 24
_TAIL = 0.9677083
"""Where the outermost quantiles lie: bitsandbytes' create_normal_map, which the paper's table (appendix E) comes from."""


@cache
def code_values() -> Tensor:
    """The 16 values, ascending from -1 to 1: quantiles of the normal distribution, eight above zero, seven below, zero."""
    above = torch.special.ndtri(torch.linspace(_TAIL, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(_TAIL, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([above, torch.zeros(1, dtype=torch.float64), below]).sort().values
    return (values / values.max()).float()


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[o, i] -> codes, two a byte, uint8 [o, i / 2], and scales, fp32 [o, i / 64]. i must be a multiple of 64."""
    blocks = weight.float().unflatten(1, (-1, BLOCK))
    scale = blocks.abs().amax(-1)
    normed = blocks / torch.where(scale > 0, scale, 1.0)[..., None]
    values = code_values().to(weight.device)
    middles = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(normed, middles).to(torch.uint8).flatten(1)
    return codes[:, 0::2] << 4 | codes[:, 1::2], scale


def dequantise(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantise` gave -> [o, i]; by rows, so that what is needed on the way stays small."""
    if codes.is_cuda and importlib.util.find_spec("bitsandbytes"):
        return by_bitsandbytes(codes, scale, dtype)
    values = code_values().to(codes.device)
    out = torch.empty(codes.shape[0], 2 * codes.shape[1], dtype=dtype, device=codes.device)
    rows = max(1, ELEMENTS_AT_ONCE // out.shape[1])
    for start in range(0, out.shape[0], rows):
        part = codes[start : start + rows]
        pairs = torch.stack([part >> 4, part & 15], dim=-1).flatten(1)
        made = values[pairs.int()].unflatten(1, (-1, BLOCK)) * scale[start : start + rows, :, None]
        out[start : start + rows] = made.flatten(1)
    return out


def by_bitsandbytes(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The same by its kernel, which is faster on a GPU; it packs and scales as we do."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    shape = torch.Size((codes.shape[0], 2 * codes.shape[1]))
    values = code_values().to(codes.device)
    state = QuantState(scale.flatten(), shape=shape, code=values, blocksize=BLOCK, quant_type="nf4", dtype=dtype)
    return dequantize_4bit(codes.view(-1, 1), state)


class NF4Linear(torch.autograd.Function):
    """y = x W^T and the gradient of x; W is made from its codes each time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scale)
        return torch.nn.functional.linear(x, dequantise(codes, scale, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (dy,) = gradients
        codes, scale = ctx.saved_tensors
        return dy @ dequantise(codes, scale, dy.dtype), None, None


def hollow(model: Any) -> None:
    """Leave the linear layers of `model` (a pipeline chunk) without memory: their weights come one layer at a time.

    The weight keeps its shape on the meta device, for checkpoints; what computes are `nf4_codes` and `nf4_scale`.
    """
    tables = [model.embedding.word_embeddings] if model.pre_process else []
    tables += [model.output_layer] if model.post_process and model.output_layer.weight is not None else []
    for table in tables:  # megatron-core marks a weight only where it draws it
        set_tensor_model_parallel_attributes(table.weight, True, 0, 1)
    for layer in model.decoder.layers:
        for path in LINEARS:
            _hollow_linear(layer.get_submodule(path), split_axis=1 if path in ROW_PARALLEL else 0)


def _hollow_linear(linear: Any, split_axis: int) -> None:
    place_weight(linear, torch.device("meta"))
    set_tensor_model_parallel_attributes(linear.weight, True, split_axis, 1)
    linear.register_buffer("nf4_codes", None, persistent=False)
    linear.register_buffer("nf4_scale", None, persistent=False)

    def dequantised(x: Tensor, weight: Tensor) -> Tensor:  # the weight that comes has no memory
        y: Tensor = NF4Linear.apply(x, linear.nf4_codes, linear.nf4_scale)  # type: ignore[no-untyped-call]
        return y

    replace_product(linear, dequantised)


def place_weight(linear: Any, device: torch.device) -> None:
    """An empty weight of the same shape: on a device to be loaded into, on meta to take no memory."""
    empty = torch.empty(linear.weight.shape, dtype=linear.weight.dtype, device=device)
    marks = vars(linear.weight)  # of tensor parallelism
    linear.weight = torch.nn.Parameter(empty, requires_grad=False)
    vars(linear.weight).update(marks)


def hollow_weights(model: Any) -> list[list[tuple[str, Any]]]:
    """By layer, (name of the weight in the chunk's state, linear layer) of those that wait for codes."""
    return [
        [(f"decoder.layers.{i}.{path}.weight", layer.get_submodule(path)) for path in LINEARS]
        for i, layer in enumerate(model.decoder.layers)
        if hasattr(layer.get_submodule(LINEARS[0]), "nf4_codes")
    ]


def fill(linear: Any, weight: Tensor) -> None:
    """Give a hollow layer its codes; `weight` [o, i] may go afterwards."""
    linear.nf4_codes, linear.nf4_scale = quantise(weight.detach())
