"""Many items at once: every answer reaches the item that asked, whatever the order; bugs surface."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coalm_nemo.evaluation.base import Item, Prompt, Verdict
from coalm_nemo.evaluation.gold_model import GoldModel
from coalm_nemo.evaluation.runner import Reply, run_items


def prompt(text: str, gold: str = "") -> Prompt:
    return Prompt([{"role": "user", "content": text}], gold)


def talk(name: str, turns: int) -> Item:
    """Asks `turns` times and checks that every answer is the one to its own prompt."""
    answers = []
    for turn in range(turns):
        answers.append((yield prompt(f"{name} {turn}", f"gold {name} {turn}")))
    return Verdict(name, name, {"turns": (len(answers), turns)}, answer=answers)


class Shuffled:
    """Answers with the prompt's text, in random order."""

    name = fingerprint = "shuffled"

    def __init__(self, seed: int, faults: dict[str, str] | None = None) -> None:
        self.rng, self.faults = random.Random(seed), faults or {}
        self.sizes = [0]

    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        raise AssertionError("a model that streams is asked to stream")

    def stream(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Reply]]:
        self.sizes.append(len(prompts))
        for i in self.rng.sample(range(len(prompts)), len(prompts)):
            text = str(prompts[i].messages[0]["content"])
            yield i, Reply(f"re: {text}", self.faults.get(text, ""))


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(1, 7), st.integers())
def test_every_answer_reaches_its_item_and_verdicts_keep_the_items_order(
    turns: list[int], at_once: int, seed: int
) -> None:
    items: list[Callable[[], Item]] = [partial(talk, f"item{n}", t) for n, t in enumerate(turns)]
    seen = [0, 0]

    def advance(answers: int, verdicts: int) -> None:
        seen[0], seen[1] = seen[0] + answers, seen[1] + verdicts

    model = Shuffled(seed)
    outcomes = run_items(items, model, at_once=at_once, advance=advance)
    assert [o.verdict.id for o in outcomes] == [f"item{n}" for n in range(len(turns))]
    assert max(model.sizes) <= at_once
    for n, (outcome, t) in enumerate(zip(outcomes, turns, strict=True)):
        assert outcome.verdict.answer == [f"re: item{n} {turn}" for turn in range(t)]
        assert [s.answer for s in outcome.steps] == outcome.verdict.answer
    assert seen == [sum(turns), len(turns)]


def test_the_gold_model_replays_gold() -> None:
    (outcome,) = run_items([partial(talk, "a", 2)], GoldModel())
    assert outcome.verdict.answer == ["gold a 0", "gold a 1"]


def test_a_fault_of_the_model_is_noted_where_points_are_missing_only() -> None:
    def item(name: str, points: float) -> Item:
        yield prompt(name)
        return Verdict(name, name, {"m": (points, 1.0)})

    model = Shuffled(0, {"lost": "prompt_too_long", "won": "cut_short"})
    lost, won = run_items([partial(item, "lost", 0.0), partial(item, "won", 1.0)], model)
    assert lost.verdict.faults == ["prompt_too_long"] and won.verdict.faults == []


def test_a_bug_in_an_item_surfaces() -> None:
    def broken() -> Item:
        yield prompt("a")
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        run_items([partial(talk, "b", 1), broken], GoldModel())


def test_two_items_of_one_id_are_a_bug() -> None:
    with pytest.raises(RuntimeError, match="repeated id: same"):
        run_items([partial(talk, "same", 1), partial(talk, "same", 1)], GoldModel())


def test_a_model_that_loses_an_answer_is_a_bug() -> None:
    class Short(GoldModel):
        def answer(self, prompts: Sequence[Prompt]) -> list[str]:
            return []

    with pytest.raises(RuntimeError, match="0 answers to 1 prompts"):
        run_items([partial(talk, "a", 1)], Short())
