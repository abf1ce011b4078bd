"""Memory of a GPU by part, on the pipeline stages that can be the fullest.

Bytes are counted from what the layers keep, after Korthikanti et al. 2022 (arXiv 2205.05198, section 4) with SwiGLU,
grouped queries, flash attention and Transformer Engine's FP8 in place of GPT-3's layer. Nothing here is fitted.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from coalm_nemo.models.llama import LlamaConfig
from coalm_nemo.planning.flops import linear_parameters, lora_parameters
from coalm_nemo.planning.hardware import GIB
from coalm_nemo.planning.job import Job, Layout
from coalm_nemo.planning.pipeline import (
    chunk_bf16_layers,
    chunk_layers,
    chunk_passes_in_flight,
    deciding_stages,
    layers_in_flight,
)

CUDA_CONTEXT = 0.9 * GIB
"""CUDA context, loaded kernels, cuBLAS and cuDNN workspaces: outside or beside torch's allocator. Assumed."""
NCCL_A_GROUP = 0.3 * GIB
"""Channel buffers of one kind of communicator with NVLS off. Assumed."""
FRAGMENTATION = 0.02
"""Of what is allocated, lost between blocks with `expandable_segments:True`. Assumed."""
GATHERING, SCATTERING = 8, 4
"""Buffers of a layer that gather, in its own precision, and that scatter, in BF16: Transformer Engine's
pytorch/module/base.py, `initialize_ub`. Allocated beside torch's allocator."""
LOGIT_BYTES = 10
"""A logit in BF16, in FP32, and its FP32 exponential, which the vocabulary-parallel loss keeps for its gradient."""


@dataclass(frozen=True)
class Parts:
    """Bytes of one GPU, by what they are for."""

    weights: float
    fp8_copies: float
    """Transposes of FP8 weights (Hopper multiplies rows by rows only), or both FP8 forms beside BF16 weights."""
    gradients: float
    optimizer: float
    activations: float
    logits: float
    work: float
    """What lives inside one layer's pass."""
    overlap: float
    """Userbuffers of overlapped tensor parallelism. These four are not in torch's count of allocated bytes."""
    nccl: float
    """Communication buffers."""
    fragmentation: float
    cuda: float
    """CUDA context and libraries."""

    @property
    def reserve(self) -> float:
        return self.overlap + self.nccl + self.fragmentation + self.cuda

    @property
    def allocated(self) -> float:
        """What `torch.cuda.max_memory_allocated` would show."""
        return self.total - self.reserve

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))


NF4_BYTES = 4.5 / 8
"""Bytes a weight of models/nf4.py: 4 bits, and an fp32 scale for 64."""
NF4_WORK = 2
"""Bytes a weight of the largest matrix while it is BF16."""


@dataclass(frozen=True)
class Memory:
    """The first stage, which logs show, and the fullest one, which decides."""

    first: Parts
    worst: Parts
    worst_stage: int


def memory(job: Job, layout: Layout) -> Memory:
    """Peak memory of a GPU on the first and on the fullest pipeline stage."""
    parts = {stage: stage_memory(job, layout, stage) for stage in deciding_stages(layout)}
    worst = max(parts, key=lambda s: parts[s].total)
    return Memory(parts[0], parts[worst], worst)


def stage_memory(job: Job, layout: Layout, stage: int) -> Parts:
    """Bytes of a GPU of one pipeline stage at its fullest."""
    linear, other = stage_parameters(job.model, layout, stage)
    trained = linear + other if job.trains_all else _adapters(job, layout, stage)
    weights, copies = weight_bytes(job, layout, stage)
    activations = _activations(job, layout, stage)
    logits = _logits(job, layout, stage)
    work = _work(job, layout)
    gradients, optimizer = layout.gradient_bytes * trained, optimizer_bytes(job, layout, trained)
    allocated = weights + copies + gradients + optimizer + activations + logits + work
    reserve = _userbuffers(job, layout), _nccl(job, layout), FRAGMENTATION * allocated, CUDA_CONTEXT
    return Parts(weights, copies, gradients, optimizer, activations, logits, work, *reserve)


def stage_parameters(model: LlamaConfig, layout: Layout, stage: int) -> tuple[float, float]:
    """Weights of a stage on one tensor-parallel rank: of its linear layers, and all others (norms, embedding, head)."""
    layers, h = sum(chunk_layers(model, layout, stage)), model.hidden_size
    linear = layers * linear_parameters(model) / layout.tensor
    other = float(layers * 2 * h)
    vocabulary = model.padded_vocab_size(layout.tensor) * h / layout.tensor
    last = stage == layout.pipeline - 1
    if stage == 0:
        other += vocabulary
    if last:
        other += h + (vocabulary if not (model.tied_embeddings and stage == 0) else 0)
    return linear, other


def _adapters(job: Job, layout: Layout, stage: int) -> float:
    """Adapter weights on one rank."""
    layers = sum(chunk_layers(job.model, layout, stage))
    return layers * lora_parameters(job.model, job.lora_rank, job.lora_targets, layout.tensor)


