"""NF4 against the published table, and against bitsandbytes where it is installed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coalm_nemo.models.nf4 import BLOCK, by_bitsandbytes, code_values, dequantise, quantise

PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
"""Dettmers et al. 2023, appendix E."""


def test_the_table_is_the_papers() -> None:
    assert code_values().tolist() == pytest.approx(PUBLISHED, abs=1e-6)


def test_nearest_value_is_taken() -> None:
    weight = torch.randn(16, 4 * BLOCK)
    codes, scale = quantise(weight)
    rounded = dequantise(codes, scale, torch.float32)
    blocks = weight.unflatten(1, (-1, BLOCK)) / scale[..., None]
    nearest = (blocks[..., None] - code_values()).abs().amin(-1)
    assert torch.allclose((rounded.unflatten(1, (-1, BLOCK)) / scale[..., None] - blocks).abs(), nearest, atol=1e-6)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.floats(1e-30, 1e30), st.sampled_from([torch.float32, torch.bfloat16]))
def test_rounding_again_changes_nothing(seed: int, size: float, dtype: torch.dtype) -> None:
    weight = (torch.randn(3, 2 * BLOCK, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)
    once = dequantise(*quantise(weight), torch.float32)
    assert torch.equal(dequantise(*quantise(once), torch.float32), once)
    half_a_step = 0.5 * (1 - 0.6961928) * weight.float().unflatten(1, (-1, BLOCK)).abs().amax(-1, keepdim=True)
    assert ((once - weight.float()).unflatten(1, (-1, BLOCK)).abs() <= half_a_step * 1.0001).all()


def test_zero_stays_zero() -> None:
    assert torch.equal(dequantise(*quantise(torch.zeros(2, BLOCK)), torch.float32), torch.zeros(2, BLOCK))


def test_its_kernel_reads_our_codes() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    codes, scale = quantise(torch.randn(96, 256))
    assert torch.allclose(
        by_bitsandbytes(codes, scale, torch.float32), dequantise(codes, scale, torch.float32), atol=1e-5
    )


def test_equal_to_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    weight = torch.randn(64, 512)
    packed, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    codes, scale = quantise(weight)
    assert torch.allclose(state.absmax.view_as(scale), scale)
    theirs = functional.dequantize_4bit(packed, state)
    ours = dequantise(codes, scale, torch.float32)
    # the fp32 product rounds otherwise; another code is taken only where two values are equally near
    assert ((ours - theirs).abs() > 1e-5).float().mean() < 1e-3
