"""What of a RunConfig goes where in NeMo's recipe, and what is refused. Needs no NeMo."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coalm_nemo.config import RunConfig, build_config, known_keys
from coalm_nemo.errors import UserError
from coalm_nemo.planning.shapes import SHAPES
from recipes.nemo.fields import MAPPED, NO_COUNTERPART, refuse_impossible, refuse_saving
from recipes.nemo.learning_rate import learning_rate
from recipes.nemo.model import LLAMA31_ROPE, find_llama
from recipes.nemo.recipe import base, total_steps
from tests.nemo.needs import CLUSTER_RECIPES, HAVE_NEMO, ready


def test_every_field_is_mapped_or_has_a_reason() -> None:
    """A new field of RunConfig has to be thought of here."""
    assert set(known_keys()) == set(MAPPED) | set(NO_COUNTERPART)
    assert not set(MAPPED) & set(NO_COUNTERPART)
    assert all(NO_COUNTERPART.values())


@pytest.mark.parametrize("name", CLUSTER_RECIPES)
def test_no_recipe_asks_in_vain(name: str) -> None:
    run = ready(name)
    refuse_impossible(run, find_llama(run))


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("run.platform=cpu", "GPUs only"),
        ("precision.dtype=fp8_emulated_current", "FP8 only"),
        ("precision.emulation_weights=bf16", "no emulated FP8"),
        ("model.init=random", "other weights"),
        ("checkpoint.milestone_interval_steps=100", "newest checkpoints"),
        ("checkpoint.save_final=false", "always saves"),
        ("health.straggler_ratio=2.0", "trainer.callbacks"),
        ("data.prepare_timeout_s=60", "barrier"),
    ],
)
def test_what_nemo_cannot_do_is_an_error(word: str, told: str) -> None:
    run = build_config(RunConfig(), [], [word])
    with pytest.raises(UserError, match=told) as caught:
        refuse_impossible(run, SHAPES["8b"])
    assert word.split("=")[0] in str(caught.value)


def test_packs_are_not_cut_over_context_ranks() -> None:
    run = ready("coalm_8b")
    run.parallel.context = 2
    with pytest.raises(UserError, match="parallel.context=1"):
        refuse_impossible(run, SHAPES["8b"])


def test_a_padded_vocabulary_is_refused() -> None:
    run = ready("coalm_8b")
    with pytest.raises(UserError, match="softmax"):
        refuse_impossible(run, replace(SHAPES["8b"], vocab_size=128257))


@pytest.mark.parametrize(
    ("evaluate", "save", "steps", "allowed"),
    [(0, 200, 301, True), (50, 0, 300, True), (50, 100, 300, True), (50, 0, 301, False), (50, 200, 300, False)],
)
def test_the_last_step_is_validated_and_saved(evaluate: int, save: int, steps: int, allowed: bool) -> None:
    run = RunConfig()
    run.train.eval_interval_steps, run.checkpoint.save_interval_steps = evaluate, save
    if allowed:
        refuse_saving(run, steps)
        return
    with pytest.raises(UserError, match="eval_interval_steps"):
        refuse_saving(run, steps)


def test_a_shape_has_llama_31s_frequencies() -> None:
    run = ready("coalm_405b")
    assert find_llama(run) == replace(SHAPES["405b"], rope_scaling=LLAMA31_ROPE)
    run.model.hf_path = ""
    with pytest.raises(UserError, match="model.hf_path"):
        find_llama(run)


def test_epochs_need_a_set_to_count_in() -> None:
    run = ready("coalm_8b")
    run.train.steps = 0
    with pytest.raises(UserError, match="train.steps"):
        total_steps(run)


def test_our_megatron_checkpoint_is_not_nemos(tmp_path: object) -> None:
    run = ready("coalm_8b")
    run.model.checkpoint = str(tmp_path)
    with pytest.raises(UserError, match="not a NeMo checkpoint"):
        base(run)


@pytest.mark.skipif(HAVE_NEMO, reason="NeMo is installed")
def test_without_nemo_one_sentence_says_how_to_get_it() -> None:
    from recipes.nemo import coalm_8b

    with pytest.raises(UserError, match=r"nemo-toolkit 2\.7.*constraints-nemo\.txt"):
        coalm_8b(hf="/models/Llama", data="/sets/coalm_it", steps=10)


@given(
    name=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=st.integers(0, 12),
    total=st.integers(1, 40),
    low=st.sampled_from([0.0, 1e-6]),
)
@settings(max_examples=60, deadline=None)
def test_the_learning_rate_is_megatrons(name: str, warmup: int, total: int, low: float) -> None:
    """Step by step, against the scheduler that `coalm train` uses."""
    import torch

    from coalm_nemo.training.setup import build_scheduler

    run = RunConfig()
    run.schedule.name, run.schedule.warmup_steps = name, warmup
    run.optimizer.lr, run.optimizer.min_lr = 3e-4, low
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = build_scheduler(optimizer, run, total)  # type: ignore[arg-type]
    for step in range(total + 3):
        ours = learning_rate(step, name=name, lr=3e-4, min_lr=low, warmup_steps=warmup, total_steps=total)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-18), step
        scheduler.step(increment=1)
