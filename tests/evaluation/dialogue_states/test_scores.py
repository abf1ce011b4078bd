"""Scores of states, likeness of strings, BLEU and the reading of a step: the rules that hold for all inputs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coalm_nemo.evaluation.calls import Call
from coalm_nemo.evaluation.dialogue_states.agent import MAX_CALLS, GoldTurn, Outcome, take_turn
from coalm_nemo.evaluation.dialogue_states.answers import read_step
from coalm_nemo.evaluation.dialogue_states.bleu import corpus_bleu
from coalm_nemo.evaluation.dialogue_states.fuzzy import partial_ratio, ratio, token_sort_ratio
from coalm_nemo.evaluation.dialogue_states.prompts import AgentPrompt
from coalm_nemo.evaluation.dialogue_states.scores import Counts, count_turn
from coalm_nemo.evaluation.multiwoz.slots import SLOTS, TRACKED, normalize
from coalm_nemo.evaluation.multiwoz.states import WAYS
from coalm_nemo.evaluation.sgd import values as sgd_values

SLOT = st.sampled_from(SLOTS)
VALUE = st.text(max_size=20) | st.sampled_from(
    [
        "17:00",
        "5 pm",
        "(the) center",
        "(none)",
        "The Guesthouse",
        "don't care",
        "st. john's",
        "12.30 a.m.",
        "free",
        "two",
    ]
)
STATES = st.dictionaries(SLOT, VALUE, max_size=6)


def said(state: dict[str, str]) -> dict[str, str]:
    return {slot: value for slot, value in state.items() if normalize(slot, value)}


@given(SLOT, VALUE)
def test_normalisation_is_idempotent(slot: str, value: str) -> None:
    once = normalize(slot, value)
    assert normalize(slot, once) == once
    assert sgd_values.normalize(sgd_values.normalize(value)) == sgd_values.normalize(value)


@given(STATES)
def test_a_state_agrees_with_itself(state: dict[str, str]) -> None:
    gold, counts = said(state), Counts()
    faults = count_turn(counts, {slot: (value,) for slot, value in gold.items()}, gold, WAYS, SLOTS)
    assert not faults
    assert counts.sums["jga"] == counts.sums["jga_fuzzy"] == (1, 1)
    assert counts.sums["slot_accuracy"] == (len(SLOTS), len(SLOTS))


@given(STATES, st.data())
def test_one_wrong_slot_makes_the_turn_wrong(state: dict[str, str], data: st.DataObject) -> None:
    gold = {slot: (value,) for slot, value in said(state).items()}
    predicted = {slot: values[0] for slot, values in gold.items()}
    slot = data.draw(st.sampled_from(TRACKED))
    if slot in predicted and data.draw(st.booleans()):
        del predicted[slot]
    else:
        predicted[slot] = "nothing like it 4711"
    counts = Counts()
    assert len(count_turn(counts, gold, predicted, WAYS, SLOTS)) == 1
    assert counts.sums["jga"] == (0, 1)
    assert counts.sums["slot_accuracy"] == (len(SLOTS) - 1, len(SLOTS))


@pytest.mark.parametrize(
    ("slot", "forms", "normal"),
    [
        ("hotel-type", ["guest house", "Guesthouse", "guest houses"], "guesthouse"),
        ("hotel-area", ["center", "Centre", "city centre"], "centre"),
        ("hotel-name", ["The Acorn Guesthouse", "acorn guest house"], "acorn guest house"),
        ("hotel-name", ["A & B Guest House", "a and b guesthouse"], "a and b guest house"),
        ("attraction-name", ["Saint John's College", "st. johns college"], "saint johns college"),
        ("taxi-leaveat", ["5 pm", "17:00", "17 :00", "1700", "5:00 p.m.", "after 5pm"], "17:00"),
        ("train-arriveby", ["9:05", "09:05 am", "0905"], "09:05"),
        ("train-leaveat", ["24:43"], "24:43"),
        ("hotel-bookpeople", ["two", "2", "2 people"], "2"),
        ("train-day", ["Mon", "monday", "Monday."], "monday"),
        ("hotel-internet", ["free", "yes", "True"], "yes"),
        ("hotel-parking", ["no", "False"], "no"),
        ("restaurant-food", ["don't care", "dontcare", "do n't care", "any"], "dontcare"),
        ("restaurant-food", ["", "none", "not mentioned"], ""),
        ("restaurant-food", ["portugese"], "portuguese"),
        ("train-departure", ["London Kings Cross", "london king's cross"], "london kings cross"),
    ],
)
def test_values_that_are_the_same(slot: str, forms: list[str], normal: str) -> None:
    assert {normalize(slot, form) for form in forms} == {normal}


def test_likeness() -> None:
    assert ratio("abcd", "abcd") == 100 and ratio("", "") == ratio("a", "") == 0
    assert ratio("abcd", "abce") == 75  # 2 x 3 of 8
    assert partial_ratio("nandos", "nandos city centre") == 100
    assert token_sort_ratio("Oak Bistro", "bistro  oak") == 100


@given(st.text(max_size=12), st.text(max_size=12))
def test_a_part_is_at_least_as_like_as_the_whole(a: str, b: str) -> None:
    assert 0 <= ratio(a, b) <= 100
    assert partial_ratio(a, b) == partial_ratio(b, a) or len(a) == len(b)


def test_bleu_by_hand() -> None:
    answer, reference = "the cat is on the mat", "the cat on is the mat"
    assert corpus_bleu([reference], [reference]) == pytest.approx(100)
    assert corpus_bleu(["zzz"], ["the cat"]) == 0
    # 6 of 6 words; pairs: "the cat", "the mat" of 5; no triple of 4 counts as half, no four of 3 as a quarter.
    expected = 100 * (1 * 2 / 5 * 0.5 / 4 * 0.25 / 3) ** 0.25
    assert corpus_bleu([answer], [reference]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "thought", "name", "words", "fault"),
    [
        ("Thought: a\nAction: f(x='1')", "a", "f", "", ""),
        ("Action: f(x='1')", "", "f", "", ""),
        ("System: Hello.", "", "", "Hello.", ""),
        ("Thought: a\nSystem: Hello.\nUser: and?\nSystem: No.", "a", "", "Hello.", ""),
        ("Action: f(x='1')\nObservation: {}\nSystem: made up", "", "f", "", ""),
        ("Sure!\nThought: a\nAction: f(x='1')", "a", "f", "", ""),
        ('[f(x="1")]', "", "f", "", ""),
        ('[{"name": "f", "arguments": {"x": "1"}}]', "", "f", "", ""),
        ("Hello there.", "", "", "Hello there.", ""),
        ("Thought: only this", "only this", "", "", ""),
        ("Action: f(x='1'", "", "", "", "malformed_call"),
        ("Action: I search", "", "", "", "malformed_call"),
        ("", "", "", "", "empty_answer"),
        ("Thought: a\nSystem:", "a", "", "", "empty_answer"),
        ("Observation: {}\nSystem: hm", "", "", "", "empty_answer"),
    ],
)
def test_steps_are_read_however_they_are_written(text: str, thought: str, name: str, words: str, fault: str) -> None:
    step = read_step(text)
    assert (step.thought, step.words, step.fault) == (thought, words, fault)
    assert [call.name for call in step.calls] == [name] * bool(name)


@given(st.text(alphabet="ThoughtAcinSysem:()[]{}'\"=, \nxf1", max_size=80))
def test_no_answer_breaks_the_reader(text: str) -> None:
    step = read_step(text)
    assert step.only_thought or bool(step.calls) + bool(step.words) + bool(step.fault) >= 1


def test_a_turn_ends_whatever_the_model_answers() -> None:
    prompt = AgentPrompt("f(x)")
    for answer, fault, asked in (
        ("Thought: hm", "no_step", 2),
        ("Action: f(x='1')", "too_many_calls", MAX_CALLS + 1),
        ("Action: f(x=", "malformed_call", 1),
    ):
        run = take_turn(prompt, [], "Hi", lambda call: Outcome("{}"), GoldTurn([], lambda: "Hi"))
        prompts = [next(run)]
        with pytest.raises(StopIteration) as end:
            while True:
                prompts.append(run.send(answer))
        assert end.value.value.faults == [fault] and len(prompts) == asked
        assert end.value.value.lines[-1] == "System: "
    assert prompts[0].messages[0]["content"].endswith("\n\nUser: Hi")


def test_a_thought_alone_is_asked_to_go_on() -> None:
    seen: list[Call] = []
    run = take_turn(AgentPrompt("f(x)"), [], "Hi", lambda call: seen.append(call) or Outcome("{}"), GoldTurn([], str))  # type: ignore[func-returns-value]
    next(run)
    assert run.send("Thought: I call f.").messages[0]["content"].endswith("User: Hi\nThought: I call f.")
    asked = run.send("Action: f(x=2)").messages[0]["content"]
    assert asked.endswith("Thought: I call f.\nAction: f(x=2)\nObservation: {}") and seen == [Call("f", {"x": 2})]