def weight_bytes(job: Job, layout: Layout, stage: int) -> tuple[float, float]:
    """Bytes of a stage's weights, adapters too, and of their further FP8 forms."""
    linear, other = stage_parameters(job.model, layout, stage)
    if job.nf4_base:
        return NF4_BYTES * linear + 2 * (other + _adapters(job, layout, stage)), 0.0
    eight = fp8_linear(job, layout, stage)
    other += 0.0 if job.trains_all else _adapters(job, layout, stage)
    if layout.fp8_params:
        return eight + 2 * (linear - eight + other), eight
    return 2 * (linear + other), 2 * eight


def fp8_linear(job: Job, layout: Layout, stage: int) -> float:
    """Weights of a stage's linear layers that compute in FP8."""
    if job.precision != "fp8":
        return 0.0
    layers = sum(chunk_layers(job.model, layout, stage)) - sum(chunk_bf16_layers(job.model, layout, stage))
    return layers * linear_parameters(job.model) / layout.tensor


def optimizer_bytes(job: Job, layout: Layout, trained: float) -> float:
    """FP32 master weights and two moments, split over data- and context-parallel ranks if the optimizer is distributed."""
    shards = layout.data_parallel(job.gpus) * layout.context if layout.distributed_optimizer else 1
    return trained * (4 + 2 * layout.moment_bytes) / shards


def layer_activation_bytes(job: Job, layout: Layout) -> float:
    """What one layer keeps of one token for its backward pass, on one rank.

    Norms keep their input, attention q, k, v and its output, SwiGLU its input: BF16. A linear layer that gets weight
    gradients keeps its input: one byte in FP8, two in BF16 (attention's output is there already). Under LoRA only
    layers with adapters keep their input, in BF16 whatever the base computes in.
    """
    m, t, split = job.model, layout.tensor, layout.sequence_split
    h, f, q = m.hidden_size, m.ffn_size, m.num_heads * m.head_dim
    if layout.recompute == "full":
        return 2 * h / split
    eight = job.precision == "fp8" and job.trains_all and layout.fp8_weight_gradients
    one = 1 if eight else 2
    norms = 2 * 2 * h + one * h * (_keeps(job, "q", "k", "v") + _keeps(job, "gate", "up"))
    attention = 2 * m.qkv_rows + 2 * q + (1 * q if eight else 0)
    if layout.recompute == "selective" and eight:
        attention -= 2 * q
    swiglu = 2 * 2 * f + one * f * _keeps(job, "down")
    return norms / split + (attention + swiglu) / t


def _keeps(job: Job, *projections: str) -> bool:
    """Whether the input of these projections is kept for weight gradients, theirs or their adapters'."""
    return job.trains_all or not job.adapted.isdisjoint(projections)


def _activations(job: Job, layout: Layout, stage: int) -> float:
    passes = chunk_passes_in_flight(layout, layout.micro_batches(job), stage)
    kept = layers_in_flight(chunk_layers(job.model, layout, stage), passes) * layer_activation_bytes(job, layout)
    if bf16 := layers_in_flight(chunk_bf16_layers(job.model, layout, stage), passes):
        more = layer_activation_bytes(replace(job, precision="bf16"), layout) - layer_activation_bytes(job, layout)
        kept += bf16 * more
    return kept * layout.tokens_a_pass(job)


def _logits(job: Job, layout: Layout, stage: int) -> float:
    """Logits and what the loss makes of them; one micro-batch at a time, on the last stage."""
    if stage != layout.pipeline - 1:
        return 0.0
    return LOGIT_BYTES * layout.tokens_a_pass(job) * job.model.padded_vocab_size(layout.tensor) / layout.tensor


def _work(job: Job, layout: Layout) -> float:
    """One layer's backward pass: gathered input, output before its reduce-scatter, gradients of fc1 and SwiGLU.

    The first two are in the userbuffers, where there are any.
    """
    m, t = job.model, layout.tensor
    inside = 8 * m.ffn_size / t + (0 if _overlaps(job, layout) else 2 * 2 * m.hidden_size)
    if layout.recompute == "full":  # the layer that is being run again
        kept = Layout(tensor=t, sequence=layout.sequence)
        inside += layer_activation_bytes(job, kept)
    made = NF4_WORK * m.hidden_size * 2 * m.ffn_size / t if job.nf4_base else 0.0
    return inside * layout.tokens_a_pass(job) + made


def _overlaps(job: Job, layout: Layout) -> bool:
    return layout.tensor_overlap and layout.tensor > 1 and layout.sequence and job.trains_all


def _userbuffers(job: Job, layout: Layout) -> float:
    """One buffer [tokens, hidden] for each of a layer's products that communicates, of each precision that layers have."""
    if not _overlaps(job, layout):
        return 0.0
    eight = job.precision == "fp8"
    both = eight and layout.bf16_layers_at_start + layout.bf16_layers_at_end > 0
    bytes_an_element = (GATHERING + 2 * SCATTERING) * eight + 2 * (GATHERING + SCATTERING) * (both or not eight)
    return bytes_an_element * layout.tokens_a_pass(job) * job.model.hidden_size


def _nccl(job: Job, layout: Layout) -> float:
    sizes = (layout.tensor, layout.pipeline, layout.context, layout.data_parallel(job.gpus))
    return NCCL_A_GROUP * (1 + sum(size > 1 for size in sizes)) if job.gpus > 1 else 0.0
