"""BFCL's overall scores, worked out by hand, and what is said where the environment is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from coalm_nemo.errors import UserError
from coalm_nemo.evaluation.base import Verdict
from coalm_nemo.evaluation.bfcl.benchmark import load
from coalm_nemo.evaluation.bfcl.environment import RELEASES, default_directory, prepare
from coalm_nemo.evaluation.bfcl.scores import LIVE, MULTI_TURN, overall_scores
from coalm_nemo.evaluation.options import EvalOptions


def verdicts(**right_of: tuple[int, int]) -> list[Verdict]:
    return [
        Verdict(f"{name}_{n}", f"{name}_{n}", {name: (float(n < right), 1.0)})
        for name, (right, of) in right_of.items()
        for n in range(of)
    ]


NON_LIVE = {
    "simple": (8, 10), "java": (2, 10), "javascript": (5, 10), "multiple": (6, 10), "parallel": (7, 10),
    "parallel_multiple": (4, 10), "irrelevance": (9, 10),
}  # fmt: skip


def test_overall_by_hand() -> None:
    live = dict(zip(LIVE, ((5, 10), (30, 100), (1, 2), (0, 2), (50, 80), (3, 6)), strict=True))
    multi_turn = dict(zip(MULTI_TURN, ((4, 10), (1, 10), (2, 10), (0, 10)), strict=True))
    scores = overall_scores(verdicts(**NON_LIVE, **live, **multi_turn), "v3")
    assert scores["simple_ast"] == pytest.approx((80 + 20 + 50) / 3)
    assert scores["non_live"] == pytest.approx((50 + 60 + 70 + 40 + 90) / 5)
    assert scores["live"] == pytest.approx(100 * 89 / 200)
    assert scores["multi_turn"] == pytest.approx(17.5)
    assert scores["overall"] == pytest.approx((62 + 44.5 + 17.5) / 3)


def test_no_mean_of_what_was_not_asked() -> None:
    assert overall_scores(verdicts(**NON_LIVE), "v3").keys() == {"simple_ast", "non_live"}
    assert overall_scores(verdicts(simple=(1, 1)), "v3") == {}


def test_v4_names_its_languages_otherwise_and_gets_no_overall() -> None:
    names = {"simple": "simple_python", "java": "simple_java", "javascript": "simple_javascript"}
    renamed = {names.get(k, k): v for k, v in NON_LIVE.items()}
    everything = renamed | dict.fromkeys((*LIVE, *MULTI_TURN), (1, 1))
    scores = overall_scores(verdicts(**everything), "v4")
    assert scores["non_live"] == pytest.approx(62) and "overall" not in scores


def test_a_missing_environment_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    options = EvalOptions(tmp_path / "out", extra={"env": str(tmp_path / "none")})
    with pytest.raises(UserError, match="python -m coalm_nemo.evaluation.bfcl.environment --dir .*none --release v3"):
        load(options)


def test_an_environment_that_cannot_be_made_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RELEASES, "v3", ("./no-such-directory",))
    with pytest.raises(UserError, match="could not be made: "):
        prepare(tmp_path / "env", "v3")
    assert not (tmp_path / "env" / "ready").exists()


def test_the_environment_lies_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_directory("v3") == tmp_path / "coalm_nemo" / "bfcl-v3"
