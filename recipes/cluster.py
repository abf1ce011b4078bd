"""What every H100 recipe shares; a recipe states only what differs."""

from __future__ import annotations

from coalm_nemo.config import RunConfig

ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # kernels start in the order they are issued: communication before compute
    "NVTE_FWD_LAYERNORM_SM_MARGIN": "8",  # leaves SMs to the communication that runs beside a norm
    "NVTE_BWD_LAYERNORM_SM_MARGIN": "8",
    "NCCL_NVLS_ENABLE": "0",  # saves memory: the planner counts without it
    "NCCL_AVOID_RECORD_STREAMS": "1",
    "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "TOKENIZERS_PARALLELISM": "false",
}


def full_sft(shape: str) -> RunConfig:
    """Full fine-tuning on packed rows in FP8 with current scaling, one epoch of CoALM-IT.

    AdamW, decay, warm-up and linear schedule are those of the released 70B (a public Oumi recipe, February 2025);
    gradient clipping is 1.0 instead of its 10, which clips nothing.
    """
    run = RunConfig()
    run.run.dir = f"runs/coalm_{shape}"
    run.run.environment = dict(ENVIRONMENT)
    run.model.shape = shape
    run.precision.dtype = "fp8_current"
    run.precision.fp8_params = True
    run.precision.gradients = "bf16"
    run.data.packing = True
    run.train.seq_len_tokens = 4096
    run.parallel.overlap_grad_reduce = True
    run.parallel.overlap_param_gather = True
    run.speed.tensor_overlap = run.speed.gradient_fusion = run.speed.fused_loss = True
    run.optimizer.lr = 2e-5
    run.optimizer.weight_decay = 0.01
    run.optimizer.clip_grad = 1.0
    run.schedule.name = "linear"
    run.schedule.warmup_ratio = 0.03
    run.checkpoint.save_interval_steps = 200
    run.checkpoint.async_save = True
    run.logging.wandb = "online"
    return run


def lora(run: RunConfig) -> RunConfig:
    """Adapters on every linear layer at the paper's rank, in BF16; the base is frozen, so there is little to reduce."""
    run.run.dir += "_lora"
    run.lora.rank, run.lora.alpha = 16, 32.0
    run.precision.dtype, run.precision.fp8_params, run.precision.gradients = "bf16", False, "fp32"
    run.optimizer.moments = "fp32"
    run.speed.tensor_overlap = run.speed.gradient_fusion = False
    run.optimizer.lr = 1e-4
    run.schedule.warmup_ratio = 0.1
    return run


def paper(run: RunConfig, epochs: int = 3) -> RunConfig:
    """The paper's settings (arXiv 2502.08820) on a LoRA recipe: r16 a32 on all linear layers, lr 1e-4, batch 8."""
    run = unpacked(run)
    run.run.dir = f"runs/paper_{run.model.shape}_lora"
    run.batch.global_size = 8
    run.train.epochs = epochs
    return run


def unpacked(run: RunConfig) -> RunConfig:
    """As both published settings: a row a sequence, padded, plain BF16."""
    run.precision.dtype, run.precision.fp8_params, run.precision.gradients = "bf16", False, "fp32"
    run.optimizer.moments = "fp32"
    run.data.packing = run.speed.tensor_overlap = False
    return run
