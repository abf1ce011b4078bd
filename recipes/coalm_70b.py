"""CoALM 70B, from Llama-3.3-70B-Instruct."""

from __future__ import annotations

from coalm_nemo.config import RunConfig
from recipes.cluster import full_sft, lora, paper, unpacked


def coalm_70b() -> RunConfig:
    """Full fine-tuning on 32 H100: TP4 x PP4, 5 chunks a stage, the layout of NVIDIA's published SFT figures."""
    run = full_sft("70b")
    run.parallel.tensor, run.parallel.pipeline, run.parallel.virtual_pipeline = 4, 4, 5
    run.batch.global_size = 32
    return run


def coalm_70b_lora() -> RunConfig:
    """Adapters on 8 H100: two replicas of TP4, by the planner 7 % faster than one of TP8."""
    run = lora(coalm_70b())
    run.parallel.tensor, run.parallel.pipeline, run.parallel.virtual_pipeline = 4, 1, 1
    return run


def paper_70b_lora() -> RunConfig:
    """The paper's settings: LoRA r16 a32 on all linear layers, lr 1e-4, warm-up 0.1, batch 8, 3 epochs."""
    return paper(coalm_70b_lora())


def released_70b() -> RunConfig:
    """The public Oumi recipe: full fine-tuning, lr 4e-5, 24 warm-up steps, linear, batch 56, 1 epoch, clip 10.

    TP8, because FP32 gradients and moments do not fit at TP4.
    """
    run = unpacked(coalm_70b())
    run.parallel.tensor = 8
    run.run.dir = "runs/released_70b"
    run.batch.global_size = 56
    run.optimizer.lr, run.optimizer.clip_grad = 4e-5, 10.0
    run.schedule.warmup_steps = 24
    return run
