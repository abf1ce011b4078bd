"""Transformer Engine's FP8 recipes emulated in plain torch inside megatron-core's parallel linear layers of a block.

Operands of the three products of a linear layer are cast to FP8 and back (weights and inputs e4m3, gradients e5m2) and
multiplied: the rounding of FP8 without an FP8 GPU. What the hardware adds is not emulated: the short accumulator of
Hopper's tensor cores, FP8 transport of activations, weights cast once for several micro-batches.

Sums over a product's inner dimension, and over tensor-parallel ranks, are fp64. Sums of e4m3 codes are exact in it; in
fp32 their order, which is the layout's, decides the last bit, now and then that bit the next rounding to FP8, and one
rounding in a token changes all later ones: losses of two layouts then differed by 1e-3 at step two.

Scaling is Transformer Engine's (transformer_engine/common/recipe): `current` from the tensor at hand, `blockwise` by
power-of-two scales of 128x128 weights and of 128 elements along the axis that a product sums over, `delayed` from the
last passes' largest values. Unlike Transformer Engine's current scaling, which leaves each tensor-parallel rank its own
scale of a split tensor, ours is the largest value over the group, so that a loss does not depend on the layout.

Parameters, gradients and checkpoints stay as they are. Shape letters: t tokens, i input, o output features.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from coalm_nemo.config import PrecisionSection
from coalm_nemo.models.parallel_linears import LINEARS, replace_product

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
"""Largest finite value (Micikevicius et al. 2022, table 1)."""

BLOCK = 128
"""Side of a block, as Transformer Engine's Float8BlockScaling and DeepSeek-V3 (2024, section 3.3)."""

_SIGN_AND_EXPONENT = -(1 << 23)
"""The bits 0xFF800000 of an fp32 number, as the int32 that torch masks with."""


@dataclass(frozen=True)
class Quantised:
    """FP8 codes of a matrix and what to multiply them with; `block` is (0, 0) where one factor is for all."""

    codes: Tensor
    inverse_scale: Tensor
    block: tuple[int, int] = (0, 0)

    def values(self) -> Tensor:
        """What the codes stand for, in fp32."""
        return self.codes.float() * spread(self.inverse_scale, self.block, self.codes.shape)

    def operand(self) -> tuple[Tensor, Tensor | float]:
        """(matrix, factor): a tensor's one scale is taken after the sum, as the hardware does."""
        if self.block == (0, 0):
            return self.codes.double(), self.inverse_scale.double()
        return self.values().double(), 1.0


def spread(by_block: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """One number a block -> one an element."""
    if by_block.ndim == 0:
        return by_block
    rows = by_block.repeat_interleave(block[0], 0)[: shape[0]]
    return rows.repeat_interleave(block[1], 1)[:, : shape[1]]


def block_amax(x: Tensor, block: tuple[int, int]) -> Tensor:
    """Largest magnitude of each block; those at the lower and right edge may be partial."""
    down, right = -x.shape[0] % block[0], -x.shape[1] % block[1]
    padded = torch.nn.functional.pad(x.abs(), (0, right, 0, down))
    return padded.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0])).amax((1, 3)).float()


def scale_for(amax: Tensor, largest: float, power_of_two: bool = False) -> Tensor:
    """Factor that brings `amax` to `largest`: compute_scale_from_amax of Transformer Engine's recipe_common.cuh.

    1 for an amax of zero or infinity; at most the largest fp32 number; a power of two is rounded down to.
    """
    # A number divided by a tensor is the number times the reciprocal in torch, which is rounded twice.
    scale = (torch.full_like(amax, largest) / amax).clamp(max=torch.finfo(torch.float32).max)
    scale = torch.where((amax == 0) | amax.isinf(), torch.ones_like(scale), scale)
    return (scale.view(torch.int32) & _SIGN_AND_EXPONENT).view(torch.float32) if power_of_two else scale


def quantise(x: Tensor, dtype: torch.dtype, scale: Tensor, block: tuple[int, int] = (0, 0)) -> Quantised:
    """Scale, saturate, round to nearest even. A NaN stays one, so that a run that diverged shows it."""
    largest = LARGEST[dtype]
    scaled = x.float() * spread(scale, block, x.shape)
    return Quantised(scaled.clamp(-largest, largest).to(dtype), scale.reciprocal(), block)


