"""The nano model before its first step loads with plain `transformers` and can be split as the demo splits it."""

from __future__ import annotations

from pathlib import Path

from coalm_nemo.demo.nano_init import write_initial_model
from coalm_nemo.models.llama import load_llama_config


def test_shape_suits_two_by_two(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parameters = write_initial_model(tmp_path)
    config = load_llama_config(tmp_path)
    assert config.num_parameters() == parameters < 1_000_000
    assert config.num_heads % 2 == config.num_kv_heads % 2 == config.num_layers % 2 == config.vocab_size % 2 == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.vocab_size == len(tokenizer)
    assert (model.lm_head.weight == model.model.embed_tokens.weight).all()
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
