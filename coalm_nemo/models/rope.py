"""Rotary frequencies with every llama3 parameter honoured.

megatron-core 0.16 takes only the factor and assumes low 1, high 4 and 8192 original positions
(`RotaryEmbedding._apply_scaling`), so the frequencies are computed here and given to the model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from coalm_nemo.models.llama import LlamaConfig, RopeScaling


def rope_inv_freq(llama: LlamaConfig) -> Tensor:
    """Inverse frequencies, fp32 [head_dim / 2]."""
    exponent = torch.arange(0, llama.head_dim, 2, dtype=torch.int64).float() / llama.head_dim
    inv_freq = 1.0 / (llama.rope_theta**exponent)
    return inv_freq if llama.rope_scaling is None else _llama3(inv_freq, llama.rope_scaling)


def _llama3(inv_freq: Tensor, rope: RopeScaling) -> Tensor:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a linear blend between.

    The same formula as `_compute_llama3_parameters` of transformers' modeling_rope_utils.py.
    """
    wavelength = 2 * math.pi / inv_freq
    longest = rope.original_max_positions / rope.low_freq_factor
    shortest = rope.original_max_positions / rope.high_freq_factor
    slowed = torch.where(wavelength > longest, inv_freq / rope.factor, inv_freq)
    blend = (rope.original_max_positions / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - blend) * slowed / rope.factor + blend * slowed
    between = (wavelength >= shortest) & (wavelength <= longest)
    return torch.where(between, blended, slowed)
