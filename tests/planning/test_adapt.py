"""A recipe on other GPUs: the layout moves, the training does not."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coalm_nemo.config import RunConfig
from coalm_nemo.errors import UserError
from coalm_nemo.planning.adapt import adapt, expected, expected_lines
from coalm_nemo.planning.command import changes_of, layout_of
from coalm_nemo.planning.explain import PARTS
from coalm_nemo.planning.shapes import SHAPES
from coalm_nemo.validate import check_run
from recipes import RECIPES, load_recipe


def without_layout(run: RunConfig) -> RunConfig:
    """What says how the model is trained, not where."""
    bare, default = copy.deepcopy(run), RunConfig()
    bare.parallel, bare.batch.micro_size = default.parallel, default.batch.micro_size
    bare.optimizer.moments, bare.train.recompute = default.optimizer.moments, default.train.recompute
    bare.data.pack_multiple, bare.precision.fp8_params = default.data.pack_multiple, default.precision.fp8_params
    return bare


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([n for n, r in RECIPES.items() if r.gpus]), st.sampled_from([2, 8, 16, 24, 64, 100, 256, 512, 1024])
)
def test_any_recipe_on_any_number_of_gpus_is_legal_or_refused_in_a_sentence(name: str, gpus: int) -> None:
    own, recipe = load_recipe(name), RECIPES[name]
    llama = SHAPES[own.model.shape]
    try:
        run, notes = adapt(given_run := load_recipe(name), own, recipe.gpus, gpus)
    except UserError as e:
        assert "\n" not in str(e)
        return
    assert check_run(run, llama, gpus).world_size == gpus
    e = expected(run, llama, gpus)
    assert e and e.fits
    assert without_layout(run) == without_layout(own)
    assert bool(notes) == (gpus not in recipe.gpus)
    assert given_run == own == load_recipe(name)


def test_a_larger_batch_is_proposed_and_not_taken() -> None:
    own = load_recipe("coalm_405b")
    run, notes = adapt(load_recipe("coalm_405b"), own, (128,), 1024)
    assert run.batch.global_size == 128
    assert any("batch.global_size=1024 would give" in note for note in notes)


def test_what_is_expected_is_told_by_part() -> None:
    run = load_recipe("coalm_405b")
    e = expected(run, SHAPES["405b"], 128)
    assert e is not None
    lines = "\n".join(expected_lines(e))
    assert all(words in lines for words in PARTS.values())
    assert f"{e.tokens_per_s_per_gpu:,.0f} tokens/s/GPU" in lines
    assert "the fullest stage, 1" in lines
    run.precision.dtype = "fp32"
    assert expected(run, SHAPES["405b"], 128) is None


@pytest.mark.parametrize("name", [n for n, r in RECIPES.items() if r.gpus])
def test_settings_of_a_layout_give_the_layout_back(name: str) -> None:
    run = load_recipe(name)
    e = expected(run, SHAPES[run.model.shape], RECIPES[name].gpus[-1])
    assert e is not None
    changed = RunConfig()
    changed.precision, changed.parallel.overlap_grad_reduce = (
        copy.deepcopy(run.precision),
        run.parallel.overlap_grad_reduce,
    )
    changed.parallel.overlap_param_gather = run.parallel.overlap_param_gather
    changed.speed = copy.deepcopy(run.speed)
    for key, value in changes_of(e).items():
        section, field = key.split(".")
        setattr(getattr(changed, section), field, value)
    assert layout_of(changed) == layout_of(run)
