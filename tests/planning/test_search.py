"""Search: every result is legal by the rules that a run is checked by, fits, and stands in order."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coalm_nemo.config import RunConfig
from coalm_nemo.errors import UserError
from coalm_nemo.planning.estimate import SPARE_GB, estimate
from coalm_nemo.planning.explain import CAUSES, PARTS, shares, why, why_others
from coalm_nemo.planning.hardware import GIB
from coalm_nemo.planning.job import Job, Layout
from coalm_nemo.planning.legality import parse_layout, why_illegal
from coalm_nemo.planning.memory import Parts
from coalm_nemo.planning.search import search
from coalm_nemo.planning.shapes import SHAPES
from coalm_nemo.validate import check_run

JOB = Job(SHAPES["405b"], 128, 64, name="405b")
FOUND = search(JOB)


def as_run(job: Job, layout: Layout) -> RunConfig:
    run = RunConfig()
    run.parallel.tensor, run.parallel.pipeline, run.parallel.context = layout.tensor, layout.pipeline, layout.context
    run.parallel.virtual_pipeline, run.parallel.sequence = layout.virtual_pipeline, layout.sequence
    run.parallel.count_embedding_and_loss = layout.count_embedding_and_loss
    run.batch.global_size, run.batch.micro_size = job.global_batch, layout.micro_batch
    run.train.seq_len_tokens, run.train.recompute = job.seq_len_tokens, layout.recompute
    run.precision.dtype = "fp8_current" if job.precision == "fp8" else job.precision
    run.precision.fp8_params = layout.fp8_params and job.precision == "fp8"
    run.parallel.distributed_optimizer = layout.distributed_optimizer
    run.optimizer.moments = "bf16" if layout.moment_bytes == 2 else "fp32"
    return run


@pytest.mark.parametrize(
    "job",
    [
        JOB,
        Job(SHAPES["70b"], 32, 64),
        Job(SHAPES["8b"], 8, 128, 8192, "pretrain"),
        Job(SHAPES["70b"], 8, 32, task="lora"),
    ],
    ids=["405b", "70b", "8b pretrain", "70b lora"],
)
def test_results_pass_the_checks_of_a_run_and_fit(job: Job) -> None:
    found = search(job)
    assert found.fitting
    for e in found.fitting:
        assert check_run(as_run(job, e.layout), job.model, job.gpus).micro_batches == e.layout.micro_batches(job)
        assert e.spare >= SPARE_GB * GIB
    rates = [e.tokens_per_s_per_gpu for e in found.fitting]
    assert rates == sorted(rates, reverse=True)
    assert len({e.layout for e in found.fitting}) == len(rates)


@settings(max_examples=150, deadline=None)
@given(
    st.builds(
        Layout,
        tensor=st.sampled_from([1, 2, 3, 4, 8]),
        pipeline=st.sampled_from([1, 2, 3, 4, 8, 16]),
        virtual_pipeline=st.sampled_from([1, 2, 4, 5, 8]),
        context=st.sampled_from([1, 2, 4]),
        micro_batch=st.sampled_from([1, 2, 3]),
        count_embedding_and_loss=st.booleans(),
        sequence=st.booleans(),
        distributed_optimizer=st.booleans(),
        fp8_params=st.booleans(),
        moment_bytes=st.sampled_from([2, 4]),
    ),
    st.sampled_from(list(SHAPES.values())),
    st.sampled_from([8, 24, 64, 128]),
    st.sampled_from([8, 48, 64]),
    st.sampled_from([4096, 4100]),
    st.sampled_from(["bf16", "fp8"]),
)
def test_legality_is_that_of_a_run(  # type: ignore[no-untyped-def]
    layout: Layout, model, gpus: int, batch: int, tokens: int, precision: str
) -> None:
    job = Job(model, gpus, batch, tokens, precision=precision)
    try:
        check_run(as_run(job, layout), model, gpus)
        legal = True
    except UserError:
        legal = False
    assert legal == (why_illegal(job, layout) == "")


def test_405b_on_128_gpus_is_what_was_asked_for() -> None:
    """Fits with 6 GB to spare at a bubble of 3 % or less, and 2.5 times the usual recipe's layout."""
    asked = [e for e in FOUND.fitting if e.bubble_fraction <= 0.03]
    best = asked[0]
    usual_job = replace(JOB, precision="bf16", seq_len_tokens=2048, global_batch=16)
    usual = estimate(usual_job, Layout(tensor=8, pipeline=16, count_embedding_and_loss=True))
    assert usual.bubble_fraction == 15 / 31
    assert best.spare >= 6 * GIB
    assert best.tokens_per_s_per_gpu >= 2.5 * usual.tokens_per_s_per_gpu


