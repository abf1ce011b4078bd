"""Random Llama weights as an HF directory: drawn tensor by tensor from (seed, name), so they do not depend on a layout."""

from __future__ import annotations

import hashlib
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from coalm_nemo.checkpoint.hf_files import copy_side_files
from coalm_nemo.checkpoint.layout import atomic_directory
from coalm_nemo.checkpoint.mapping import hf_tensors
from coalm_nemo.models.llama import LlamaConfig, load_llama_config

if TYPE_CHECKING:
    import torch


def write_random_weights(source: Path, out: Path, seed: int) -> Path:
    """Write `out/model.safetensors` for `source/config.json`, and its side files; returns `out`.

    Norms are ones; other tensors normal with `initializer_range`, those that write into the residual stream divided by
    sqrt(2 * layers) (Radford et al. 2019, section 2.3).
    """
    import torch
    from safetensors.torch import save

    llama = load_llama_config(source)
    shutil.rmtree(out, ignore_errors=True)
    dtype = getattr(torch, llama.dtype)
    weights = {t.name: _draw(llama, seed, t.name, t.shape).to(dtype) for t in hf_tensors(llama)}
    with atomic_directory(out) as partial:
        copy_side_files(source, partial)
        (partial / "model.safetensors").write_bytes(save(weights))
    return out


def _draw(llama: LlamaConfig, seed: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    if len(shape) == 1:
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    std = llama.init_std / (math.sqrt(2 * llama.num_layers) if residual else 1.0)
    return torch.randn(shape, generator=generator) * std
