"""Emulated FP8 against casts written out in numpy: a table of all codes, nearest by search, ties to the even code."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from coalm_nemo.models.fp8_emulation import (
    E4M3,
    E5M2,
    LARGEST,
    BlockScaling,
    CurrentScaling,
    DelayedScaling,
    EmulatedLinear,
    Quantised,
    amax_over,
    quantise,
    quantise_blocks,
    scale_for,
)

FORMATS = {"e4m3": (E4M3, 4, 3, 7), "e5m2": (E5M2, 5, 2, 15)}
"""Name -> torch's type, bits of exponent and mantissa, bias."""

BLOCKS = [(1, 128), (128, 1), (128, 128)]


def magnitudes(name: str) -> np.ndarray[Any, Any]:
    """float64 value of every finite non-negative code, in order: Micikevicius et al. 2022, table 1, written out."""
    dtype, _, mantissa_bits, bias = FORMATS[name]
    values = []
    for code in range(128):
        exponent, mantissa = code >> mantissa_bits, (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
        values.append(mantissa * 2.0 ** (1 - bias) if exponent == 0 else (1 + mantissa) * 2.0 ** (exponent - bias))
    finite = [v for v in values if v <= LARGEST[dtype]]
    assert finite[-1] == LARGEST[dtype]
    return np.array(finite)


def reference_codes(scaled: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """Nearest code, ties to even, saturating; the sign of a zero stays."""
    table = magnitudes(name)
    wide = np.minimum(np.abs(scaled.astype(np.float64)), table[-1])
    above = np.clip(np.searchsorted(table, wide), 1, len(table) - 1)
    up, down = table[above] - wide, wide - table[above - 1]
    odd_below = (above - 1) % 2 == 1
    nearest = np.where((up < down) | ((up == down) & odd_below), above, above - 1)
    return (nearest + 128 * np.signbit(scaled)).astype(np.uint8)


def reference_scale(part: np.ndarray[Any, Any], name: str, power_of_two: bool) -> np.float32:
    """A tensor's scale is of its largest value as a bf16 number, a block's of the value as it is."""
    amax = np.abs(part).max()
    if not power_of_two:
        bits = np.frombuffer(amax.tobytes(), dtype=np.uint32)[0]
        amax = np.array((int(bits) + 0x7FFF + (int(bits) >> 16 & 1)) & 0xFFFF0000, dtype=np.uint32).view(np.float32)[()]
    if amax == 0:
        return np.float32(1)
    with np.errstate(over="ignore"):
        scale = min(np.float32(LARGEST[FORMATS[name][0]]) / amax, np.finfo(np.float32).max)
    return np.float32(2.0 ** (np.frexp(scale)[1] - 1)) if power_of_two else np.float32(scale)


def check(found: Quantised, x: Tensor, name: str, block: tuple[int, int] | None) -> None:
    """Codes bit by bit, values as fp32 numbers."""
    array = x.float().numpy()
    rows, columns = block or array.shape
    codes, values = np.zeros(array.shape, dtype=np.uint8), np.zeros(array.shape, dtype=np.float32)
    table = magnitudes(name)
    for top in range(0, array.shape[0], rows):
        for left in range(0, array.shape[1], columns):
            where = np.s_[top : top + rows, left : left + columns]
            scale = reference_scale(array[where], name, block is not None)
            codes[where] = reference_codes(array[where] * scale, name)
            sign = np.where(codes[where] >= 128, -1, 1)
            values[where] = (sign * table[codes[where] % 128]).astype(np.float32) * (np.float32(1) / scale)
    np.testing.assert_array_equal(found.codes.view(torch.uint8).numpy(), codes)
    np.testing.assert_array_equal(found.values().numpy(), values)


def tensors() -> dict[str, Tensor]:
    """Rows and columns that blocks do not divide, and values at the edges of fp32 and FP8."""
    draw = torch.Generator().manual_seed(1)
    normal = torch.randn(150, 200, generator=draw)
    wide = normal * torch.exp(6 * torch.randn(150, 200, generator=draw))
    zero_block = normal.clone()
    zero_block[:128, :128] = 0
    zero_block[140] = -0.0
    return {
        "normal": normal,
        "small": normal * 1e-6,
        "wide": wide,
        "bf16": wide.bfloat16(),
        "zero": torch.zeros(3, 5),
        "zero blocks": zero_block,
        "huge": normal * 1e37,
        "tiny": normal * 1e-40,
        "one element": torch.tensor([[-3.0]]),
        "denormal results": torch.cat([torch.tensor([[1.0]]), torch.logspace(-12, 0, 400)[None]], dim=1),
    }


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", tensors())
def test_quantised_values_are_the_references(case: str, name: str) -> None:
    x, dtype = tensors()[case], FORMATS[name][0]
    check(quantise(x, dtype, scale_for(amax_over(None, x), LARGEST[dtype])[0]), x, name, None)
    for block in BLOCKS:
        check(quantise_blocks(x, dtype, block), x, name, block)


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_and_every_tie(name: str) -> None:
    """All values, all midpoints, and their neighbours in fp32; beyond the largest it saturates."""
    table = magnitudes(name).astype(np.float32)
    ties = (table[1:] + table[:-1]) / 2
    points = np.concatenate([table, ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(1e9))])
    points = np.concatenate([points, -points, np.array([1e30, -1e30, np.inf, -np.inf], dtype=np.float32)])[None]
    found = quantise(torch.from_numpy(points), FORMATS[name][0], torch.tensor(1.0))
    np.testing.assert_array_equal(found.codes.view(torch.uint8).numpy(), reference_codes(points, name))


@pytest.mark.parametrize("name", FORMATS)
def test_ml_dtypes_agrees(name: str) -> None:
    theirs = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[name]
    x, dtype = tensors()["wide"], FORMATS[name][0]
    found = quantise(x, dtype, scale_for(amax_over(None, x), LARGEST[dtype])[0])
    scaled = x.numpy() * reference_scale(x.numpy(), name, power_of_two=False)
    codes = np.clip(scaled, -LARGEST[dtype], LARGEST[dtype]).astype(theirs).view(np.uint8)
    np.testing.assert_array_equal(found.codes.view(torch.uint8).numpy(), codes)


def test_a_nan_stays_one() -> None:
    x = torch.tensor([[1.0, float("nan")]])
    assert quantise(x, E4M3, torch.tensor(1.0)).values()[0, 1].isnan()
    assert quantise_blocks(x, E4M3, (1, 128)).values()[0, 1].isnan()


def operands() -> tuple[Tensor, Tensor, Tensor]:
    """x [s, b, i], weight [o, i], dy [s, b, o]"""
    draw = torch.Generator().manual_seed(2)
    return tuple(torch.randn(*shape, generator=draw) for shape in ((75, 2, 160), (192, 160), (75, 2, 192)))  # type: ignore[return-value]


def products(scaling: Any, fp8_weight_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, dy = operands()
    x.requires_grad_()
    weight.requires_grad_()
    y = EmulatedLinear.apply(x.double(), weight, scaling, fp8_weight_gradient)
    y.backward(dy.double())
    assert x.grad is not None and weight.grad is not None
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize("fp8_weight_gradient", [True, False])
@pytest.mark.parametrize("recipe", ["current", "blockwise"])
def test_products_are_those_of_the_quantised_operands(recipe: str, fp8_weight_gradient: bool) -> None:
    def cast(t: Tensor, dtype: torch.dtype, block: tuple[int, int]) -> Tensor:
        if recipe == "blockwise":
            return quantise_blocks(t, dtype, block).values().double()
        return quantise(t, dtype, LARGEST[dtype] / t.abs().max().bfloat16().float()).values().double()

    x, weight, dy = (t.flatten(0, -2) for t in operands())
    row, column = (1, 128), (128, 1)
    w = cast(weight, E4M3, (128, 128))
    x_by_token, dy_by_token = (cast(x, E4M3, column), cast(dy, E5M2, column)) if fp8_weight_gradient else (x, dy)
    expected = (
        cast(x, E4M3, row) @ w.t(),
        cast(dy, E5M2, row) @ w,
        dy_by_token.double().t() @ x_by_token.double(),
    )
    found = products(BlockScaling() if recipe == "blockwise" else CurrentScaling(None), fp8_weight_gradient)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.flatten(0, -2), theirs.to(ours.dtype), rtol=1e-6, atol=1e-5)


def test_frozen_weights_have_no_gradient() -> None:
    x, weight, dy = operands()
    y = EmulatedLinear.apply(x.double().requires_grad_(), weight, CurrentScaling(None), True)
    y.backward(dy.double())
    assert y.requires_grad and weight.grad is None


def pass_once(scaling: DelayedScaling, linear: torch.nn.Linear, x: Tensor) -> Tensor:
    scaling.enter(linear.training, torch.is_grad_enabled())
    return torch.as_tensor(EmulatedLinear.apply(x.double(), linear.weight, scaling, True))


def delayed(history_len: int) -> tuple[DelayedScaling, torch.nn.Linear]:
    linear = torch.nn.Linear(8, 4, bias=False)
    return DelayedScaling(linear, history_len, None), linear


def test_delayed_scales_come_from_the_largest_of_the_last_passes() -> None:
    scaling, linear = delayed(history_len=2)
    scale: Any = linear.fp8_scale
    expected = [1.0, 448 / 4, 448 / 4, 448 / 2, 448 / 2]
    for amax, used in zip([4.0, 1.0, 2.0, 0.0, 0.0], expected, strict=True):
        assert float(scale[0]) == used
        x = torch.full((3, 1, 8), amax, requires_grad=True)
        pass_once(scaling, linear, x).backward(torch.full((3, 1, 4), amax).double())
    assert float(scale[0]) == 448 / 2, "zeros alone leave the scale as it was"
    assert float(scale[2]) == 57344 / 2
    assert float(scale[1]) == pytest.approx(float(448 / linear.weight.detach().abs().max()), rel=2**-8)
    assert not [key for key in linear.state_dict() if "fp8" in key]


def test_a_recomputed_pass_uses_the_scale_of_the_first() -> None:
    """Two micro-batches in flight, as under 1F1B: first passes without gradients, then each again."""
    scaling, linear = delayed(history_len=4)
    batches = [torch.full((2, 1, 8), v) for v in (3.0, 0.7)]
    with torch.no_grad():
        first = [pass_once(scaling, linear, x) for x in batches]
    history = torch.as_tensor(linear.fp8_amax_history).clone()
    again = [pass_once(scaling, linear, x) for x in batches]
    for one, other in zip(first, again, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=0, atol=0)
    torch.testing.assert_close(torch.as_tensor(linear.fp8_amax_history), history, rtol=0, atol=0)


def test_validation_leaves_the_history_alone() -> None:
    scaling, linear = delayed(history_len=4)
    linear.eval()
    with torch.no_grad():
        pass_once(scaling, linear, torch.ones(2, 1, 8))
    assert not torch.as_tensor(linear.fp8_amax_history).any() and not scaling.pending
