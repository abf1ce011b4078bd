"""Each check drops what it is for, and lets the rows of the small world pass."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coalm_nemo.data.rows import Row
from coalm_nemo.data.sources.cra.checks import check_grounding, check_row, tokens
from coalm_nemo.data.sources.cra.literal import parse_call
from coalm_nemo.data.sources.cra.scene import Facts
from coalm_nemo.data.sources.cra.schema import Schema, read_schema
from coalm_nemo.data.sources.sgd import SgdSource
from tests.data.sources.cra_world import SCHEMA, dialogue, write

BOOKING = (
    "Action: BookRepair(workshop_name='Mill\\'s \"Wheel\"', date='2019-03-02', number_of_bikes=2, open_late=False)"
)
FACTS = Facts(
    "Workshops_1",
    {"2019-03-02": frozenset({"tomorrow"}), "2": frozenset({"2"})},
    {"number_of_bikes": "2", "open_late": "False", "date": "2019-03-02"},
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    source = SgdSource(str(write(tmp_path_factory.mktemp("world"), [dialogue()])))
    made = [row for block in source.blocks() for row in source.rows(block, 0)]
    return {row.row_id: row for row in made if isinstance(row, Row)}


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Schema:
    path = tmp_path_factory.mktemp("schema") / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    return read_schema(path)


def changed(row: Row, old: str, new: str, message: int = 1) -> Row:
    messages = [dict(m) for m in row.messages]
    assert old in messages[message]["content"]
    messages[message]["content"] = messages[message]["content"].replace(old, new)
    return replace(row, messages=messages)


def test_the_row_as_made_passes(rows: dict[str, Row], schema: Schema) -> None:
    assert rows["w_1/9/action"].messages[1]["content"] == BOOKING
    assert check_row(rows["w_1/9/action"], schema, FACTS) is None


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("Action: ", "Call: ", "not_in_format"),
        ("=2, ", "=2+2, ", "not_in_format"),
        ("BookRepair", "BookFlight", "function_not_defined"),
        ("open_late", "colour", "argument_not_defined"),
        ("date='2019-03-02', ", "", "argument_missing"),
        ("=2,", "='2',", "argument_type"),
        ("=2,", "=True,", "argument_type"),
        ("open_late=False", "open_late='False'", "argument_type"),
        ("=2,", "=7,", "argument_value"),
        ("=2,", "=3,", "argument_not_grounded"),
        ("2019-03-02", "2019-03-03", "argument_not_grounded"),
        ("open_late=False", "open_late=True", "argument_not_grounded"),
        ("open_late=False", "open_late='dontcare'", "argument_not_grounded"),
        ("Mill", "Hill", "argument_not_grounded"),
    ],
)
def test_a_wrong_action_goes(old: str, new: str, reason: str, rows: dict[str, Row], schema: Schema) -> None:
    assert check_row(changed(rows["w_1/9/action"], old, new), schema, FACTS) == reason


@pytest.mark.parametrize("value", ["", "9", "FindWorkshop and BookRepair"])
def test_a_thought_that_disagrees_with_the_action_goes(value: str, rows: dict[str, Row], schema: Schema) -> None:
    row = rows["w_1/9/action"]
    thought = row.messages[0]["content"].rsplit("Thought: ", 1)[1]
    assert check_row(changed(row, thought, f"I call {value}", 0), schema, FACTS) == "thought_inconsistent"
    without_date = changed(row, thought, thought.replace("2019-03-02", "then"), 0)
    assert check_row(without_date, schema, FACTS) == "thought_inconsistent"


def test_an_answer_needs_words_and_may_not_name_a_call_it_does_not_make(rows: dict[str, Row], schema: Schema) -> None:
    row = rows["w_1/1/response"]
    assert check_row(row, schema, None) is None
    assert check_row(changed(row, "Oh no. Where are you?", " "), schema, None) == "empty_response"
    assert check_row(changed(row, "Thought: ", "Thought: FindWorkshop. ", 0), schema, None) == "thought_inconsistent"


@pytest.mark.parametrize(
    ("line", "call", "facts", "grounded"),
    [
        ("User: two bikes", "BookRepair(number_of_bikes=2)", {}, True),
        ("Observation: 2", "BookRepair(number_of_bikes=2)", {}, False),
        ("User: 12 bikes", "BookRepair(number_of_bikes=2)", {}, False),
        ("User: us both", "BookRepair(number_of_bikes=2)", {"number_of_bikes": "2"}, True),
        ("User: True", "FindWorkshop(open_late=True)", {}, False),
        ("User: late", "FindWorkshop(open_late=True)", {"open_late": "True"}, True),
        ("User: late", "FindWorkshop(open_late=True)", {"open_late": "False"}, False),
        ("User: a tiny one", "FindWorkshop(size='small')", {"size": "small"}, True),
        ("User: a tiny one", "FindWorkshop(size='small')", {}, False),
        ("User: any city", "FindWorkshop(city='dontcare')", {"city": "dontcare"}, True),
        ("User: dontcare", "FindWorkshop(city='dontcare')", {}, False),
        ("Observation: in GHENT", "FindWorkshop(city='Ghent')", {}, True),
        ("Thought: in Ghent", "FindWorkshop(city='Ghent')", {"city": "Ghent"}, False),
        ("User: do it tomorrow", "BookRepair(date='2019-03-02')", {}, True),
        ("User: do it soon", "BookRepair(date='2019-03-02')", {"date": "2019-03-02"}, False),
        ("User: Ghents", "FindWorkshop(city='Ghent')", {}, False),
    ],
)
def test_grounding_rules(line: str, call: str, facts: dict[str, str], grounded: bool, schema: Schema) -> None:
    name, arguments = parse_call(call)
    function = schema.functions["Workshops_1", name]
    reason = check_grounding(function, arguments, [line], replace(FACTS, said=facts))
    assert (reason is None) == grounded


@given(st.text(min_size=1, max_size=20), st.text(max_size=20), st.text(max_size=20))
def test_whole_words_are_found_wherever_they_stand(value: str, before: str, after: str) -> None:
    if any(c.isalnum() for c in value):
        assert tokens(value.upper().lower()) in tokens(f"{before} {value.upper().lower()} {after}")
