"""Memory: published peaks, the parameters of all stages together, and how parts move with the layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coalm_nemo.planning.hardware import GIB, GPUS
from coalm_nemo.planning.job import PRECISIONS, TASKS, Job, Layout
from coalm_nemo.planning.legality import counts_ends
from coalm_nemo.planning.memory import layer_activation_bytes, memory, stage_memory, stage_parameters
from coalm_nemo.planning.published import read_published
from coalm_nemo.planning.shapes import SHAPES

PEAKS = [r for r in read_published() if r.peak_memory_gb]


@pytest.mark.parametrize("row", PEAKS, ids=lambda r: f"{r.job.gpus} GPUs")
def test_published_peaks_are_met(row) -> None:  # type: ignore[no-untyped-def]
    assert memory(row.job, row.layout).first.allocated / GIB == pytest.approx(row.peak_memory_gb, rel=0.02)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("pipeline", [1, 2])
def test_stages_hold_every_parameter_once(name: str, pipeline: int) -> None:
    model = SHAPES[name]
    layout = Layout(pipeline=pipeline)
    assert sum(sum(stage_parameters(model, layout, r)) for r in range(pipeline)) == model.num_parameters()


def test_a_tied_embedding_is_held_by_both_ends() -> None:
    tied = replace(SHAPES["8b"], tied_embeddings=True)
    one = sum(stage_parameters(tied, Layout(), 0))
    two = sum(sum(stage_parameters(tied, Layout(pipeline=2), r)) for r in (0, 1))
    assert one == tied.num_parameters()
    assert two == one + tied.vocab_size * tied.hidden_size


def test_405b_weights_by_hand() -> None:
    """Rank 0 of TP8 PP8 with both ends counted: 15 layers of 3,187,671,040 linear weights and the embedding."""
    layout = Layout(tensor=8, pipeline=8, virtual_pipeline=8, count_embedding_and_loss=True)
    linear, other = stage_parameters(SHAPES["405b"], layout, 0)
    assert linear == 15 * 3_187_671_040 / 8
    assert other == 15 * 2 * 16384 + 128256 * 16384 / 8
    assert linear < stage_parameters(SHAPES["405b"], layout, 1)[0] == 16 * 3_187_671_040 / 8


JOBS = st.builds(
    Job,
    model=st.sampled_from(list(SHAPES.values())),
    gpus=st.sampled_from([1024, 4096]),
    global_batch=st.just(8192),
    seq_len_tokens=st.sampled_from([2048, 4096, 8192]),
    task=st.sampled_from(TASKS),
    precision=st.sampled_from(PRECISIONS),
    gpu=st.sampled_from(list(GPUS.values())),
)
LAYOUTS = st.builds(
    Layout,
    tensor=st.sampled_from([1, 2, 4]),
    pipeline=st.sampled_from([1, 2]),
    context=st.sampled_from([1, 2, 4]),
    micro_batch=st.sampled_from([1, 2]),
    sequence=st.booleans(),
    fp8_params=st.booleans(),
    gradient_bytes=st.sampled_from([2, 4]),
    moment_bytes=st.sampled_from([2, 4]),
)


@settings(max_examples=60, deadline=None)
@given(JOBS, LAYOUTS)
def test_more_tensor_parallelism_never_needs_more(job: Job, layout: Layout) -> None:
    before, after = (stage_memory(job, replace(layout, tensor=t), 0) for t in (layout.tensor, 2 * layout.tensor))
    assert after.weights + after.fp8_copies <= before.weights + before.fp8_copies
    assert after.activations <= before.activations
    assert after.gradients <= before.gradients


@settings(max_examples=60, deadline=None)
@given(JOBS, LAYOUTS)
def test_recomputation_never_keeps_more(job: Job, layout: Layout) -> None:
    kept = [layer_activation_bytes(job, replace(layout, recompute=r)) for r in ("none", "selective", "full")]
    assert kept == sorted(kept, reverse=True)


@settings(max_examples=60, deadline=None)
@given(JOBS, LAYOUTS)
def test_the_distributed_optimizer_is_shared_out_over_data_and_context_ranks(job: Job, layout: Layout) -> None:
    whole = stage_memory(job, replace(layout, distributed_optimizer=False), 0).optimizer
    ranks = job.gpus // layout.model_ranks * layout.context
    assert stage_memory(job, layout, 0).optimizer == pytest.approx(whole / ranks)
    twice = replace(job, gpus=2 * job.gpus)
    assert stage_memory(twice, layout, 0).optimizer == pytest.approx(whole / ranks / 2)


@settings(max_examples=60, deadline=None)
@given(JOBS, LAYOUTS)
def test_cheaper_forms_need_less(job: Job, layout: Layout) -> None:
    def total(**changes: object) -> float:
        return stage_memory(job, replace(layout, **changes), 0).total  # type: ignore[arg-type]

    assert total(moment_bytes=2) <= total(moment_bytes=4)
    assert total(gradient_bytes=2) <= total(gradient_bytes=4)
    assert total(fp8_params=True) <= total(fp8_params=False)
    assert total(context=2 * layout.context) <= total() or job.task == "lora"


def test_the_vocabulary_is_paid_at_the_ends() -> None:
    model = SHAPES["70b"]
    job, layout = Job(model, 32, 32), Layout(tensor=4, pipeline=4)
    assert not counts_ends(model, layout)
    first, middle, last = (stage_memory(job, layout, r) for r in (0, 1, 3))
    assert first.weights == last.weights - 2 * model.hidden_size > middle.weights
    assert last.logits > 0 == first.logits == middle.logits


def test_bf16_ends_hold_as_many_weight_bytes_and_more_activations() -> None:
    """With FP8 parameters a weight is two bytes either way: FP8 and its transpose, or BF16."""
    job, layout = Job(SHAPES["70b"], 32, 32), Layout(tensor=4, pipeline=4, virtual_pipeline=5)
    ends = replace(layout, bf16_layers_at_start=2, bf16_layers_at_end=1)
    for stage in range(4):
        eight, mixed = (stage_memory(job, one, stage) for one in (layout, ends))
        assert mixed.weights + mixed.fp8_copies == pytest.approx(eight.weights + eight.fp8_copies)
        assert (mixed.fp8_copies < eight.fp8_copies) == (mixed.activations > eight.activations) == (stage in (0, 3))
        assert (mixed.gradients, mixed.optimizer) == (eight.gradients, eight.optimizer)
    apart = [stage_memory(job, replace(one, fp8_params=False), 0) for one in (layout, ends)]
    assert apart[0].fp8_copies - apart[1].fp8_copies == pytest.approx(2 * 2 * 855_638_016 / 4)  # two layers' two copies


def test_adapters_hold_what_is_whole_on_every_rank() -> None:
    """q and v: A is [r, input] whole, B is [output / TP, r]; gradients of 4 bytes, 12 of optimizer over 4 replicas."""
    job = Job(SHAPES["8b"], 8, 8, task="lora", precision="bf16", lora_rank=8, lora_targets="q,v")
    parts = stage_memory(job, Layout(tensor=2, gradient_bytes=4), 0)
    adapters = 32 * 8 * ((4096 + 4096 / 2) + (4096 + 1024 / 2))
    assert parts.gradients == 4 * adapters
    assert parts.optimizer == 12 * adapters / 4
    assert parts.fp8_copies == 0


def test_the_reserve_is_told_apart() -> None:
    parts = stage_memory(Job(SHAPES["8b"], 8, 8), Layout(tensor=2), 0)
    assert parts.reserve == parts.overlap + parts.nccl + parts.fragmentation + parts.cuda
    assert parts.total == parts.allocated + parts.reserve
    assert stage_memory(Job(SHAPES["8b"], 1, 8), Layout(), 0).nccl == 0


def test_userbuffers() -> None:
    """TP overlap's 12 buffers [4096 tokens, 8192]: 8 gather, at a byte an element in FP8, and 4 scatter in BF16."""
    job, layout = Job(SHAPES["70b"], 32, 32, seq_len_tokens=4096), Layout(tensor=4, pipeline=4)
    element = 4096 * 8192

    def buffers(job: Job, layout: Layout) -> float:
        return stage_memory(job, layout, 0).overlap / element

    assert buffers(job, layout) == 16
    assert buffers(replace(job, precision="bf16"), layout) == 24
    assert buffers(job, replace(layout, bf16_layers_at_end=1)) == 40, "a set for each precision"
    for without in (replace(layout, tensor_overlap=False), replace(layout, sequence=False), replace(layout, tensor=1)):
        assert buffers(job, without) == 0
    assert buffers(replace(job, task="lora"), layout) == 0