def test_every_layout_is_explained_in_one_line() -> None:
    best = FOUND.fitting[0]
    for e in [*FOUND.fitting[:20], *FOUND.too_large[:20]]:
        line = why(e, best)
        assert line
        assert "\n" not in line
    assert "arithmetic" in why(best, best)
    assert "slower" in why(FOUND.fitting[-1], best)
    assert "more than there is" in why(FOUND.too_large[0], best)
    assert any("not legal" in line for line in why_others(FOUND, 10))
    assert sum(shares(best.time).values()) == pytest.approx(1)
    assert set(PARTS) == set(Parts.__dataclass_fields__)
    assert set(CAUSES) == set(type(best.time).__dataclass_fields__)


def test_forms_are_chosen_only_where_needed() -> None:
    small = search(Job(SHAPES["8b"], 8, 64))
    assert (small.fitting[0].layout.recompute, small.fitting[0].layout.moment_bytes) == ("none", 4)
    assert FOUND.fitting[0].layout.moment_bytes == 2


def test_every_form_of_the_best_split_is_tried_and_explained() -> None:
    """Recomputation x moments x distributed optimizer, less BF16 moments without it."""
    best = FOUND.fitting[0]
    tried = {(e.layout.recompute, e.layout.moment_bytes, e.layout.distributed_optimizer) for e in FOUND.forms}
    assert len(FOUND.forms) == len(tried) == 9
    for form in FOUND.forms:
        assert not why_illegal(form.job, form.layout)
        if form.layout == best.layout:
            break
        assert not form.fits
    lines = "\n".join(why_others(FOUND, 10))
    for words in ("FP32 moments, whole optimizer, BF16 parameters: needs", "recompute full:", "recompute selective:"):
        assert words in lines
    small = search(Job(SHAPES["8b"], 8, 64))
    assert small.fitting[0].layout.distributed_optimizer
    assert len(search(Job(SHAPES["8b"], 8, 64, task="lora", precision="bf16")).forms) == 3


def test_a_layout_is_read_from_words() -> None:
    model = SHAPES["405b"]
    layout = parse_layout("tensor=8,pipeline=8,context=2,virtual_pipeline=8", Layout(), model)
    assert layout == Layout(8, 8, 8, 2, count_embedding_and_loss=True)
    assert not parse_layout("tensor=8,pipeline=9,virtual_pipeline=7", Layout(), model).count_embedding_and_loss
    given = parse_layout("recompute=full,sequence=false,moment_bytes=2", Layout(), model)
    assert (given.recompute, given.sequence, given.moment_bytes) == ("full", False, 2)
    for text, part in (
        ("tensr=8", "no key 'tensr'"),
        ("tensor=x", "whole number"),
        ("tensor=0", "whole number"),
        ("moment_bytes=3", "2 or 4"),
        ("recompute=some", "none, selective, full"),
        ("sequence=yes", "true or false"),
        ("tensor", "whole number"),
        ("bf16_layers_at_start=-1", "whole number from 0 on"),
    ):
        with pytest.raises(UserError, match=part):
            parse_layout(text, Layout(), model)