def quantise_blocks(x: Tensor, dtype: torch.dtype, block: tuple[int, int]) -> Quantised:
    """Each block by its own largest value."""
    return quantise(x, dtype, scale_for(block_amax(x, block), LARGEST[dtype], power_of_two=True), block)


def amax_over(group: Any, *tensors: Tensor) -> Tensor:
    """Largest magnitude of each tensor over a process group (None: this rank alone), fp32 [tensors].

    Rounded to bf16: that is what the tensors of real FP8 are, and so fp32's noise does not reach the scale, from where
    it would reach every product.
    """
    amax = torch.stack([t.detach().abs().amax().bfloat16().float() for t in tensors])
    if group is not None and group.size() > 1:
        torch.distributed.all_reduce(amax, op=torch.distributed.ReduceOp.MAX, group=group)
    return amax


def product(left: Quantised, right: Quantised, sum_over: str) -> Tensor:
    """Matrix product, fp64; `sum_over`: both operands' "rows" or "columns", or "inner" (a @ b)."""
    (a, a_factor), (b, b_factor) = left.operand(), right.operand()
    a = a.t() if sum_over == "rows" else a
    b = b.t() if sum_over == "columns" else b
    return (a @ b) * (a_factor * b_factor)


class CurrentScaling:
    """One scale a tensor, from its largest value now (Transformer Engine's Float8CurrentScaling)."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def enter(self, training: bool, with_grad: bool) -> None:
        """Called before every forward pass; nothing to remember."""

    def inputs(self, x: Tensor, weight: Tensor) -> tuple[Quantised, Quantised]:
        """x [t, i] and weight [o, i] for the output. A tensor that every rank has whole has the same amax anyway."""
        scales = scale_for(amax_over(self.group, x, weight), LARGEST[E4M3])
        return quantise(x, E4M3, scales[0]), quantise(weight, E4M3, scales[1])

    def gradient(self, dy: Tensor) -> Quantised:
        """dy [t, o] for the gradient of the input."""
        return quantise(dy, E5M2, scale_for(amax_over(self.group, dy), LARGEST[E5M2])[0])

    def along_tokens(self, x: Tensor, quantised: Quantised) -> Quantised:
        """The same matrix for the gradient of the weight, whose sum is over tokens."""
        return quantised


class BlockScaling:
    """Scales by block (Float8BlockScaling). Blocks are those of the unsplit tensors, which validate.py sees to."""

    def enter(self, training: bool, with_grad: bool) -> None:
        """Nothing to remember."""

    def inputs(self, x: Tensor, weight: Tensor) -> tuple[Quantised, Quantised]:
        return quantise_blocks(x, E4M3, (1, BLOCK)), quantise_blocks(weight, E4M3, (BLOCK, BLOCK))

    def gradient(self, dy: Tensor) -> Quantised:
        return quantise_blocks(dy, E5M2, (1, BLOCK))

    def along_tokens(self, x: Tensor, quantised: Quantised) -> Quantised:
        """From the matrix itself: Transformer Engine keeps a second cast, blocked along tokens, for this product."""
        return quantise_blocks(x, quantised.codes.dtype, (BLOCK, 1))


class DelayedScaling:
    """One scale a tensor, from the largest value of the last passes (DelayedScaling, algorithm "max").

    Starts at scale 1: `training/calibration.py` fills the history, and a checkpoint keeps it (`training/fp8_state.py`).
    As in Transformer Engine a pass is a micro-batch's forward or backward, and the largest value is that
    over tensor-, context- and data-parallel ranks; so micro-batches and data-parallel ranks change the numbers.
    """

    def __init__(self, linear: Any, history_len: int, group: Any) -> None:
        self.linear = linear
        self.group = group
        self.record = self.stash = self.replay = False
        self.pending: deque[Tensor] = deque()
        device = linear.weight.device
        for name, start in (("fp8_amax_history", torch.zeros(3, history_len)), ("fp8_scale", torch.ones(3))):
            linear.register_buffer(name, start.to(device), persistent=False)  # rows: input, weight, gradient

    def enter(self, training: bool, with_grad: bool) -> None:
        """A recomputed forward pass has to use the scales of the first, which ran without gradients."""
        self.stash = training and not with_grad
        self.replay = training and with_grad and bool(self.pending)
        self.record = training and not self.replay

    def inputs(self, x: Tensor, weight: Tensor) -> tuple[Quantised, Quantised]:
        scales = self.pending.popleft() if self.replay else self.linear.fp8_scale[:2].clone()
        if self.stash:
            self.pending.append(scales)
        if self.record:
            self._update(slice(0, 2), amax_over(self.group, x, weight), LARGEST[E4M3])
        return quantise(x, E4M3, scales[0]), quantise(weight, E4M3, scales[1])

    def gradient(self, dy: Tensor) -> Quantised:
        scale = self.linear.fp8_scale[2].clone()
        self._update(slice(2, 3), amax_over(self.group, dy), LARGEST[E5M2])
        return quantise(dy, E5M2, scale)

    def along_tokens(self, x: Tensor, quantised: Quantised) -> Quantised:
        return quantised

    def _update(self, rows: slice, amax: Tensor, largest: float) -> None:
        """The scale stays while nothing but zeros, or something not finite, has been seen."""
        history, scale = self.linear.fp8_amax_history, self.linear.fp8_scale
        history[rows] = torch.cat([amax[:, None], history[rows, :-1]], dim=1)
        seen = history[rows].amax(1)
        scale[rows] = torch.where((seen > 0) & seen.isfinite(), scale_for(seen, largest), scale[rows])


Scaling = CurrentScaling | BlockScaling | DelayedScaling


class EmulatedLinear(torch.autograd.Function):
    """y = x W^T and its two gradients, operands through FP8; what crosses ranks is left to the caller.

    x [s, b, i], y [s, b, o] and their gradients are fp64 so that they are summed over ranks as such; weight [o, i] is not.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scaling: Scaling, fp8_weight_gradient: bool) -> Tensor:
        flat = x.flatten(0, -2)
        quantised, quantised_weight = scaling.inputs(flat, weight)
        ctx.scaling, ctx.fp8_weight_gradient, ctx.weight_dtype = scaling, fp8_weight_gradient, weight.dtype
        ctx.weight = quantised_weight
        if ctx.needs_input_grad[1]:
            ctx.x = scaling.along_tokens(flat, quantised) if fp8_weight_gradient else flat
        y = product(quantised, quantised_weight, "columns")
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (dy,) = gradients
        flat = dy.flatten(0, -2)
        quantised = ctx.scaling.gradient(flat)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = product(quantised, ctx.weight, "inner").unflatten(0, dy.shape[:-1])
        if ctx.needs_input_grad[1]:
            dw = _weight_gradient(ctx, flat, quantised).to(ctx.weight_dtype)
        return dx, dw, None, None


