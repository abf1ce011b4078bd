"""config.json and generation_config.json of an export: true of its weights, with every token that ends an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from coalm_nemo.checkpoint.hf_files import write_json
from coalm_nemo.errors import UserError
from coalm_nemo.models.llama import LlamaConfig

EOS_TOKENS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
"""What ends a Llama 3.1 answer; in its own tokenizer ids 128001, 128008 and 128009."""


def write_config(side: Path, out: Path, cfg: LlamaConfig, dtype: str) -> None:
    """config.json as it was, but for what the export decides. transformers 4 reads torch_dtype, 5 reads dtype."""
    config = _read_object(side / "config.json")
    stated = cfg.dtype if dtype == "mixed" else dtype
    config |= {"dtype": stated, "torch_dtype": stated, "tie_word_embeddings": cfg.tied_embeddings}
    config.setdefault("architectures", ["LlamaForCausalLM"])
    write_json(out / "config.json", config)


def write_generation_config(side: Path, out: Path) -> None:
    """generation_config.json with every id that ends an answer; without them all, a server never stops."""
    config = _read_object(side / "generation_config.json")
    model = _read_object(side / "config.json")
    for key in ("bos_token_id", "eos_token_id"):
        if config.get(key) is None and model.get(key) is not None:
            config[key] = model[key]
    ids = _as_list(config.get("eos_token_id")) + _as_list(model.get("eos_token_id")) + _ending_ids(side)
    if unique := sorted(set(ids)):
        config["eos_token_id"] = unique if len(unique) > 1 else unique[0]
    write_json(out / "generation_config.json", config)


def _as_list(ids: Any) -> list[int]:
    return list(ids) if isinstance(ids, list) else [] if ids is None else [ids]


def _ending_ids(side: Path) -> list[int]:
    """Ids that the tokenizer gives the ending tokens, by name."""
    added = _read_object(side / "tokenizer.json").get("added_tokens") or []
    return [token["id"] for token in added if token.get("content") in EOS_TOKENS]


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty if the file is not there."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON ({e})") from e
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value
