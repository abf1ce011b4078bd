"""config.json -> LlamaConfig, for the models that the project is for, and for transformers' two ways to write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coalm_nemo.errors import UserError
from coalm_nemo.models.llama import LlamaConfig, RopeScaling, load_llama_config, parse_llama_config

ROPE_31 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip


def published(hidden: int, ffn: int, layers: int, heads: int, kv: int = 8, **more: Any) -> dict[str, Any]:
    """What the models' own config.json files say (meta-llama on the Hugging Face Hub)."""
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": 128256, "rms_norm_eps": 1e-05,
        "max_position_embeddings": 131072, "rope_theta": 500000.0, "rope_scaling": ROPE_31, "torch_dtype": "bfloat16",
    } | more  # fmt: skip


MODELS = {
    "3.2 1B": (published(2048, 8192, 16, 32, head_dim=64, tie_word_embeddings=True), 1_235_814_400),
    "3.2 3B": (published(3072, 8192, 28, 24, head_dim=128, tie_word_embeddings=True), 3_212_749_824),
    "3.1 8B": (published(4096, 14336, 32, 32), 8_030_261_248),
    "3.1 70B": (published(8192, 28672, 80, 64), 70_553_706_496),
    "3.1 405B": (published(16384, 53248, 126, 128), 405_853_388_800),
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_of_the_published_models(name: str) -> None:
    raw, parameters = MODELS[name]
    llama = parse_llama_config(raw)
    assert llama.num_parameters() == parameters
    assert llama.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    assert llama.dtype == "bfloat16" and llama.rope_theta == 500000.0


def test_defaults() -> None:
    raw = {
        "model_type": "llama", "hidden_size": 96, "intermediate_size": 10, "num_hidden_layers": 1,
        "num_attention_heads": 6, "vocab_size": 7,
    }  # fmt: skip
    llama = parse_llama_config(raw)
    assert (llama.num_kv_heads, llama.head_dim, llama.dtype, llama.tied_embeddings) == (6, 16, "float32", False)
    assert (llama.rope_theta, llama.rope_scaling, llama.max_positions) == (10000.0, None, 2048)


def test_transformers_5_writes_it_otherwise(tmp_path: Path) -> None:
    """What transformers itself saves is read alike, whatever its version."""
    from transformers import LlamaConfig as HfConfig

    raw = published(64, 96, 2, 4, 2, head_dim=24)
    HfConfig(**{k: v for k, v in raw.items() if k != "model_type"}).save_pretrained(tmp_path)
    assert load_llama_config(tmp_path) == parse_llama_config(raw)


def test_rope_parameters() -> None:
    raw = published(64, 96, 2, 4, 2)
    del raw["rope_scaling"], raw["rope_theta"]
    llama = parse_llama_config(raw | {"rope_parameters": {**ROPE_31, "rope_theta": 1234.5}})
    assert llama.rope_theta == 1234.5 and llama.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    plain = parse_llama_config(raw | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}})
    assert (plain.rope_theta, plain.rope_scaling) == (7.0, None)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "qwen2"}, "only Llama"),
        ({"hidden_size": 0}, "hidden_size must be a positive integer, not 0"),
        ({"vocab_size": True}, "vocab_size must be a positive integer, not True"),
        ({"num_key_value_heads": 3}, "is not a multiple of num_key_value_heads"),
        ({"hidden_act": "gelu"}, "only 'silu'"),
        ({"mlp_bias": True}, "biases"),
        ({"torch_dtype": "int8"}, "dtype 'int8' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear' is not supported"),
        ({"rope_scaling": [1]}, "must be an object"),
        ({"rope_scaling": ROPE_31 | {"factor": "8"}}, "factor must be a number, not '8'"),
        ({"rms_norm_eps": None}, "rms_norm_eps must be a number"),
    ],
)
def test_what_is_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=f"^here: .*{sentence}|^here describes.*{sentence}"):
        parse_llama_config(published(64, 96, 2, 4, 2) | change, "here")


@pytest.mark.parametrize(("tensor", "padded"), [(1, 1003), (2, 1004), (4, 1004), (8, 1008)])
def test_padded_vocabulary(tensor: int, padded: int) -> None:
    llama = parse_llama_config(published(64, 96, 2, 4, 2, vocab_size=1003))
    assert llama.padded_vocab_size(tensor) == padded


def test_parameters_are_those_of_the_weights(tiny_llama: Path, tiny_llama_tied: Path) -> None:
    from safetensors import safe_open

    for directory in (tiny_llama, tiny_llama_tied):
        with safe_open(directory / "model.safetensors", "numpy") as weights:
            total = sum(weights.get_tensor(name).size for name in weights.keys())  # noqa: SIM118
        llama = load_llama_config(directory)
        assert isinstance(llama, LlamaConfig) and llama.num_parameters() == total
        assert json.loads((directory / "config.json").read_text())["tie_word_embeddings"] is llama.tied_embeddings
