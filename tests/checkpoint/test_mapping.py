from __future__ import annotations

import subprocess
import sys
from collections import Counter
from math import prod
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from coalm_nemo.checkpoint.mapping import extra_state_keys, hf_sources, hf_tensors, megatron_slices
from coalm_nemo.models.llama import LlamaConfig

CONFIGS = st.builds(
    lambda layers, kv_heads, heads_per_group, head_dim, hidden, ffn, vocab, tied: LlamaConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_size=ffn,
        num_heads=kv_heads * heads_per_group,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        max_positions=16,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=None,
        tied_embeddings=tied,
        dtype="bfloat16",
    ),
    layers=st.integers(1, 4),
    kv_heads=st.integers(1, 5),
    heads_per_group=st.integers(1, 5),
    head_dim=st.integers(1, 6),
    hidden=st.integers(1, 9),
    ffn=st.integers(1, 9),
    vocab=st.integers(1, 30),
    tied=st.booleans(),
)


@given(CONFIGS)
@settings(max_examples=150, deadline=None)
def test_every_hf_row_lands_exactly_once(cfg: LlamaConfig) -> None:
    landed = Counter(
        (block.name, row)
        for piece in megatron_slices(cfg)
        for block in piece.blocks
        for row in range(block.row, block.row + block.rows)
    )
    rows = {t.name: t.shape[0] if len(t.shape) == 2 else 1 for t in hf_tensors(cfg)}
    assert landed == Counter({(name, row): 1 for name, count in rows.items() for row in range(count)})


@given(CONFIGS)
@settings(max_examples=150, deadline=None)
def test_the_inverse_gives_every_row_back(cfg: LlamaConfig) -> None:
    megatron_rows = {
        (piece.key, piece.layer): [(b.name, r) for b in piece.blocks for r in range(b.row, b.row + b.rows)]
        for piece in megatron_slices(cfg)
    }
    for name, blocks in hf_sources(cfg).items():
        rows = [megatron_rows[b.key, b.layer][r] for b in blocks for r in range(b.row, b.row + b.rows)]
        assert rows == [(name, row) for row in range(len(rows))]


@given(CONFIGS)
@settings(max_examples=50, deadline=None)
def test_both_sides_have_all_parameters(cfg: LlamaConfig) -> None:
    assert sum(prod(t.shape) for t in hf_tensors(cfg)) == cfg.num_parameters()
    assert sum(prod(piece.shape) for piece in megatron_slices(cfg)) == cfg.num_parameters()
    for piece in megatron_slices(cfg):
        assert piece.rows == sum(block.rows for block in piece.blocks)


def test_llama_405b_has_1137_tensors() -> None:
    cfg = LlamaConfig(126, 16384, 53248, 128, 8, 128, 128256, 131072, 1e-5, 5e5, None, False, "bfloat16")
    assert len(hf_tensors(cfg)) == 1137  # 126 layers of nine, the embedding, the last norm and the head
    assert cfg.num_parameters() == 405_853_388_800
    shapes = {piece.key: piece.global_shape for piece in megatron_slices(cfg)}
    assert shapes["decoder.layers.self_attention.linear_qkv.weight"] == (126, 18432, 16384)
    assert shapes["decoder.layers.mlp.linear_fc1.weight"] == (126, 106496, 16384)
    assert len(extra_state_keys(cfg)) == 126 * 5 + 1


def test_conversion_loads_neither_torch_nor_megatron() -> None:
    """The promise behind the start-up time and the memory: a conversion that keeps dtypes needs none of them."""
    modules = [p.stem for p in (Path(__file__).parents[2] / "coalm_nemo/checkpoint").glob("*.py") if p.stem[0] != "_"]
    script = f"""
import importlib, sys
for name in {modules}: importlib.import_module("coalm_nemo.checkpoint." + name)
print([m for m in ("torch", "megatron", "transformer_engine", "triton", "transformers", "numpy") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
