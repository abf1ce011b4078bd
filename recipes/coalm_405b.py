"""CoALM 405B, from Llama-3.1-405B-Instruct."""

from __future__ import annotations

from coalm_nemo.config import RunConfig
from recipes.cluster import full_sft, lora, paper, unpacked


def coalm_405b() -> RunConfig:
    """Full fine-tuning on 128 H100: TP8 x PP16, 4 chunks a stage, the embedding and the loss counted as a layer each.

    BF16 gradients and moments make it fit; a batch of 128 packs keeps the pipeline's bubble under 3 %.
    """
    run = full_sft("405b")
    run.parallel.tensor, run.parallel.pipeline, run.parallel.virtual_pipeline = 8, 16, 4
    run.parallel.count_embedding_and_loss = True
    run.batch.global_size = 128
    run.optimizer.moments = "bf16"
    run.optimizer.lr = 1e-5
    return run


def coalm_405b_lora() -> RunConfig:
    """Adapters on 32 H100: TP8 x PP4, 8 chunks a stage."""
    run = lora(coalm_405b())
    run.parallel.pipeline, run.parallel.virtual_pipeline = 4, 8
    run.batch.global_size = 32
    return run


def coalm_405b_qlora() -> RunConfig:
    """Adapters over an NF4 base on one node of 8 H100: TP8, a quarter of the memory of `coalm_405b_lora`."""
    run = lora(coalm_405b())
    run.run.dir = "runs/coalm_405b_qlora"
    run.lora.base = "nf4"
    run.parallel.pipeline, run.parallel.virtual_pipeline = 1, 1
    run.parallel.count_embedding_and_loss = False
    run.batch.global_size = 32
    return run


def paper_405b_lora() -> RunConfig:
    """The paper's r16 a32, lr 1e-4, warm-up 0.1, batch 8, 1 epoch; the paper kept the base in NF4, this keeps it in BF16."""
    return paper(coalm_405b_lora(), epochs=1)


def released_405b_lora() -> RunConfig:
    """The public Oumi recipe: r16 a32 on all linear layers, lr 1e-4, warm-up 0.1, batch 16, 1 epoch; base BF16, not NF4."""
    run = unpacked(coalm_405b_lora())
    run.run.dir = "runs/released_405b_lora"
    run.batch.global_size = 16
    run.optimizer.clip_grad = 10.0
    return run
