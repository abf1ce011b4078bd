"""Where each RunConfig field goes in NeMo's recipe, which have nowhere to go, and what NeMo 2.7 cannot do.

A test holds the two tables against RunConfig: a field that is in neither fails it.
"""

from __future__ import annotations

from coalm_nemo.config import RunConfig
from coalm_nemo.errors import UserError
from coalm_nemo.models.llama import LlamaConfig

MAPPED = {
    "run.dir": "log.log_dir",
    "run.platform": "trainer.accelerator",
    "run.seed": "data.seed",
    "run.environment": "the executor's env_vars",
    "model.hf_path": "model.tokenizer, data.hf_path",
    "model.checkpoint": "resume.restore_config.path",
    "model.shape": "model.config",
    "model.init": "resume.restore_config",
    "parallel.tensor": "trainer.strategy.tensor_model_parallel_size",
    "parallel.pipeline": "trainer.strategy.pipeline_model_parallel_size",
    "parallel.virtual_pipeline": "trainer.strategy.virtual_pipeline_model_parallel_size",
    "parallel.context": "trainer.strategy.context_parallel_size",
    "parallel.sequence": "trainer.strategy.sequence_parallel",
    "parallel.count_embedding_and_loss": "trainer.strategy.account_for_*_in_pipeline_split",
    "parallel.distributed_optimizer": "optim.config.use_distributed_optimizer",
    "parallel.overlap_grad_reduce": "trainer.strategy.ddp.overlap_grad_reduce",
    "parallel.overlap_param_gather": "trainer.strategy.ddp.overlap_param_gather",
    "lora.rank": "peft.dim",
    "lora.alpha": "peft.alpha",
    "lora.targets": "peft.target_modules",
    "precision.dtype": "trainer.plugins",
    "precision.bf16_layers_at_start": "trainer.plugins.num_layers_at_start_in_bf16",
    "precision.bf16_layers_at_end": "trainer.plugins.num_layers_at_end_in_bf16",
    "precision.fp8_params": "trainer.plugins.fp8_param_gather",
    "precision.gradients": "trainer.plugins.grad_reduce_in_fp32",
    "precision.fp8_weight_gradients": "trainer.plugins.fp8_wgrad",
    "precision.amax_history_len": "trainer.plugins.fp8_amax_history_len",
    "speed.tensor_overlap": "trainer.callbacks, model.config.tp_comm_overlap",
    "speed.gradient_fusion": "model.config.gradient_accumulation_fusion",
    "speed.defer_embedding_gradient": "model.config.defer_embedding_wgrad_compute",
    "speed.deferral_limit": "model.config.wgrad_deferral_limit",
    "speed.fused_loss": "model.config.cross_entropy_loss_fusion",
    "speed.collect_interval_steps": "trainer.callbacks",
    "batch.global_size": "data.global_batch_size",
    "batch.micro_size": "data.micro_batch_size",
    "data.train": "data.train",
    "data.validation": "data.validation",
    "data.validation_fraction": "data.validation_fraction",
    "data.packing": "data.packing",
    "data.pack_multiple": "data.pack_multiple",
    "data.overlong": "data.overlong",
    "data.shuffle": "data.shuffle",
    "train.steps": "trainer.max_steps",
    "train.epochs": "trainer.max_steps, data.epochs",
    "train.seq_len_tokens": "model.config.seq_length, data.seq_length",
    "train.recompute": "model.config.recompute_*",
    "train.eval_interval_steps": "trainer.val_check_interval",
    "train.empty_rows": "data.empty_rows",
    "optimizer.lr": "optim.config.lr",
    "optimizer.min_lr": "optim.lr_scheduler.min_lr",
    "optimizer.weight_decay": "optim.config.weight_decay",
    "optimizer.clip_grad": "optim.config.clip_grad",
    "optimizer.beta1": "optim.config.adam_beta1",
    "optimizer.beta2": "optim.config.adam_beta2",
    "optimizer.eps": "optim.config.adam_eps",
    "optimizer.moments": "optim.config.exp_avg_dtype",
    "schedule.name": "optim.lr_scheduler.name",
    "schedule.warmup_steps": "optim.lr_scheduler.warmup_steps",
    "schedule.warmup_ratio": "optim.lr_scheduler.warmup_steps",
    "checkpoint.save_interval_steps": "log.ckpt.every_n_train_steps",
    "checkpoint.keep_last": "log.ckpt.save_top_k",
    "checkpoint.async_save": "trainer.strategy.ckpt_async_save",
    "checkpoint.resume": "resume.resume_if_exists",
    "logging.console_interval_steps": "trainer.log_every_n_steps, trainer.strategy.progress_interval",
    "logging.wandb": "log.wandb",
    "logging.wandb_project": "log.wandb.project",
    "logging.wandb_entity": "log.wandb.entity",
    "logging.wandb_name": "log.wandb.name",
}
"""RunConfig's key -> its place in the Partial."""

