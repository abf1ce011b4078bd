"""The gate's verdict from curves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coalm_nemo.config import build_config
from coalm_nemo.errors import UserError
from coalm_nemo.fp8_check.variants import CONTROL_CHANGE, make_variants
from coalm_nemo.fp8_check.verdict import Runs, Trained, judge, measure_gap, rows_measured
from recipes import load_recipe

STEPS = 8


def run(after: float | None, steps: int = STEPS) -> Trained:
    return Trained([1.0] * steps, after)


def seed(fp8: Trained, control: Trained | None = None, number: int = 0) -> Runs:
    return Runs(run(2.0), fp8, control, number)


@pytest.mark.parametrize(("steps", "measured"), [(1, [0]), (3, [2]), (8, [6, 7]), (200, list(range(150, 200)))])
def test_the_last_quarters_rows_are_measured(steps: int, measured: list[int]) -> None:
    assert list(rows_measured(steps)) == measured


@pytest.mark.parametrize(
    ("fp8", "control", "word"),
    [
        (run(2.018), run(2.0), "pass"),
        (run(1.8), run(2.0), "pass"),
        (run(2.04), run(2.0002), "fail"),
        (run(2.04), run(1.97), "within noise"),
        (run(2.04), None, "fail"),
        (run(None, 5), run(2.0), "fail"),
        (run(None, 0), None, "fail"),
        (run(None), None, "fail"),
    ],
)
def test_words(fp8: Trained, control: Trained | None, word: str) -> None:
    verdict = judge([seed(fp8, control)], 0.01)
    assert (verdict.word, verdict.passed) == (word, word == "pass")


def test_a_loss_that_blew_up_is_named_by_its_step() -> None:
    assert "not finite at step 6" in judge([seed(run(None, 5))], 0.01).reason


@pytest.mark.parametrize(
    ("gaps", "word"),
    [
        ((0.03, -0.02, 0.01), "pass"),  # mean 0.7 %
        ((0.031, 0.029, 0.03), "fail"),  # above, and all seeds agree
        ((0.10, -0.04, 0.03), "within noise"),  # 3 %, and its standard error is 4 %
    ],
)
def test_several_seeds(gaps: tuple[float, ...], word: str) -> None:
    pairs = [seed(run(2 * (1 + gap)), number=number) for number, gap in enumerate(gaps)]
    verdict, gap = judge(pairs, 0.01), measure_gap(pairs)
    assert (verdict.word, verdict.passed) == (word, word == "pass")
    assert gap is not None and gap.mean == pytest.approx(sum(gaps) / 3) and "3 seeds" in verdict.reason


def test_standard_error() -> None:
    gap = measure_gap([seed(run(2.02)), seed(run(2.06))])
    assert gap is not None and gap.noise == pytest.approx(0.01)


def test_one_seed_that_blew_up_fails_all() -> None:
    verdict = judge([seed(run(2.0)), seed(run(None, 3), number=7)], 0.01)
    assert verdict.word == "fail" and "step 4 (seed 7)" in verdict.reason


def test_a_baseline_that_blew_up_is_not_fp8s_fault() -> None:
    reason = judge([Runs(run(None, 4), run(None, 4))], 0.01).reason
    assert reason.startswith("the baseline's own loss was not finite at step 5")


@given(st.floats(0.01, 10), st.floats(0.5, 2), st.floats(0.001, 0.5))
def test_gap_is_relative(loss: float, factor: float, tolerance: float) -> None:
    runs = Runs(run(loss), run(loss * factor))
    assert runs.gap(runs.fp8) == pytest.approx(factor - 1, abs=1e-9)
    if abs(factor - 1 - tolerance) > 1e-9:
        assert judge([runs], tolerance).passed == (factor - 1 <= tolerance)


def test_variants_differ_in_precision_alone() -> None:
    recipe = build_config(load_recipe("coalm_8b"), [], ["precision.bf16_layers_at_start=1"])
    variants = make_variants(recipe, 7, "", control=True)
    assert variants.fp8.precision.dtype == "fp8_current" and variants.fp8.train.steps == 7
    assert variants.baseline.precision.dtype == "bf16" and not variants.baseline.precision.fp8_params
    assert variants.baseline.optimizer == variants.fp8.optimizer and variants.baseline.parallel == variants.fp8.parallel
    assert variants.control is not None
    assert variants.control.optimizer.lr == pytest.approx(recipe.optimizer.lr * (1 + CONTROL_CHANGE))


def test_seeds_change_all_runs_alike() -> None:
    recipe = build_config(load_recipe("coalm_8b"), [], [])
    variants = make_variants(recipe, 7, "", control=True)
    other = variants.at_seed(recipe.run.seed + 3)
    assert {r.run.seed for r in other.named().values()} == {recipe.run.seed + 3}
    assert {r.run.seed for r in variants.named().values()} == {recipe.run.seed}


def test_the_baseline_of_an_emulation_is_what_lies_between_its_products() -> None:
    words = ["precision.dtype=fp8_emulated_current"]
    assert (
        make_variants(build_config(load_recipe("coalm_tiny"), [], words), 1, "", False).baseline.precision.dtype
        == "fp32"
    )
    words.append("precision.emulation_weights=bf16")
    assert (
        make_variants(build_config(load_recipe("coalm_tiny"), [], words), 1, "", False).baseline.precision.dtype
        == "bf16"
    )


@pytest.mark.parametrize(
    ("words", "steps", "baseline", "said"),
    [
        ([], 5, "", "nothing to compare"),
        (["precision.dtype=fp8_emulated_current"], 0, "", "--steps 0"),
        (["precision.dtype=fp8_emulated_current"], 5, "fp8_current", "use bf16 or fp32"),
    ],
)
def test_bad_input(words: list[str], steps: int, baseline: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_variants(build_config(load_recipe("coalm_tiny"), [], words), steps, baseline, False)
