"""torch's scaled product against the emulation of the same recipe, which is exact but for its last rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coalm_nemo.models.fp8_emulation import E4M3, CurrentScaling, EmulatedLinear, quantise
from coalm_nemo.models.fp8_scaled_mm import ScaledLinear, cast, scale_of

BF16 = 2.0**-8
"""Relative rounding of a bf16 result."""
SIDES = st.sampled_from([16, 32, 48, 128])


def operands(tokens: int, inner: int, outer: int, spread: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [t, 1, i], weight [o, i], dy [t, 1, o]; some elements far above the rest, as activations have them."""
    draw = torch.Generator().manual_seed(seed)
    x, weight, dy = (
        torch.randn(shape, generator=draw).mul(spread).bfloat16()
        for shape in ((tokens, 1, inner), (outer, inner), (tokens, 1, outer))
    )
    x.view(-1)[::37] *= 30
    return x, weight, dy


def gradients(
    product: type[torch.autograd.Function], x: Tensor, weight: Tensor, dy: Tensor, *more: object
) -> list[Tensor]:
    """y, dx and dw."""
    x, weight = (t.detach().clone().requires_grad_() for t in (x, weight))
    y = product.apply(x, weight, *more)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), dy.to(y.dtype))]


@settings(max_examples=40, deadline=None)
@given(SIDES, SIDES, SIDES, st.sampled_from([1e-12, 1e-3, 1.0, 1e4]), st.booleans(), st.integers(0, 9))
def test_as_the_emulation(tokens: int, inner: int, outer: int, spread: float, fp8_dw: bool, seed: int) -> None:
    agree(*operands(tokens, inner, outer, spread, seed), fp8_dw)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fp8_dw", [False, True])
def test_as_the_emulation_on_a_gpu(fp8_dw: bool) -> None:
    agree(*(t.cuda() for t in operands(256, 512, 384, 1.0, 0)), fp8_dw)


def agree(x: Tensor, weight: Tensor, dy: Tensor, fp8_dw: bool) -> None:
    ours = gradients(ScaledLinear, x, weight, dy, fp8_dw)
    exact = gradients(EmulatedLinear, x.double(), weight, dy.double(), CurrentScaling(None), fp8_dw)
    for got, wanted in zip(ours, exact, strict=True):
        assert got.dtype is torch.bfloat16
        assert (got.double() - wanted.double()).norm() <= 2 * BF16 * wanted.double().norm()


@given(st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1, max_size=32))
def test_same_codes_as_the_emulation(values: list[float]) -> None:
    x = torch.tensor(values).bfloat16()
    codes = quantise(x[None], E4M3, scale_of(x, E4M3)).codes
    assert torch.equal(cast(x[None], E4M3, scale_of(x, E4M3)).view(torch.uint8), codes.view(torch.uint8))


def test_an_all_zero_gradient_gives_zeros() -> None:
    x, weight, dy = operands(16, 16, 16, 1.0, 0)
    _, dx, dw = gradients(ScaledLinear, x, weight, torch.zeros_like(dy), True)
    assert not dx.any() and not dw.any()


@pytest.mark.parametrize("where", ["x", "weight", "dy"])
def test_what_diverged_shows(where: str) -> None:
    """A NaN must come out as one, so that a run that diverged ends."""
    x, weight, dy = operands(16, 32, 16, 1.0, 0)
    {"x": x, "weight": weight, "dy": dy}[where].view(-1)[3] = torch.nan
    y, dx, dw = gradients(ScaledLinear, x, weight, dy, True)
    assert (dx if where == "dy" else y).isnan().any() and (dw if where != "weight" else y).isnan().any()


def test_frozen_weight_keeps_nothing_of_the_input() -> None:
    """As under LoRA: no weight gradient, and no codes of the input kept for it."""
    x, weight, dy = operands(16, 32, 16, 1.0, 0)
    kept: list[Tensor] = []
    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = ScaledLinear.apply(x, weight, True)  # type: ignore[no-untyped-call]
    assert all(t.shape != (16, 32) or t.data_ptr() == weight.data_ptr() for t in kept)
    y.backward(dy)
    assert x.grad is not None and weight.grad is None