_WHILE_TRAINING = "NeMo does not let the model answer while it trains; use `coalm eval` on the export"
_WATCH = (
    "NeMo does not watch a run this way; its own callbacks for stragglers and hangs can be added to trainer.callbacks"
)

NO_COUNTERPART = {
    "run.layers": "NeMo's layers are Transformer Engine's",
    "precision.emulation_weights": "NeMo has no emulated FP8",
    "speed.cuda_graphs": "NeMo's own CUDA graphs are set on model.config",
    "speed.prefetch_steps": "NeMo's data loader has workers of its own",
    "lora.dropout": "NeMo draws it anew in every pass; ours is the same on every layout",
    "lora.base": "NeMo's adapters go with a base in its own precision",
    "lora.start_from": "NeMo loads no PEFT files",
    "data.prepare_timeout_s": "NeMo's ranks wait at a barrier for as long as their process group does",
    "checkpoint.milestone_interval_steps": "NeMo keeps the newest checkpoints, or all of them",
    "checkpoint.save_final": "NeMo always saves at the end",
    "evaluation.every_steps": _WHILE_TRAINING,
    "evaluation.data": _WHILE_TRAINING,
    "evaluation.rows": _WHILE_TRAINING,
    "evaluation.max_new_tokens": _WHILE_TRAINING,
    "logging.wandb_timeout_s": "Lightning's logger waits as long as W&B's own settings say",
    "logging.wandb_finish_s": "Lightning's logger waits as long as W&B's own settings say",
    "logging.loss_by_source": "NeMo logs the loss of the whole batch only",
    "health.hang_factor": _WATCH,
    "health.hang_floor_s": _WATCH,
    "health.hang_slow_s": _WATCH,
    "health.straggler_interval_steps": _WATCH,
    "health.straggler_ratio": _WATCH,
}
"""RunConfig's key -> why NeMo's recipe has no place for it. Set to anything but its default, it is an error."""


def refuse_impossible(run: RunConfig, llama: LlamaConfig) -> None:
    """Raises UserError for what the run asks of NeMo 2.7 in vain: nothing is dropped silently."""
    for key, why in NO_COUNTERPART.items():
        if _value(run, key) != _value(RunConfig(), key):
            raise UserError(f"{key}={_value(run, key)} has no counterpart in NeMo 2.7: {why}; leave it at its default")
    if run.run.platform == "cpu":
        raise UserError("run.platform=cpu: NeMo 2.7 trains on GPUs only; `coalm train` runs on CPUs")
    if run.precision.any_fp8 and not run.precision.fp8:
        raise UserError(
            f"precision.dtype={run.precision.dtype}: NeMo has Transformer Engine's FP8 only; use `coalm train`"
        )
    if run.model.init != "pretrained":
        raise UserError(f"model.init={run.model.init}: NeMo would draw other weights than ours; use `coalm train`")
    if run.data.packing and run.parallel.context > 1:
        raise UserError(
            "data.packing=true with parallel.context above 1: NeMo 2.7 cuts the pack, not its rows, into the ranks' parts, "
            "so a row would lose its order; use parallel.context=1, or `coalm train`"
        )
    if llama.padded_vocab_size(run.parallel.tensor) != llama.vocab_size:
        raise UserError(
            f"a vocabulary of {llama.vocab_size} does not divide by parallel.tensor={run.parallel.tensor}: NeMo lets the "
            "padding take part in the softmax; use a divisor, or `coalm train`"
        )
    if "q" in run.lora.targets and run.lora.rank and llama.num_heads * llama.head_dim != llama.hidden_size:
        raise UserError("lora.targets has q, and NeMo's adapter wants head_dim x heads to be the hidden size")


def refuse_saving(run: RunConfig, steps: int) -> None:
    """NeMo's last validation and last checkpoint fall on the last step only where the intervals allow it."""
    evaluate, save = run.train.eval_interval_steps, run.checkpoint.save_interval_steps
    if evaluate and (steps % evaluate or (save and steps % save)):
        raise UserError(
            f"train.eval_interval_steps={evaluate}: with it, NeMo validates and saves at the end only if it and "
            f"checkpoint.save_interval_steps divide the run's {steps} steps; change them, or set it to 0"
        )


def _value(run: RunConfig, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(run, section), name)
