"""Nothing that is held out may occur in training rows, whatever the seed."""

from __future__ import annotations

import json
import random
import re

import pytest

from coalm_nemo.demo.answers import parse_action, parse_call_list, parse_state
from coalm_nemo.demo.dialogues import generate_dialogues
from coalm_nemo.demo.pretraining_text import make_phrase
from coalm_nemo.demo.rows import dialogue_rows, held_out_rows, single_rows, training_rows
from coalm_nemo.demo.values import Split, ValueSource, is_held_out, real_names
from coalm_nemo.demo.world import SERVICES, SLOT_KINDS, Call, combination_key

WORD = re.compile(r"[A-Za-z]+")
OPEN_KINDS = ("place", "venue", "person")


def searches(outputs: list[str]) -> set[str]:
    """The combination of every complete search in calls and states."""
    keys = set()
    for text in outputs:
        calls = [parse_action(text)] + (parse_call_list(text) or [])
        if (state := parse_state(text)) is not None:
            find = SERVICES[state["domain"]].find
            if set(find.arguments) <= state["slot_values"].keys():
                calls.append(Call(find.name, {a: state["slot_values"][a] for a in find.arguments}))
        finds = {s.find.name for s in SERVICES.values()}
        keys |= {combination_key(c) for c in calls if c is not None and c.name in finds}
    return keys


def open_words(split: Split, count: int = 200) -> set[str]:
    """Every word of the open slots' values in a split's dialogues."""
    words: set[str] = set()
    for dialogue in generate_dialogues(5, count, split):
        for turn in dialogue.turns:
            words |= {w for s, v in turn.state.items() if SLOT_KINDS[s] in OPEN_KINDS for w in WORD.findall(str(v))}
    return words


@pytest.mark.parametrize("seed", [0, 1])
def test_training_rows_hold_no_held_out_combination_or_word(seed: int) -> None:
    rows = training_rows(seed, 800)
    train_searches = searches([r["output"] for r in rows])
    held_out = searches([r.row["output"] for r in held_out_rows(5, "combinations", 200)])
    assert len(train_searches) > 500 and len(held_out) > 200
    assert not train_searches & held_out
    assert not any(is_held_out(key) for key in train_searches)
    train_words = set(WORD.findall(" ".join(json.dumps(r) for r in rows)))
    assert not train_words & open_words("words")
    assert not train_words & open_words("names")


def test_held_out_combinations_are_of_values_that_training_knows() -> None:
    train_words = set(WORD.findall(" ".join(json.dumps(r) for r in training_rows(0, 3000))))
    held_out = open_words("combinations")
    assert len(held_out & train_words) >= 0.95 * len(held_out)


def test_held_out_names_are_the_real_ones() -> None:
    assert open_words("names") <= {n for names in real_names(held_out=True).values() for n in names}
    assert not set(real_names(True)["city"]) & set(real_names(False)["city"])


def test_pretraining_phrases_hold_no_held_out_word() -> None:
    source = ValueSource(random.Random(0), "train")
    words = set(WORD.findall(" ".join(make_phrase(source, 128) for _ in range(4000))))
    assert not words & (open_words("words") | open_words("names"))


def test_held_out_chores_are_new() -> None:
    chores = re.compile(r"no tool to (\w+ the \w+)")
    text = " ".join(r["output"] for r in training_rows(0, 800))
    unseen = " ".join(r.row["output"] for r in held_out_rows(5, "words", 200))
    assert chores.findall(unseen) and not set(chores.findall(text)) & set(chores.findall(unseen))


def test_a_tool_for_the_request_is_listed_exactly_when_the_answer_calls_it() -> None:
    for tagged in single_rows(3, 300, "words"):
        calls = parse_call_list(tagged.row["output"])
        assert calls is not None
        assert all(f"{c.name}(" in tagged.row["instruction"] for c in calls)


def test_rows_are_alpaca() -> None:
    for tagged in (r for d in generate_dialogues(3, 30, "train") for r in dialogue_rows(d)):
        assert set(tagged.row) == {"instruction", "input", "output"}
        assert all(tagged.row.values())
