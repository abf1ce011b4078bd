"""The nano Llama before its first step: its shape, random weights and tokenizer, as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

from coalm_nemo.demo.tokenizer import BOS, EOS, MAX_POSITIONS, PAD, build_tokenizer, save_tokenizer

INIT_STD = 0.05
"""Larger than Llama's 0.02: at a width of 128 the attention scores start too flat otherwise."""


def write_initial_model(directory: Path, seed: int = 0) -> int:
    """Write config, weights and tokenizer to `directory`; return the number of parameters.

    The output head starts as a copy of the embedding, though the two are not tied: a copying head then only has to
    pass on what it attends to, and copying is found sooner.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    save_tokenizer(tokenizer, directory)
    config = LlamaConfig(  # the RoPE base stays at its default, 10000: transformers 4 and 5 spell it differently
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-5,
        initializer_range=INIT_STD,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    model.save_pretrained(directory)
    return model.num_parameters()
