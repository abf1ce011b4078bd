"""The gate's verdict from curves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coalm_nemo.config import build_config
from coalm_nemo.errors import UserError
from coalm_nemo.fp8_check.variants import CONTROL_CHANGE, make_variants
from coalm_nemo.fp8_check.verdict import Curves, judge, measure_gap
from recipes import load_recipe

BASE = [4.0, 3.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0]
LOSSES = st.lists(st.floats(0.1, 10), min_size=4, max_size=40)


def times(factor: float, curve: list[float] = BASE) -> list[float]:
    return [x * factor for x in curve]


def test_only_the_last_quarter_counts() -> None:
    assert Curves(BASE, [9.0] * 6 + [1.0, 1.02]).gap([9.0] * 6 + [1.0, 1.02]) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("fp8", "control", "word"),
    [
        (times(1.009), times(1.0), "pass"),
        (times(0.9), times(1.0), "pass"),
        (times(1.02), times(1.0001), "fail"),
        (times(1.02), times(0.985), "within noise"),
        (times(1.02), None, "fail"),
        (times(1.0)[:5], times(1.0), "fail"),
        ([], None, "fail"),
    ],
)
def test_words(fp8: list[float], control: list[float] | None, word: str) -> None:
    verdict = judge([Curves(BASE, fp8, control)], 0.01)
    assert (verdict.word, verdict.passed) == (word, word == "pass")


def test_a_loss_that_blew_up_is_named_by_its_step() -> None:
    assert "not finite at step 6" in judge([Curves(BASE, BASE[:5])], 0.01).reason


@pytest.mark.parametrize(
    ("gaps", "word"),
    [
        ((0.03, -0.02, 0.01), "pass"),  # mean 0.7 %
        ((0.031, 0.029, 0.03), "fail"),  # above, and all seeds agree
        ((0.10, -0.04, 0.03), "within noise"),  # 3 %, and its standard error is 4 %
    ],
)
def test_several_seeds(gaps: tuple[float, ...], word: str) -> None:
    pairs = [Curves(BASE, times(1 + gap), seed=seed) for seed, gap in enumerate(gaps)]
    verdict, gap = judge(pairs, 0.01), measure_gap(pairs)
    assert (verdict.word, verdict.passed) == (word, word == "pass")
    assert gap is not None and gap.mean == pytest.approx(sum(gaps) / 3) and "3 seeds" in verdict.reason


def test_standard_error() -> None:
    gap = measure_gap([Curves(BASE, times(1.01)), Curves(BASE, times(1.03))])
    assert gap is not None and gap.noise == pytest.approx(0.01)


def test_one_seed_that_blew_up_fails_all() -> None:
    verdict = judge([Curves(BASE, BASE), Curves(BASE, BASE[:3], seed=7)], 0.01)
    assert verdict.word == "fail" and "step 4 (seed 7)" in verdict.reason


@given(LOSSES, st.floats(0.5, 2), st.floats(0.001, 0.5))
def test_gap_is_relative(losses: list[float], factor: float, tolerance: float) -> None:
    curves = Curves(losses, times(factor, losses))
    assert curves.gap(curves.fp8) == pytest.approx(factor - 1, abs=1e-9)
    if abs(factor - 1 - tolerance) > 1e-9:
        assert judge([curves], tolerance).passed == (factor - 1 <= tolerance)


def test_variants_differ_in_precision_alone() -> None:
    run = build_config(load_recipe("coalm_8b"), [], ["precision.bf16_layers_at_start=1"])
    variants = make_variants(run, 7, "", control=True)
    assert variants.fp8.precision.dtype == "fp8_current" and variants.fp8.train.steps == 7
    assert variants.baseline.precision.dtype == "bf16" and not variants.baseline.precision.fp8_params
    assert variants.baseline.optimizer == variants.fp8.optimizer and variants.baseline.parallel == variants.fp8.parallel
    assert variants.control is not None
    assert variants.control.optimizer.lr == pytest.approx(run.optimizer.lr * (1 + CONTROL_CHANGE))


def test_seeds_change_all_runs_alike() -> None:
    run = build_config(load_recipe("coalm_8b"), [], [])
    variants = make_variants(run, 7, "", control=True)
    other = variants.at_seed(run.run.seed + 3)
    assert {r.run.seed for r in other.named().values()} == {run.run.seed + 3}
    assert {r.run.seed for r in variants.named().values()} == {run.run.seed}


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
