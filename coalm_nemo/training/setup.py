"""megatron-core's objects for a run: process groups, model chunks under DDP, optimizer, learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from coalm_nemo.config import RunConfig
from coalm_nemo.cpu_compat import fuse_adam
from coalm_nemo.models.gpt import FP8_RECIPES, LlamaModel, build_chunks
from coalm_nemo.models.llama import LlamaConfig
from coalm_nemo.models.lora import seed_dropout
from coalm_nemo.platform import Platform
from coalm_nemo.training.ranks import Ranks


@dataclass
class Trainee:
    """What is trained: this rank's share of model and optimizer."""

    chunks: list[Any]
    """LlamaModel wrapped in DistributedDataParallel, one a pipeline chunk."""
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    def models(self) -> list[LlamaModel]:
        """The chunks without their DDP wrapper."""
        return [chunk.module for chunk in self.chunks]


def start_process_groups(run: RunConfig, platform: Platform, ranks: Ranks, store: Any) -> None:
    """torch.distributed's world and megatron-core's groups over it."""
    platform.activate(ranks.local_rank)
    torch.distributed.init_process_group(
        platform.backend,
        store=torch.distributed.PrefixStore("world", store),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(minutes=30),
    )
    initialize_parallel_state(run)
    seed_everything(run.run.seed, 0, graphs=run.speed.cuda_graphs)


def initialize_parallel_state(run: RunConfig) -> None:
    """megatron-core's groups over torch.distributed's world."""
    parallel = run.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        create_gloo_process_groups=False,
    )


def stop_process_groups() -> None:
    """Take down what `start_process_groups` set up."""
    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def seed_everything(seed: int, step: int, *, graphs: bool = False) -> None:
    """Random state as a pure function of (seed, step): a resumed run draws the same numbers on any layout.

    megatron-core adds the ranks' own offsets to the seed. `graphs`: of a kind that CUDA graphs can record.
    """
    mixed = (seed * 1_000_003 + step * 9_176) % (2**31)
    torch.default_generator.manual_seed(mixed)  # torch.manual_seed would also queue a seed for a GPU that is not there
    seed_dropout(mixed)
    model_parallel_cuda_manual_seed(mixed, force_reset_rng=True, use_cudagraphable_rng=graphs)


def build_trainee(
    llama: LlamaConfig,
    run: RunConfig,
    platform: Platform,
    total_steps: int,
    load_weights: Callable[[list[LlamaModel]], None],
) -> Trainee:
    """Model, DDP, optimizer and schedule. The weights are loaded before the optimizer copies them as its masters."""
    models = build_chunks(llama, run, platform)
    load_weights(models)
    chunks = wrap_chunks(models, run)
    optimizer = get_megatron_optimizer(optimizer_config(run), chunks, use_gloo_process_groups=False)
    fuse_adam(inner_optimizers(optimizer))
    connect(models[0].config, chunks, optimizer, run)
    return Trainee(chunks, optimizer, build_scheduler(optimizer, run, total_steps))


def inner_optimizers(optimizer: Any) -> list[Any]:
    """The torch (or Transformer Engine) optimizers inside megatron-core's wrappers."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [o.optimizer for o in chained if getattr(o, "optimizer", None) is not None]


def wrap_chunks(models: list[LlamaModel], run: RunConfig) -> list[Any]:
    """DDP around each chunk, which accumulates and reduces gradients in `precision.gradients`."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=run.precision.gradients == "fp32",
        overlap_grad_reduce=run.parallel.overlap_grad_reduce,
        overlap_param_gather=run.parallel.overlap_param_gather,
        use_distributed_optimizer=run.parallel.distributed_optimizer,
        fp8_param_gather=run.precision.fp8_params,
        check_for_nan_in_grad=False,  # the step checks the loss and the norm itself and says which rows it was
    )
    chunks: list[Any] = [
        # As in Megatron-LM's training.py: only the first chunk's gradients can be reduced bucket by bucket.
        DistributedDataParallel(m.config, config, m, disable_bucketing=number > 0)
        for number, m in enumerate(models)
    ]
    if run.lora.base != "nf4":  # then every rank has what it loaded, and weights without memory cannot be sent
        for chunk in chunks:
            chunk.broadcast_params()
    return chunks


def optimizer_config(run: RunConfig) -> OptimizerConfig:
    """AdamW with fp32 masters and moments."""
    o = run.optimizer
    bf16 = run.precision.weights == "bfloat16"
    return OptimizerConfig(
        optimizer="adam",
        lr=o.lr,
        min_lr=o.min_lr,
        weight_decay=o.weight_decay,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        adam_eps=o.eps,
        clip_grad=o.clip_grad or float("inf"),  # 0 means no clipping, but the norm is wanted all the same
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=run.parallel.distributed_optimizer,
        overlap_param_gather=run.parallel.overlap_param_gather,
        fp8_recipe=FP8_RECIPES.get(run.precision.fp8),
        **_moments(run),
    )


def _moments(run: RunConfig) -> dict[str, Any]:
    """Adam's moments in bf16 are the precision-aware optimizer's; masters stay fp32."""
    if run.optimizer.moments == "fp32":
        return {}
    moments, gradients = torch.bfloat16, {"fp32": torch.float32, "bf16": torch.bfloat16}[run.precision.gradients]
    return {
        "use_precision_aware_optimizer": True,
        "main_grads_dtype": gradients,
        "exp_avg_dtype": moments,
        "exp_avg_sq_dtype": moments,
    }


def connect(config: Any, chunks: list[Any], optimizer: MegatronOptimizer, run: RunConfig) -> None:
    """Tell the schedules how to synchronise gradients and parameters."""
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    if run.parallel.overlap_grad_reduce:
        config.no_sync_func = _one_or_list([c.no_sync for c in chunks])
        if len(chunks) > 1:
            config.grad_sync_func = [c.start_grad_sync for c in chunks]
    if run.parallel.overlap_param_gather and len(chunks) > 1:
        config.param_sync_func = [c.start_param_sync for c in chunks]


def _one_or_list(functions: list[Any]) -> Any:
    return functions[0] if len(functions) == 1 else functions


def warmup_steps(run: RunConfig, total_steps: int) -> int:
    """Steps of warm-up: as asked, or the ratio of all steps; a constant schedule has one only if asked."""
    asked = run.schedule.warmup_steps
    if asked >= 0:
        return asked
    return 0 if run.schedule.name == "constant" else int(run.schedule.warmup_ratio * total_steps)


def build_scheduler(optimizer: MegatronOptimizer, run: RunConfig, total_steps: int) -> OptimizerParamScheduler:
    """Learning rate and weight decay by step. Weight-decay multipliers take effect only through it."""
    warmup = warmup_steps(run, total_steps)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=run.optimizer.lr,
        min_lr=run.optimizer.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=max(total_steps, warmup + 1),
        lr_decay_style=run.schedule.name,
        start_wd=run.optimizer.weight_decay,
        end_wd=run.optimizer.weight_decay,
        wd_incr_steps=max(total_steps, 1),
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
