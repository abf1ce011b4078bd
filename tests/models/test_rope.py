"""Rotary frequencies equal transformers', with every llama3 parameter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from coalm_nemo.models.llama import parse_llama_config
from coalm_nemo.models.rope import rope_inv_freq

BASE = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "vocab_size": 32, "max_position_embeddings": 131072,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "plain": {"rope_theta": 10000.0, "head_dim": 64},
    "plain, large theta": {"rope_theta": 500000.0, "head_dim": 128},
    "3.1": {"rope_theta": 500000.0, "head_dim": 128, "rope": (8.0, 1.0, 4.0, 8192)},
    "3.2": {"rope_theta": 500000.0, "head_dim": 64, "rope": (32.0, 1.0, 4.0, 8192)},
    "fewer original positions": {"rope_theta": 500000.0, "head_dim": 64, "rope": (8.0, 1.0, 4.0, 512)},
    "more original positions": {"rope_theta": 500000.0, "head_dim": 128, "rope": (4.0, 1.0, 4.0, 32768)},
    "other low and high": {"rope_theta": 10000.0, "head_dim": 96, "rope": (16.0, 2.0, 8.0, 4096)},
    "factor below one step": {"rope_theta": 1e6, "head_dim": 32, "rope": (1.5, 0.5, 2.0, 64)},
}


def config(theta: float, head_dim: int, rope: tuple[float, float, float, int] | None) -> dict[str, Any]:
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    scaling = {"rope_type": "llama3", **dict(zip(keys, rope, strict=True))} if rope else None
    return BASE | {"rope_theta": theta, "head_dim": head_dim, "rope_scaling": scaling}


@pytest.mark.parametrize("name", CASES)
def test_equal_to_transformers(name: str) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    case = CASES[name]
    raw = config(case["rope_theta"], case["head_dim"], case.get("rope"))
    theirs = LlamaRotaryEmbedding(LlamaConfig(**{k: v for k, v in raw.items() if k != "model_type"})).inv_freq
    ours = rope_inv_freq(parse_llama_config(raw))
    assert ours.dtype == torch.float32 and ours.shape == (case["head_dim"] // 2,)
    assert torch.equal(ours, theirs)


def test_every_parameter_matters() -> None:
    """None of them is taken for granted, as megatron-core takes three of the four."""
    llama = parse_llama_config(config(500000.0, 128, (8.0, 1.0, 4.0, 8192)))
    assert llama.rope_scaling
    for change in (
        {"factor": 4.0},
        {"low_freq_factor": 2.0},
        {"high_freq_factor": 8.0},
        {"original_max_positions": 4096},
    ):
        other = replace(llama, rope_scaling=replace(llama.rope_scaling, **change))
        assert not torch.equal(rope_inv_freq(other), rope_inv_freq(llama)), change


def test_scaled_frequencies_lie_between() -> None:
    plain = rope_inv_freq(parse_llama_config(config(500000.0, 128, None)))
    scaled = rope_inv_freq(parse_llama_config(config(500000.0, 128, (8.0, 1.0, 4.0, 8192))))
    assert torch.equal(scaled[:10], plain[:10]) and torch.equal(scaled[-5:], plain[-5:] / 8)
    assert bool(((scaled <= plain) & (scaled >= plain / 8)).all())
