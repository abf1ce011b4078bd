"""FLOPs of a token in training, in both countings, and what the hardware really does.

Model FLOPs a token are 3 x (layers x (2 h^2 (2 + 2 kv/heads) + 6 h ffn + c 4 s h) + 2 h V): forward, and twice that
backward. c is 1/2 if attention is counted causal (newer published tables) and 1 if it is not (older ones); s is the
tokens a token's row holds, for packed rows the sum of squared lengths over the sum of lengths. Recomputation is not
counted in model FLOPs and is in hardware FLOPs (Korthikanti et al., arXiv 2205.05198, section 5).
"""

from __future__ import annotations

from dataclasses import dataclass

from coalm_nemo.models.llama import LlamaConfig
from coalm_nemo.planning.job import Job, Layout

CAUSAL, FULL = 0.5, 1.0
"""The two countings of attention."""


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs of one token by where they fall; attention counted causal."""

    linear: float
    """The linear layers of one transformer layer."""
    attention: float
    """Scores and weighted values of one transformer layer."""
    head: float
    """Projection onto the vocabulary."""
    adapters: float
    """LoRA's two small matrices beside each linear layer of one transformer layer; 0 without."""


def linear_parameters(model: LlamaConfig) -> int:
    """Weights of the linear layers of one transformer layer."""
    attention = model.qkv_rows * model.hidden_size + model.num_heads * model.head_dim * model.hidden_size
    return attention + 3 * model.ffn_size * model.hidden_size


ROW_PARALLEL = ("o", "down")
"""Projections whose input, not output, is split over tensor-parallel ranks."""


def lora_widths(model: LlamaConfig, targets: str) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each adapter of one layer; `qkv` is a single one beside the three fused projections."""
    h, f = model.hidden_size, model.ffn_size
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    if targets == "qkv":
        return {"qkv": (h, model.qkv_rows)}
    every = {"q": (h, q), "k": (h, kv), "v": (h, kv), "o": (q, h), "gate": (h, f), "up": (h, f), "down": (f, h)}
    return every if targets == "all" else {name: every[name] for name in targets.split(",")}


def lora_parameters(model: LlamaConfig, rank: int, targets: str = "all", tensor: int = 1) -> float:
    """Adapter weights of one layer on one of `tensor` ranks: the wide side on the layer's split one is split too."""
    total = 0.0
    for name, (inputs, outputs) in lora_widths(model, targets).items():
        total += inputs / tensor + outputs if name in ROW_PARALLEL else inputs + outputs / tensor
    return rank * total


def forward_flops(model: LlamaConfig, attended: float, adapters: float = 0) -> Flops:
    """Forward FLOPs of a token whose row holds `attended` tokens (mean over tokens); `adapters`: weights a layer."""
    return Flops(
        linear=2.0 * linear_parameters(model),
        attention=CAUSAL * 4 * attended * model.num_heads * model.head_dim,
        head=2.0 * model.hidden_size * model.vocab_size,
        adapters=2.0 * adapters,
    )


def job_forward_flops(job: Job) -> Flops:
    """Forward FLOPs of one token of a job."""
    adapters = 0 if job.trains_all else lora_parameters(job.model, job.lora_rank, job.lora_targets)
    return forward_flops(job.model, job.attended, adapters)


def model_flops_per_token(
    model: LlamaConfig, attended: float, counting: float = CAUSAL, method: str = "full", adapters: float = 0
) -> float:
    """Model FLOPs a token of training; `method` full | lora, `counting` CAUSAL or FULL, `adapters` weights a layer.

    LoRA: the frozen weights get no weight gradients (2/3 of the linear FLOPs), attention has no weights and is done in
    full, adapters get all three passes. The very first qkv needs no input gradient.
    """
    once = forward_flops(model, attended, adapters)
    attention = once.attention * counting / CAUSAL
    layers = model.num_layers
    if method == "full":
        return 3 * (layers * (once.linear + attention) + once.head)
    first_qkv = 2.0 * model.qkv_rows * model.hidden_size
    return layers * (2 * once.linear + 3 * attention + 3 * once.adapters) + 2 * once.head - first_qkv


def published_lora_flops_per_token(model: LlamaConfig, attended: float, counting: float = CAUSAL) -> float:
    """What published tables count for LoRA: two thirds of full training."""
    return model_flops_per_token(model, attended, counting) * 2 / 3


def job_flops_per_token(job: Job, counting: float = CAUSAL) -> float:
    """Model FLOPs a token of a job."""
    if job.trains_all:
        return model_flops_per_token(job.model, job.attended, counting)
    adapters = lora_parameters(job.model, job.lora_rank, job.lora_targets)
    return model_flops_per_token(job.model, job.attended, counting, "lora", adapters)


def hardware_flops_per_token(job: Job, layout: Layout) -> float:
    """What the GPUs do: model FLOPs (causal), flash attention's own recomputation, and the layers recomputed."""
    once = job_forward_flops(job)
    again = {"none": 0.0, "selective": once.attention, "full": once.linear + once.attention + once.adapters}
    flash = 0.5 * once.attention  # scores are formed again in the backward pass: 5 matrix products for 4
    return job_flops_per_token(job) + job.model.num_layers * (flash + again[layout.recompute])


def model_flops_utilisation(job: Job, tokens_per_s_per_gpu: float, counting: float = CAUSAL) -> float:
    """MFU of a running job against its precision's peak."""
    return tokens_per_s_per_gpu * job_flops_per_token(job, counting) / job.gpu.peak(job.precision)


def attended_tokens(sum_of_lengths: float, sum_of_squared_lengths: float) -> float:
    """Mean tokens of its row that a token sees, from the two sums a data set's manifest holds."""
    return sum_of_squared_lengths / sum_of_lengths
