"""RunConfig -> NeMo's trainer, strategy, precision plugin and optimizer, as `nemo_run.Config`s."""

from __future__ import annotations

from typing import Any

from coalm_nemo.config import RunConfig
from coalm_nemo.models.gpt import speed_arguments
from coalm_nemo.speed import defers_embedding, overlaps_tensor
from coalm_nemo.validate import Layout
from recipes.nemo.model import DEFERRAL


def trainer(run: RunConfig, layout: Layout, steps: int, nodes: int, gpus_per_node: int) -> Any:
    """Lightning's trainer over `nodes` x `gpus_per_node` GPUs."""
    import nemo_run
    from nemo import lightning as nl

    every = run.train.eval_interval_steps
    validates = bool(run.data.validation or run.data.validation_fraction)
    return nemo_run.Config(
        nl.Trainer,
        accelerator="gpu",
        devices=gpus_per_node,
        num_nodes=nodes,
        max_steps=steps,
        strategy=strategy(run, layout),
        plugins=precision(run),
        callbacks=callbacks(run),
        accumulate_grad_batches=1,
        use_distributed_sampler=False,
        log_every_n_steps=run.logging.console_interval_steps,
        # 1.0: after the last step, and NeMo then also saves whatever the interval has left over
        val_check_interval=every or 1.0,
        check_val_every_n_epoch=None if every else 1,
        limit_val_batches=1.0 if validates else 0,
        num_sanity_val_steps=0,
    )


def callbacks(run: RunConfig) -> list[Any]:
    """What NeMo does beside the steps: it sets up the overlap's buffers, and collects garbage on all ranks at once."""
    import nemo.collections.llm  # noqa: F401  (the callbacks import it in a ring, which has to be entered here)
    import nemo_run
    from nemo.lightning.pytorch.callbacks.garbage_collection import GarbageCollectionCallback
    from nemo.lightning.pytorch.callbacks.megatron_comm_overlap import MegatronCommOverlapCallback

    found = []
    if overlaps_tensor(run) or defers_embedding(run):
        kernels = speed_arguments(run)
        found.append(
            nemo_run.Config(
                MegatronCommOverlapCallback,  # it also sets what it is not told, so it is told all that the recipe decides
                tp_comm_overlap=overlaps_tensor(run),
                tp_comm_bootstrap_backend="nccl",
                overlap_p2p_comm=run.parallel.virtual_pipeline > 1,
                batch_p2p_comm=run.parallel.virtual_pipeline == 1,
                overlap_grad_reduce=run.parallel.overlap_grad_reduce,
                overlap_param_gather=run.parallel.overlap_param_gather,
                align_param_gather=False,
                **{name: kernels.get(name, nothing) for name, nothing in DEFERRAL.items()},
            )
        )
    if every := run.speed.collect_interval_steps:
        found.append(nemo_run.Config(GarbageCollectionCallback, gc_interval_train=every, gc_interval_val=every))
    return found


def strategy(run: RunConfig, layout: Layout) -> Any:
    """Layout, data parallelism and checkpoints."""
    import nemo_run
    from megatron.core.distributed import DistributedDataParallelConfig
    from nemo import lightning as nl

    parallel = run.parallel
    return nemo_run.Config(
        nl.MegatronStrategy,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        sequence_parallel=layout.sequence_parallel,
        account_for_embedding_in_pipeline_split=parallel.count_embedding_and_loss,
        account_for_loss_in_pipeline_split=parallel.count_embedding_and_loss,
        pipeline_dtype=weights_dtype(run),
        ddp=nemo_run.Config(
            DistributedDataParallelConfig,
            grad_reduce_in_fp32=run.precision.gradients == "fp32",
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            use_distributed_optimizer=parallel.distributed_optimizer,
            fp8_param_gather=run.precision.fp8_params,
            check_for_nan_in_grad=True,  # `coalm train` checks the loss itself; nobody else does here
        ),
        gradient_as_bucket_view=True,
        ckpt_async_save=run.checkpoint.async_save,
        ckpt_load_strictness="log_all",  # a base converted in BF16 has no FP8 scales
        progress_interval=run.logging.console_interval_steps,
    )


def weights_dtype(run: RunConfig) -> Any:
    """Of weights outside the optimizer, and of what crosses the pipeline."""
    import torch

    return getattr(torch, run.precision.weights)


def precision(run: RunConfig) -> Any:
    """What the plugin says wins over the model's, the optimizer's and DDP's own fields."""
    import nemo_run
    from nemo import lightning as nl

    return nemo_run.Config(
        nl.MegatronMixedPrecision,
        precision="bf16-mixed" if run.precision.weights == "bfloat16" else "32",
        params_dtype=weights_dtype(run),
        pipeline_dtype=weights_dtype(run),
        autocast_enabled=False,
        grad_reduce_in_fp32=run.precision.gradients == "fp32",
        **_fp8(run),
    )


def _fp8(run: RunConfig) -> dict[str, Any]:
    from coalm_nemo.models.gpt import FP8_RECIPES

    precision = run.precision
    if not precision.fp8:
        return {}
    start, end, delayed = precision.bf16_layers_at_start, precision.bf16_layers_at_end, precision.fp8 == "delayed"
    return {
        "fp8": "hybrid",
        "fp8_recipe": FP8_RECIPES[precision.fp8],
        "fp8_param_gather": precision.fp8_params,
        "fp8_wgrad": precision.fp8_weight_gradients,
        "fp8_amax_history_len": precision.amax_history_len if delayed else 1,
        "fp8_amax_compute_algo": "max" if delayed else "most_recent",
        "first_last_layers_bf16": bool(start or end),
        "num_layers_at_start_in_bf16": start,
        "num_layers_at_end_in_bf16": end,
    }


def optimizer(run: RunConfig, steps: int) -> Any:
    """AdamW and the schedule."""
    import nemo_run
    from megatron.core.optimizer import OptimizerConfig
    from nemo import lightning as nl

    from coalm_nemo.training.setup import warmup_steps
    from recipes.nemo.schedule import MegatronSchedule

    o = run.optimizer
    config = nemo_run.Config(
        OptimizerConfig,
        optimizer="adam",
        lr=o.lr,
        min_lr=o.min_lr,
        weight_decay=o.weight_decay,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        adam_eps=o.eps,
        clip_grad=o.clip_grad or float("inf"),  # 0 means no clipping, but the norm is wanted all the same
        bf16=run.precision.weights == "bfloat16",
        params_dtype=weights_dtype(run),
        use_distributed_optimizer=run.parallel.distributed_optimizer,
        overlap_param_gather=run.parallel.overlap_param_gather,
        **_moments(run),
    )
    schedule = nemo_run.Config(
        MegatronSchedule,
        name=run.schedule.name,
        warmup_steps=warmup_steps(run, steps),
        max_steps=steps,
        min_lr=o.min_lr,
    )
    return nemo_run.Config(nl.MegatronOptimizerModule, config=config, lr_scheduler=schedule)


def _moments(run: RunConfig) -> dict[str, Any]:
    import torch

    if run.optimizer.moments == "fp32":
        return {}
    gradients = torch.float32 if run.precision.gradients == "fp32" else torch.bfloat16
    return {
        "use_precision_aware_optimizer": True,
        "main_grads_dtype": gradients,
        "exp_avg_dtype": torch.bfloat16,
        "exp_avg_sq_dtype": torch.bfloat16,
    }
