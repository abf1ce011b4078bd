"""What a Hugging Face Llama `config.json` says, as a typed value. Pure Python: no torch, no transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coalm_nemo.errors import UserError


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency scaling (transformers `rope_type: llama3`), with every parameter kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class LlamaConfig:
    """Shape and constants of a Llama model, in Hugging Face's terms."""

    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied_embeddings: bool
    dtype: str
    """Dtype of the stored weights: "float32", "bfloat16" or "float16"."""
    init_std: float = 0.02

    def padded_vocab_size(self, tensor_parallel: int) -> int:
        """Smallest multiple of the tensor-parallel size that holds the vocabulary."""
        return -(-self.vocab_size // tensor_parallel) * tensor_parallel

    @property
    def qkv_rows(self) -> int:
        """Rows of Megatron's fused QKV weight."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def num_parameters(self) -> int:
        """All weights, the embedding counted once when it is tied."""
        h, f = self.hidden_size, self.ffn_size
        layer = self.qkv_rows * h + self.num_heads * self.head_dim * h + 3 * f * h + 2 * h
        embeddings = self.vocab_size * h * (1 if self.tied_embeddings else 2)
        return self.num_layers * layer + embeddings + h


def load_llama_config(hf_dir: Path) -> LlamaConfig:
    """Read `hf_dir/config.json`. Raises UserError if it is missing, is not Llama, or holds what is not supported."""
    path = Path(hf_dir) / "config.json"
    if not Path(hf_dir).is_dir():
        raise UserError(
            f"{hf_dir} is not a directory; give a Hugging Face Llama directory (config.json, *.safetensors)"
        )
    if not path.is_file():
        raise UserError(f"{path} is missing; give a Hugging Face Llama directory (config.json, *.safetensors)")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON ({e})") from e
    if not isinstance(raw, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return parse_llama_config(raw, str(path))


def parse_llama_config(raw: dict[str, Any], where: str = "config.json") -> LlamaConfig:
    """`config.json` as a dictionary -> LlamaConfig. `where` names the file in error sentences."""
    if raw.get("model_type") != "llama":
        raise UserError(
            f"{where} describes a {raw.get('model_type')!r} model; only Llama (model_type 'llama') is supported"
        )
    _refuse_unsupported(raw, where)
    heads = _positive_int(raw, "num_attention_heads", where)
    hidden = _positive_int(raw, "hidden_size", where)
    kv_heads = _positive_int(raw, "num_key_value_heads", where, default=heads)
    if heads % kv_heads:
        raise UserError(f"{where}: num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads})")
    theta, scaling = _rope(raw, where)
    return LlamaConfig(
        num_layers=_positive_int(raw, "num_hidden_layers", where),
        hidden_size=hidden,
        ffn_size=_positive_int(raw, "intermediate_size", where),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_positive_int(raw, "head_dim", where, default=hidden // heads),
        vocab_size=_positive_int(raw, "vocab_size", where),
        max_positions=_positive_int(raw, "max_position_embeddings", where, default=2048),
        rms_norm_eps=_number(raw.get("rms_norm_eps", 1e-6), "rms_norm_eps", where),
        rope_theta=theta,
        rope_scaling=scaling,
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        dtype=_dtype(raw, where),
        init_std=_number(raw.get("initializer_range", 0.02), "initializer_range", where),
    )


def _positive_int(raw: dict[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{where}: {key} must be a positive integer, not {value!r}")
    return value


def _number(value: Any, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where}: {key} must be a number, not {value!r}")
    return float(value)


def _refuse_unsupported(raw: dict[str, Any], where: str) -> None:
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise UserError(f"{where}: {key} is true; Llama layers with biases are not supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act is {raw['hidden_act']!r}; only 'silu' (SwiGLU) is supported")
    if raw.get("quantization_config"):
        raise UserError(f"{where} describes a quantised checkpoint; start from the unquantised weights")


def _dtype(raw: dict[str, Any], where: str) -> str:
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"{where}: dtype {dtype!r} is not supported; use float32, bfloat16 or float16")
    return dtype


def _rope(raw: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """transformers 4 keeps `rope_theta` and `rope_scaling`; transformers 5 puts both under `rope_parameters`."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: rope_parameters must be an object, not {rope!r}")
    theta = _number(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0, "rope_theta", where)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(f"{where}: RoPE scaling {kind!r} is not supported; only 'default' and 'llama3' are")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if missing := [k for k in keys if rope.get(k) is None]:
        raise UserError(f"{where}: the llama3 RoPE scaling lacks {', '.join(missing)}")
    factor, low, high, original = (_number(rope[k], k, where) for k in keys)
    return theta, RopeScaling(factor, low, high, int(original))
