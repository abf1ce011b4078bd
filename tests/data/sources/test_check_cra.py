"""The independent check of CRA rows: clean on hand-made rows, and it catches each kind of planted error."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.check_cra import EOT, Row, Source, check_set, dates_in, numbers_in, parse_call, said, times_in

SCHEMA = [
    {
        "service_name": "Restaurants_1",
        "slots": [
            {"name": "city", "description": "City", "is_categorical": False, "possible_values": []},
            {"name": "date", "description": "Date", "is_categorical": False, "possible_values": []},
            {"name": "party_size", "description": "Guests", "is_categorical": True, "possible_values": ["1", "2", "3"]},
        ],
        "intents": [
            {"name": "FindTable", "required_slots": ["city", "date"], "optional_slots": {"party_size": "2"}},
            {"name": "FindBar", "required_slots": ["city"], "optional_slots": {}},
        ],
    }
]
ASK = "A table for three in SF next Monday."
REPLY = "What about Aato,  it has a free table then?"
THOUGHT = "The user wants a table. I call FindTable with city 'San Francisco', date '2019-03-04' and party size 3."
ACTION = "Action: FindTable(city='San Francisco', date='2019-03-04', party_size=3)"
RESULT = {"city": "San Francisco", "date": "2019-03-04", "name": "Aato"}
HEAD = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nGo on.\n"
TOOLS = "[BEGIN OF AVAILABLE TOOLS]\nFindTable(city, date)\nFindBar(city)\n[END OF AVAILABLE TOOLS]\n"
HISTORY = "[BEGIN OF CONVERSATION HISTORY]\n[END OF CONVERSATION HISTORY]\n\n"
TAIL = f"{EOT}<|start_header_id|>assistant<|end_header_id|>\n\n"


def act(kind: str, slot: str = "", value: str = "", canonical: str | None = None) -> dict[str, Any]:
    return {"act": kind, "slot": slot, "values": [value], "canonical_values": [canonical or value]}


def source() -> Source:
    user = [act("INFORM", "city", "SF", "San Francisco"), act("INFORM", "date", "next Monday", "2019-03-04")]
    asked = {"service": "Restaurants_1", "actions": [*user, act("INFORM", "party_size", "three", "3")]}
    called = {
        "service": "Restaurants_1",
        "actions": [act("OFFER", "city", "San Francisco")],
        "service_call": {
            "method": "FindTable",
            "parameters": {"city": "San Francisco", "date": "2019-03-04", "party_size": "3"},
        },
        "service_results": [RESULT],
    }
    turns = [
        {"speaker": "USER", "utterance": ASK, "frames": [{**asked, "state": {"slot_values": {}}}]},
        {"speaker": "SYSTEM", "utterance": REPLY, "frames": [called]},
    ]
    return Source.of(SCHEMA, [{"dialogue_id": "1_0", "services": ["Restaurants_1"], "turns": turns}])


def action_row() -> Row:
    prompt = f"{HEAD}{TOOLS}{HISTORY}User: {ASK}\nThought: {THOUGHT}{TAIL}"
    return Row("1_0/1/action", prompt, f"{ACTION}{EOT}", [0, 0, 1, 1])


def response_row() -> Row:
    observed = json.dumps({"total": 1, "results": [RESULT]})
    steps = f"Thought: {THOUGHT}\n{ACTION}\nObservation: {observed}\nThought: I suggest Aato."
    return Row(
        "1_0/1/response",
        f"{HEAD}{HISTORY}User: {ASK}\n{steps}{TAIL}",
        f"System: {' '.join(REPLY.split())}{EOT}",
        [0, 1],
    )


def failed(*rows: Row) -> set[str]:
    report = check_set(rows, source(), {})
    return {name for name, found in report.failed.items() if found}


def test_rows_without_an_error_pass() -> None:
    report = check_set([action_row(), response_row()], source(), {})
    assert report.ok, report.failed
    assert report.counts["said"] == 2 and report.counts["annotated"] == 1


def in_prompt(old: str, new: str) -> Callable[[Row], Row]:
    return lambda row: replace(row, prompt=row.prompt.replace(old, new))


def in_target(old: str, new: str) -> Callable[[Row], Row]:
    return lambda row: replace(row, target=row.target.replace(old, new))


ACTION_ERRORS: list[tuple[str, Callable[[Row], Row]]] = [
    ("function", in_prompt("FindTable(city, date)\n", "")),
    ("function", in_target("FindTable", "BookTable")),
    ("function", in_target("date='2019-03-04'", "date=today()")),
    ("arguments", in_target("party_size=3", "party_size='3'")),
    ("arguments", in_target("party_size=3", "party_size=True")),
    ("arguments", in_target("date='2019-03-04', ", "")),
    ("arguments", in_target("date=", "day=")),
    ("grounded", in_target("2019-03-04", "2019-03-05")),
    ("grounded", in_target("San Francisco", "Oakland")),
    ("grounded", in_prompt("next Monday", "some day")),
    ("grounded", in_prompt("three", "some of us")),
    ("thought", in_prompt("call FindTable", "search")),
    ("thought", in_prompt("I call", "Not FindBar, I call")),
    ("thought", in_prompt("party size 3", "party size 2")),
    ("history", in_prompt("User: A table", "User: The table")),
    ("leak", in_prompt("The user wants a table.", "What about Aato, it has a free table then?")),
    ("mask", lambda row: replace(row, mask=[0, 1, 0, 1])),
    ("mask", in_prompt(TAIL, EOT)),
]


@pytest.mark.parametrize(("check", "plant"), ACTION_ERRORS)
def test_a_planted_error_of_an_action_row_is_caught(check: str, plant: Callable[[Row], Row]) -> None:
    planted = plant(action_row())
    assert planted != action_row()
    assert check in failed(planted, response_row())


RESPONSE_ERRORS: list[tuple[str, Callable[[Row], Row]]] = [
    ("observation", in_prompt('"name": "Aato"', '"name": "Bar"')),
    ("observation", in_prompt('"total": 1', '"total": 4')),
    ("observation", in_prompt('{"total"', '{"status": "success", "total"')),
    ("history", in_prompt("party_size=3", "party_size=2")),
    ("target", in_target("Aato", "Bar")),
    ("leak", in_prompt("I suggest Aato.", "I say: what about Aato, it has a free table then?")),
    (
        "leak",
        in_prompt("\nThought: I suggest", "\nSystem: What about Aato, it has a free table then?\nThought: I suggest"),
    ),
]


@pytest.mark.parametrize(("check", "plant"), RESPONSE_ERRORS)
def test_a_planted_error_of_a_response_row_is_caught(check: str, plant: Callable[[Row], Row]) -> None:
    planted = plant(response_row())
    assert planted != response_row()
    assert check in failed(action_row(), planted)


def test_rows_that_are_missing_doubled_or_strange_are_caught() -> None:
    action, response = action_row(), response_row()
    assert failed(action, response, response) == {"once"}
    assert failed(action) == {"once"}
    assert check_set([action], source(), {"some_reason": 1}).ok


def test_the_call_is_never_evaluated() -> None:
    for text in ("f(a=g())", "f(1)", "f(**{'a': 1})", "f(a=1) or 2", "f(a=1, a=2)", "f(a=[1])"):
        with pytest.raises(ValueError):
            parse_call(text)


@pytest.mark.parametrize(
    ("text", "date"),
    [
        ("on the 5th", "2019-03-05"),
        ("the fifth of March", "2019-03-05"),
        ("March 1st", "2019-03-01"),
        ("next Monday", "2019-03-04"),
        ("Saturday this week", "2019-03-02"),
        ("Wednesday next week", "2019-03-06"),
        ("the day after tomorrow", "2019-03-03"),
    ],
)
def test_dates_in_words(text: str, date: str) -> None:
    assert dates_in(text) == {date}


def test_times_and_numbers_in_words() -> None:
    assert times_in("1:15 in the afternoon") == {"13:15"}
    assert times_in("half past 11 in the morning") >= {"11:30"}
    assert "17:45" in times_in("evening quarter to 6")
    assert numbers_in("two of us at 7:30 on the 5th for $1,120") == {"2"}
    assert said("1120", "send $1,120") and said("Amir", "to Amir's account") and not said("Ann", "to Anna")
