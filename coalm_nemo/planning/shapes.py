"""The Llama 3 shapes the planner knows by name; any other comes from its `config.json`."""

from __future__ import annotations

import re
from pathlib import Path

from coalm_nemo.errors import UserError
from coalm_nemo.models.llama import LlamaConfig, load_llama_config


def _llama3(layers: int, hidden: int, ffn: int, heads: int) -> LlamaConfig:
    """Llama 3.1 (arXiv 2407.21783, table 3): 8 key/value groups, heads of 128, a vocabulary of 128,256."""
    return LlamaConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_size=ffn,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_positions=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=None,
        tied_embeddings=False,
        dtype="bfloat16",
    )


SHAPES = {
    "8b": _llama3(32, 4096, 14336, 32),
    "70b": _llama3(80, 8192, 28672, 64),
    "405b": _llama3(126, 16384, 53248, 128),
}


_NAME = re.compile(r"(?i)(?:^|llama-?3(?:\.[13])?-)(8b|70b|405b)(?:-instruct)?$")


def find_shape(name: str) -> tuple[str, LlamaConfig]:
    """Name and shape of a Hugging Face directory or `config.json`, else of `8b`, `70b`, `405b`, `Llama-3.1-8B-Instruct`.

    Raises UserError if it is none of them.
    """
    path = Path(name)
    directory = path.parent if path.name == "config.json" else path
    if name and directory.is_dir():
        return directory.resolve().name, load_llama_config(directory)
    if match := _NAME.search(path.name):
        short = match.group(1).lower()
        return short, SHAPES[short]
    raise UserError(f"no model '{name}'; use one of {', '.join(SHAPES)}, or a Hugging Face directory with config.json")
