"""Seconds of a step by cause: compute, memory traffic, exposed communication, bubble, optimizer.

The slowest pipeline stage paces the others; what it does for a micro-batch, times their number, and the bubble, is the
step. Ranks are laid out as Megatron lays them out: tensor fastest, then context, data, pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from coalm_nemo.planning.constants import Constants
from coalm_nemo.planning.flops import job_forward_flops, linear_parameters, lora_widths
from coalm_nemo.planning.hardware import GPUS_PER_NODE
from coalm_nemo.planning.job import Job, Layout
from coalm_nemo.planning.memory import NF4_BYTES, fp8_linear, stage_parameters
from coalm_nemo.planning.pipeline import chunk_bf16_layers, chunk_layers, deciding_stages

LAUNCH_FLOOR_S = 0.0005
"""Host time to launch one layer's forward kernels without CUDA graphs (some 50 launches); backward twice that. Assumed;
no published row is near it."""
FLASH_BACKWARD = 2.5
"""Backward over forward FLOPs of flash attention: five matrix products for two (Dao 2022, arXiv 2205.14135)."""

HEAD_DEFERRAL = 22
"""Micro-batches whose weight gradient of the head waits for the bubble at the end (Megatron's `wgrad_deferral_limit`)."""
LOSS_BYTES = 10
"""A BF16 logit read twice, its gradient written, read and scaled, by the fused loss."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on the slowest stage, by cause."""

    linear: float
    attention: float
    elementwise: float
    head: float
    tensor_comm: float
    context_comm: float
    pipeline_comm: float
    pass_overhead: float
    bubble: float
    data_comm: float
    optimizer: float

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class LayerTime:
    """Seconds one layer takes for one micro-batch, forward and backward together."""

    linear: float
    attention: float
    elementwise: float
    tensor_comm: float
    context_comm: float

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.elementwise + self.tensor_comm + self.context_comm

    def times(self, count: float, other: LayerTime, others: float) -> LayerTime:
        """Of `count` layers like this and `others` like the other."""
        names = [f.name for f in fields(self)]
        return LayerTime(*(count * getattr(self, n) + others * getattr(other, n) for n in names))


def step_time(job: Job, layout: Layout, constants: Constants) -> StepTime:
    """Seconds of a step."""
    layer, bf16 = layer_time(job, layout, constants), layer_time(replace(job, precision="bf16"), layout, constants)
    head, head_wgrad = _head_seconds(job, layout, constants)
    hand_over = constants.pipeline_exposed * _pipeline_seconds(job, layout)
    overhead = 2 * layout.virtual_pipeline * constants.pass_overhead_s
    m, p = layout.micro_batches(job), layout.pipeline
    ends = min(layout.bf16_layers_at_start + layout.bf16_layers_at_end, job.model.num_layers)
    whole = layer.times(job.model.num_layers - ends, bf16, ends)
    mean = (whole.total + head) / p + overhead + hand_over
    bubble = (p - 1) / layout.virtual_pipeline * mean
    deferred = min(min(m, HEAD_DEFERRAL) * head_wgrad, bubble * 2 / 3)
    head_step = m * head - deferred
    slowest, last = max(
        ((_stage_layers(job, layout, r, layer, bf16), r == p - 1) for r in deciding_stages(layout)),
        key=lambda stage: m * stage[0].total + stage[1] * head_step,
    )
    return StepTime(
        linear=m * slowest.linear,
        attention=m * slowest.attention,
        elementwise=m * slowest.elementwise,
        head=head_step * last,
        tensor_comm=m * slowest.tensor_comm,
        context_comm=m * slowest.context_comm,
        pipeline_comm=m * hand_over,
        pass_overhead=m * overhead,
        bubble=bubble,
        data_comm=_data_seconds(job, layout, constants),
        optimizer=_optimizer_seconds(job, layout, constants),
    )


def _stage_layers(job: Job, layout: Layout, stage: int, layer: LayerTime, bf16: LayerTime) -> LayerTime:
    """Seconds of a stage's layers for one micro-batch."""
    ends = sum(chunk_bf16_layers(job.model, layout, stage))
    return layer.times(sum(chunk_layers(job.model, layout, stage)) - ends, bf16, ends)


def layer_time(job: Job, layout: Layout, constants: Constants) -> LayerTime:
    """Seconds of one layer for one micro-batch on one rank, both passes."""
    tokens = layout.tokens_a_pass(job)
    once = job_forward_flops(job)
    again = layout.recompute == "full"
    bf16 = job.gpu.peak_bf16
    gemm = job.gpu.peak(job.precision) * (constants.gemm_fp8 if job.precision == "fp8" else constants.gemm_bf16)
    share = tokens / layout.tensor
    passes = (3 if job.trains_all else 2) + again
    slow = job.precision == "fp8" and job.trains_all and not layout.fp8_weight_gradients
    linear = (passes - slow) * once.linear * share / gemm
    linear += (slow * once.linear + (3 + again) * once.adapters) * share / (bf16 * constants.gemm_bf16)
    flash = 1 + FLASH_BACKWARD + (layout.recompute != "none")
    attention = flash * once.attention * share / (bf16 * constants.attention)
    moved = _elementwise_bytes(job, layout) * tokens + _accumulated_bytes(job, layout)
    if job.nf4_base:  # read, written in BF16, for the forward and the backward product
        moved += (2 + again) * (NF4_BYTES + 2) * linear_parameters(job.model) / layout.tensor
    elementwise = moved / (job.gpu.hbm * constants.hbm)
    tensor = constants.tensor_exposed * _tensor_seconds(job, layout) * (1.5 if again else 1.0)
    floor = LAUNCH_FLOOR_S * (3 + again) - linear - attention - elementwise - tensor
    return LayerTime(linear, attention, elementwise + max(floor, 0.0), tensor, _context_seconds(job, layout, attention))


def _elementwise_bytes(job: Job, layout: Layout) -> float:
    """Bytes a token moves through memory outside matrix products, per layer and rank, both passes.

    BF16, forward: two norms (read, write), rotary embedding on q and k, two residual additions (two reads, a write),
    SwiGLU. Backward: the same with one more read each.
    """
    m = job.model
    h, f, q = m.hidden_size, m.ffn_size, m.num_heads * m.head_dim
    rope = 2 * 2 * (q + m.num_kv_heads * m.head_dim)
    forward = 1 + (layout.recompute == "full")
    split: float = forward * (2 * 4 * h + 2 * 6 * h) + 2 * 6 * h + 2 * 6 * h
    whole: float = forward * (rope + 6 * f) + rope + 10 * f
    if job.precision == "fp8":
        inputs, gradients = _cast_bytes(job.trains_all and layout.fp8_weight_gradients, forward)
        split += inputs * 2 * h + gradients * 2 * h
        whole += inputs * (q + f) + gradients * (m.qkv_rows + 2 * f)
    if not job.trains_all:
        whole += _adapter_bytes(job)
    return split / layout.sequence_split + whole / layout.tensor


def _accumulated_bytes(job: Job, layout: Layout) -> float:
    """Bytes to add a micro-batch's weight gradients of a layer to the gradient buffer: read and written each time."""
    if not job.trains_all:
        return 0.0
    return 2 * layout.gradient_bytes * linear_parameters(job.model) / layout.tensor


def _cast_bytes(weight_gradients: bool, forward: int) -> tuple[float, float]:
    """Bytes to cast one element of a linear layer's input, and of its output's gradient, to FP8.

    Current scaling reads it twice (largest value, cast) and writes it once, and once more in the other direction where
    a weight gradient needs it.
    """
    once = 2 + 2 + 1
    return forward * once + weight_gradients, once + weight_gradients


def _adapter_bytes(job: Job) -> float:
    """Bytes that adapters move beside the base: their matrices are too thin to be anything but memory traffic.

    An input is read twice and gets a gradient added (write, two reads, write); an output is written, scaled and added
    (12 bytes), and its gradient scaled and read twice (8 bytes).
    """
    widths = lora_widths(job.model, job.lora_targets).values()
    return float(sum((2 * 2 + 2 + 6) * i + (12 + 8) * o for i, o in widths))


def _tensor_seconds(job: Job, layout: Layout) -> float:
    """All-gathers and reduce-scatters of a layer (sequence parallelism), each direction: 2 + 2, for one micro-batch.

    The input gathers move FP8 in FP8 runs. Backward has two gathers more, of the inputs for the weight gradients.
    """
    t = layout.tensor
    if t == 1:
        return 0.0
    elements = layout.tokens_a_pass(job) * job.model.hidden_size * (t - 1) / t
    link = job.gpu.nvlink * job.gpu.link_efficiency
    gathers = 6 if job.trains_all else 4
    gathered = gathers * elements * (1 if job.precision == "fp8" else 2)
    return (gathered + 4 * elements * 2) / link + (gathers + 4) * job.gpu.collective_latency


def _context_seconds(job: Job, layout: Layout, attention: float) -> float:
    """Ring exchange of keys and values (backward: and their gradients), so far as attention does not hide it."""
    c = layout.context
    if c == 1:
        return 0.0
    m = job.model
    pair = layout.tokens_a_pass(job) * 2 * m.num_kv_heads * m.head_dim / layout.tensor * 2
    sent = 3 * (c - 1) * pair
    seconds = sent / _link(job, layout.tensor * c) + 3 * (c - 1) * job.gpu.collective_latency
    return max(seconds - attention * (c - 1) / c, 0.0)


def _link(job: Job, span: int) -> float:
    """Bytes/s between neighbours of a group whose ranks lie within `span` GPUs."""
    link = job.gpu.nvlink if span <= GPUS_PER_NODE else job.gpu.infiniband
    return link * job.gpu.link_efficiency


def _pipeline_seconds(job: Job, layout: Layout) -> float:
    """Hand-overs between stages for one micro-batch: each chunk's activation and its gradient, all exposed."""
    if layout.pipeline == 1:
        return 0.0
    sent = layout.tokens_a_pass(job) * job.model.hidden_size / layout.sequence_split * 2
    return 2 * layout.virtual_pipeline * sent / _link(job, job.gpus)


def _head_seconds(job: Job, layout: Layout, constants: Constants) -> tuple[float, float]:
    """Projection onto the vocabulary (BF16) and the fused loss for one micro-batch, and its weight gradient alone."""
    tokens = layout.tokens_a_pass(job) / layout.tensor
    once = 2 * job.model.hidden_size * job.model.vocab_size / (job.gpu.peak_bf16 * constants.gemm_bf16)
    loss = LOSS_BYTES * job.model.vocab_size / (job.gpu.hbm * constants.hbm)
    wgrad = tokens * once if job.trains_all else 0.0
    return 2 * tokens * once + wgrad + tokens * loss, wgrad


def _data_seconds(job: Job, layout: Layout, constants: Constants) -> float:
    """Exposed reduce-scatter of gradients and all-gather of parameters over data- and context-parallel ranks.

    Without the distributed optimizer gradients are all-reduced, which is as much as both, and nothing is gathered.
    """
    ranks = layout.data_parallel(job.gpus) * layout.context
    if ranks == 1 or not job.trains_all:
        return 0.0
    linear, other = stage_parameters(job.model, layout, 0)
    reduced = layout.gradient_bytes * (linear + other) * (1 if layout.distributed_optimizer else 2)
    eight = fp8_linear(job, layout, 0) if layout.fp8_params else 0.0
    gathered = eight + 2 * (linear - eight + other) if layout.distributed_optimizer else 0.0
    exposed = reduced * (constants.data_exposed if layout.overlap_grad_reduce else 1.0)
    exposed += gathered * (constants.data_exposed if layout.overlap_param_gather else 1.0)
    return exposed * (ranks - 1) / ranks / _ring(job, layout, ranks)


def _ring(job: Job, layout: Layout, ranks: int) -> float:
    """Bytes/s a rank's ring moves: NVLink inside a node; across nodes, the ports of the group's members there."""
    nvlink = job.gpu.nvlink * job.gpu.link_efficiency
    if layout.tensor * ranks <= GPUS_PER_NODE:
        return nvlink
    members = max(GPUS_PER_NODE // layout.tensor, 1)
    return min(members * job.gpu.infiniband * job.gpu.link_efficiency, nvlink)


def _optimizer_seconds(job: Job, layout: Layout, constants: Constants) -> float:
    """Adam over the shard (gradient read, master and moments read and written, weight written), and the gradient norm."""
    if not job.trains_all:
        return 0.0
    weights = sum(stage_parameters(job.model, layout, 0))
    shards = layout.data_parallel(job.gpus) * layout.context if layout.distributed_optimizer else 1
    moved = weights / shards * (3 * layout.gradient_bytes + 2 * 4 + 4 * layout.moment_bytes + 2)
    cleared = weights * layout.gradient_bytes
    return (moved + cleared) / (job.gpu.hbm * constants.hbm)
