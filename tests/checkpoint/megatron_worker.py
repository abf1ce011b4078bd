"""What runs in spawned gloo processes: megatron-core itself loads and saves checkpoints of a tiny Llama."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from helpers import load_weights

from coalm_nemo.config import RunConfig
from coalm_nemo.models.llama import LlamaConfig, load_llama_config

Job = tuple[int, int, Path, Path, Path, dict[str, Any]]
"""TP, PP, HF directory, checkpoint to load, where to save, save options."""


def spawn(world_size: int, jobs: list[Job], rendezvous: Path) -> None:
    """Run `jobs` one after another in `world_size` fresh processes."""
    torch.multiprocessing.spawn(_run, (world_size, jobs, rendezvous), nprocs=world_size)  # type: ignore[no-untyped-call]


def _run(rank: int, world_size: int, jobs: list[Job], rendezvous: Path) -> None:
    warnings.filterwarnings("ignore")
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    from megatron.core import parallel_state

    from coalm_nemo.platform import choose_platform

    choose_platform("cpu").activate(0)
    torch.distributed.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=world_size)
    for tensor, pipeline, hf, source, target, options in jobs:
        parallel_state.initialize_model_parallel(tensor, pipeline)
        _load_and_save(tensor, pipeline, hf, source, target, options)
        parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def _load_and_save(tensor: int, pipeline: int, hf: Path, source: Path, target: Path, options: dict[str, Any]) -> None:
    from megatron.core import dist_checkpointing

    from coalm_nemo.models.gpt import build_chunks
    from coalm_nemo.platform import choose_platform

    llama, run = load_llama_config(hf), RunConfig()
    run.parallel.tensor, run.parallel.pipeline = tensor, pipeline
    run.precision.dtype = {"float32": "fp32", "bfloat16": "bf16"}[llama.dtype]
    run.train.seq_len_tokens = 64
    (model,) = build_chunks(llama, run, choose_platform("cpu"))
    template = model.sharded_state_dict()
    assert any(key.endswith("_extra_state") for key in template)  # so they must be in the checkpoint
    model.load_state_dict(dist_checkpointing.load(template, str(source)))
    if tensor * pipeline == 1:
        compare(model.state_dict(), expected_weights(llama, load_weights(hf)))
    if torch.distributed.get_rank() == 0:
        target.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(training_state(model, options), str(target))


def training_state(model: Any, metadata: dict[str, Any]) -> dict[str, Any]:
    """What a training checkpoint holds besides the weights: moments, random states, counters."""
    from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor

    moments = {}
    for name, value in model.sharded_state_dict(metadata=metadata).items():
        if isinstance(value, ShardedTensor):
            moments[name] = replace(value, key=f"optimizer.state.exp_avg.{value.key}")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return {
        "model": model.sharded_state_dict(metadata=metadata),
        "optimizer": moments,
        "rng": ShardedObject("rng_state", torch.get_rng_state(), (size,), (rank,)),
        "iteration": 7,
        "args": {"lr": 1e-5},
    }


def expected_weights(cfg: LlamaConfig, hf: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Megatron's weights built from Hugging Face's by reshaping, apart from the package's own mapping."""
    groups, d, h = cfg.num_kv_heads, cfg.head_dim, cfg.hidden_size
    weights = {
        "embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
    }
    if not cfg.tied_embeddings:
        weights["output_layer.weight"] = hf["lm_head.weight"]
    for i in range(cfg.num_layers):
        theirs, ours = f"model.layers.{i}", f"decoder.layers.{i}"
        q, k, v = (hf[f"{theirs}.self_attn.{p}_proj.weight"].view(groups, -1, d, h) for p in "qkv")
        weights |= {
            f"{ours}.input_layernorm.weight": hf[f"{theirs}.input_layernorm.weight"],
            f"{ours}.self_attention.linear_qkv.weight": torch.cat([q, k, v], dim=1).reshape(-1, h),
            f"{ours}.self_attention.linear_proj.weight": hf[f"{theirs}.self_attn.o_proj.weight"],
            f"{ours}.pre_mlp_layernorm.weight": hf[f"{theirs}.post_attention_layernorm.weight"],
            f"{ours}.mlp.linear_fc1.weight": torch.cat([hf[f"{theirs}.mlp.{p}_proj.weight"] for p in ("gate", "up")]),
            f"{ours}.mlp.linear_fc2.weight": hf[f"{theirs}.mlp.down_proj.weight"],
        }
    return weights


def compare(loaded: dict[str, Any], expected: dict[str, torch.Tensor]) -> None:
    weights = {name: value for name, value in loaded.items() if not name.endswith("_extra_state")}
    assert weights.keys() == expected.keys(), weights.keys() ^ expected.keys()
    for name, value in expected.items():
        assert weights[name].dtype == value.dtype, name
        assert torch.equal(weights[name], value), name
