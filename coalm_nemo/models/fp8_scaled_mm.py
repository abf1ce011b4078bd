"""FP8 through torch's own scaled matrix product: for GPUs that have FP8 where Transformer Engine is missing.

The scaling is Transformer Engine's Float8CurrentScaling: weights and inputs e4m3, gradients e5m2, one scale a tensor from
its largest value now, each tensor-parallel rank its own. What Transformer Engine adds is missing here: casts fused with
what is before them, weights cast once for several micro-batches, weights kept in FP8, communication beside the products,
and under sequence parallelism a saved input that is a rank's share (ours is the whole, in one byte an element).

`torch._scaled_mm` runs on CPUs too, slowly: the same code is tested there. Shape letters: t tokens, i input, o output
features, each a multiple of 16 (torch, aten/src/ATen/native/cuda/ScaledBlas.cpp).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coalm_nemo.config import PrecisionSection
from coalm_nemo.models.fp8_emulation import E4M3, E5M2, LARGEST, linears_in_fp8, scale_for
from coalm_nemo.models.parallel_linears import replace_product


def scale_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What brings the largest magnitude of `x` to that of `dtype`; fp32, no dimensions, stays on the device."""
    return scale_for(x.abs().amax().float(), LARGEST[dtype])


def cast(x: Tensor, dtype: torch.dtype, scale: Tensor) -> Tensor:
    """Scaled, saturated, rounded to nearest even."""
    return (x.float() * scale).clamp_(-LARGEST[dtype], LARGEST[dtype]).to(dtype)


def product(rows: Tensor, row_scale: Tensor, columns: Tensor, column_scale: Tensor, *, fast: bool) -> Tensor:
    """rows [m, k] times the transpose of columns [n, k], both contiguous, as Hopper's tensor cores want them: bf16 [m, n].

    `fast`: sums stay in the tensor core's short accumulator, as Transformer Engine has it in the forward pass only.
    """
    return torch._scaled_mm(
        rows,
        columns.t(),
        scale_a=row_scale.reciprocal(),
        scale_b=column_scale.reciprocal(),
        out_dtype=torch.bfloat16,
        use_fast_accum=fast,
    )


class ScaledLinear(torch.autograd.Function):
    """y = x W^T and its two gradients; x [s, b, i], weight [o, i], y [s, b, o], all bf16.

    The weight is cast again in the backward pass: to keep its codes would cost a byte a parameter for each micro-batch
    under way.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, fp8_weight_gradient: bool) -> Tensor:
        flat = x.flatten(0, -2)
        scale, weight_scale = scale_of(flat, E4M3), scale_of(weight, E4M3)
        codes = cast(flat, E4M3, scale)
        y = product(codes, scale, cast(weight, E4M3, weight_scale), weight_scale, fast=True)
        kept = None
        if ctx.needs_input_grad[1]:
            kept = codes if fp8_weight_gradient else flat
        ctx.save_for_backward(kept, weight, scale, weight_scale)
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        kept, weight, x_scale, weight_scale = ctx.saved_tensors
        dy = gradients[0].flatten(0, -2)
        scale = scale_of(dy, E5M2)
        codes = cast(dy, E5M2, scale)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            weight_codes = cast(weight.t(), E4M3, weight_scale).contiguous()
            dx = product(codes, scale, weight_codes, weight_scale, fast=False).unflatten(0, gradients[0].shape[:-1])
        if kept is not None and kept.dtype is E4M3:
            dw = product(codes.t().contiguous(), scale, kept.t().contiguous(), x_scale, fast=False)
        elif kept is not None:
            dw = dy.t() @ kept
        return dx, dw, None


def use_scaled_mm(model: Any, precision: PrecisionSection, num_layers: int) -> None:
    """Put it into the layers of `model` (a pipeline chunk), but for those that `precision` keeps out."""

    def scaled(x: Tensor, weight: Tensor) -> Tensor:
        y: Tensor = ScaledLinear.apply(x, weight, precision.fp8_weight_gradients)  # type: ignore[no-untyped-call]
        return y

    for linear in linears_in_fp8(model, precision, num_layers):
        replace_product(linear, scaled)
