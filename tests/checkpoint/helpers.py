"""What the checkpoint tests share."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from coalm_nemo.errors import UserError

SHAPES: dict[str, dict[str, Any]] = {
    "tied_bf16": {"tied": True, "dtype": "bfloat16"},
    "untied_fp32": {"tied": False, "dtype": "float32"},
    "untied_fp16": {"dtype": "float16", "num_layers": 3},
    "gqa_9_heads_3_kv": {"num_heads": 9, "num_kv_heads": 3, "hidden_size": 72, "dtype": "bfloat16"},
    "mqa": {"num_heads": 4, "num_kv_heads": 1, "dtype": "bfloat16"},
    "mha_one_layer": {"num_heads": 4, "num_kv_heads": 4, "num_layers": 1},
    "odd_vocabulary": {"vocab_size": 1003, "dtype": "bfloat16", "shards": 2},
    "own_head_dim_sharded": {"head_dim": 24, "dtype": "bfloat16", "shards": 5, "tied": True},
}


def load_weights(hf_dir: Path) -> dict[str, torch.Tensor]:
    """All tensors of an HF directory, read by the safetensors library."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(hf_dir.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = load_weights(one), load_weights(other)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), b[name].view(torch.uint8)), name


@contextmanager
def refused(pattern: str, parent: Path | None = None) -> Iterator[None]:
    """The block raises a UserError of one sentence that matches `pattern`, and leaves `parent` as it was."""
    before = sorted(parent.iterdir()) if parent else []
    with pytest.raises(UserError) as caught:
        yield
    sentence = str(caught.value)
    assert re.search(pattern, sentence), sentence
    assert "\n" not in sentence
    if parent:
        assert sorted(parent.iterdir()) == before