def _weight_gradient(ctx: Any, dy: Tensor, quantised: Quantised) -> Tensor:
    """dy [t, o], x [t, i] -> [o, i]."""
    if not ctx.fp8_weight_gradient:
        return dy.t() @ ctx.x
    return product(ctx.scaling.along_tokens(dy, quantised), ctx.x, "rows")


def linears_in_fp8(model: Any, precision: PrecisionSection, num_layers: int) -> list[Any]:
    """The linear layers of `model` (a pipeline chunk), but for those that `precision` keeps out."""
    first, last = precision.bf16_layers_at_start + 1, num_layers - precision.bf16_layers_at_end
    inside = [layer for layer in model.decoder.layers if first <= layer.layer_number <= last]
    return [layer.get_submodule(path) for layer in inside for path in LINEARS]


def emulate_fp8(model: Any, precision: PrecisionSection, num_layers: int) -> None:
    """Put the emulation into the layers of `model` (a pipeline chunk)."""
    for linear in linears_in_fp8(model, precision, num_layers):
        _replace_product(linear, precision)


def _scaling(linear: Any, precision: PrecisionSection) -> Scaling:
    if precision.emulated_fp8 == "blockwise":
        return BlockScaling()
    if precision.emulated_fp8 == "current":
        return CurrentScaling(linear.tp_group)
    group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
    return DelayedScaling(linear, precision.amax_history_len, group)


def _replace_product(linear: Any, precision: PrecisionSection) -> None:
    scaling = _scaling(linear, precision)

    def emulated(x: Tensor, weight: Tensor) -> Tensor:
        scaling.enter(linear.training, torch.is_grad_enabled())
        y: Tensor = EmulatedLinear.apply(x, weight, scaling, precision.fp8_weight_gradients)  # type: ignore[no-untyped-call]
        return y

    replace_product(linear, emulated, torch.float64)
    linear.register_forward_hook(_to_input_dtype)


def _to_input_dtype(linear: Any, args: tuple[Any, ...], output: Any) -> Any:
    """After the sum over ranks, which the layer does itself."""
    return output[0].to(args[0].dtype), output[1]
