"""config.json and model.safetensors.index.json of Llama-3.1-405B, from its published hyperparameters; no weights.

Source: "The Llama 3 Herd of Models", https://arxiv.org/abs/2407.21783, table 3, and the model's config.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TENSORS = 126 * 9 + 3
PARAMETERS = 405_853_388_800
BYTES = 811_706_777_600
SHARDS = 191

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (128256, 16384),
    **{
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(126)
        for name, shape in {
            "input_layernorm": (16384,),
            "self_attn.q_proj": (16384, 16384),
            "self_attn.k_proj": (1024, 16384),
            "self_attn.v_proj": (1024, 16384),
            "self_attn.o_proj": (16384, 16384),
            "post_attention_layernorm": (16384,),
            "mlp.gate_proj": (53248, 16384),
            "mlp.up_proj": (53248, 16384),
            "mlp.down_proj": (16384, 53248),
        }.items()
    },
    "model.norm.weight": (16384,),
    "lm_head.weight": (128256, 16384),
}
"""Written out apart from the package's own mapping."""


def write_llama_405b(directory: Path) -> Path:
    """The two files; the shard of a tensor does not matter."""
    directory.mkdir(parents=True, exist_ok=True)
    files = {n: f"model-{1 + i * SHARDS // TENSORS:05d}-of-{SHARDS:05d}.safetensors" for i, n in enumerate(SHAPES)}
    index = {"metadata": {"total_size": BYTES}, "weight_map": files}
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
