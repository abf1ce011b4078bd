"""Fused and deferred weight gradients train as the plain ones do. Apex's kernel is CUDA's, so a plain one of the same
meaning stands in for it: what is tested is that everything around it, schedules and gradient buffers, fits together."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from coalm_nemo.config import RunConfig, build_config
from coalm_nemo.speed import FUSION_KERNEL
from coalm_nemo.training.callbacks.metrics_file import read_steps
from recipes import load_recipe

DEFER = "speed.defer_embedding_gradient=true"
OVERLAPPED = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]


def train_with_kernel(run: RunConfig) -> int:
    """`run_worker` where megatron-core finds the kernel."""
    import torch
    from megatron.core.tensor_parallel import layers

    from coalm_nemo.training import setup, worker

    def accumulate(inputs: torch.Tensor, gradient: torch.Tensor, buffer: torch.Tensor) -> None:
        accumulate.calls += 1  # type: ignore[attr-defined]
        buffer.add_((gradient.t() @ inputs).to(buffer.dtype))

    accumulate.calls = 0  # type: ignore[attr-defined]
    kernel: Any = ModuleType(FUSION_KERNEL)
    kernel.wgrad_gemm_accum_fp32 = kernel.wgrad_gemm_accum_fp16 = accumulate
    sys.modules[FUSION_KERNEL] = layers.fused_weight_gradient_mlp_cuda = kernel
    layers._grad_accum_fusion_available = True
    build = setup.build_chunks
    setup.build_chunks = lambda *args: [only_the_output_layer_defers(model) for model in build(*args)]
    worker.refuse_missing = lambda run, platform: None  # it would say that there is no CUDA
    code = worker.run_worker(run)
    return code if accumulate.calls else 9  # type: ignore[attr-defined]


def only_the_output_layer_defers(model: Any) -> Any:
    """As where the layers are Transformer Engine's: megatron-core's own would all look at the switch."""
    for layer in model.decoder.layers:
        for module in layer.modules():
            if hasattr(module, "embedding_activation_buffer"):
                module.config = copy.copy(module.config)
                module.config.defer_embedding_wgrad_compute = False
    return model


def configure(model: Path, rows: Path, run_dir: Path, *words: str) -> RunConfig:
    fixed = [
        f"run.dir={run_dir}", f"model.hf_path={model}", f"data.train={rows}", "train.steps=3", "precision.dtype=bf16",
        "optimizer.lr=1e-3", "checkpoint.save_final=false", "schedule.name=constant",
    ]  # fmt: skip
    return build_config(load_recipe("coalm_tiny"), [], [*fixed, *words])


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        pytest.param(1, [], id="fused"),
        pytest.param(4, ["parallel.pipeline=2", *OVERLAPPED], id="fused, two replicas, overlapped"),
        pytest.param(2, ["parallel.pipeline=2", DEFER, "speed.deferral_limit=3"], id="deferred"),
        pytest.param(4, ["parallel.pipeline=2", DEFER], id="deferred, two replicas"),
        pytest.param(2, ["parallel.pipeline=2", DEFER, "parallel.virtual_pipeline=2"], id="deferred, interleaved"),
        pytest.param(4, ["parallel.tensor=2", "parallel.pipeline=2", DEFER], id="deferred, TP2 with SP"),
    ],
)
def test_same_losses(
    ranks: int, words: list[str], ranks_pool: Any, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    layout = [w for w in words if w.startswith("parallel")]
    plain = configure(tiny_llama, rows_file, tmp_path / "plain", *layout)
    fused = configure(tiny_llama, rows_file, tmp_path / "fused", *words, "speed.gradient_fusion=true")
    assert ranks_pool.train(plain, ranks) == [0] * ranks
    assert ranks_pool.train(fused, ranks, worker=train_with_kernel) == [0] * ranks
    ours, theirs = (read_steps(Path(r.run.dir) / "metrics.jsonl") for r in (fused, plain))
    assert [s["lm_loss"] for s in ours] == pytest.approx([s["lm_loss"] for s in theirs], rel=2e-3)
    assert [s["grad_norm"] for s in ours] == pytest.approx([s["grad_norm"] for s in theirs], rel=1e-2)
