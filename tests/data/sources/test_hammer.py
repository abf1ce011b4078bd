"""xLAM records and their maskings: a masked row is the record under other names, nothing else."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coalm_nemo.data.rows import Row
from coalm_nemo.data.sources.base import Dropped
from coalm_nemo.data.sources.hammer import HammerSource
from coalm_nemo.data.sources.masking import Masking, draw_masking, properties
from coalm_nemo.errors import UserError

FLAT = {
    "name": "ferry_times",
    "description": "Departures of ferries",
    "parameters": {
        "port": {"description": "Where from", "type": "str", "default": "Kiel"},
        "limit": {"description": "How many", "type": "int, optional", "default": 3},
    },
}
SCHEMA = {
    "type": "function",
    "function": {
        "name": "tide",
        "description": "Height of the tide",
        "parameters": {"type": "object", "properties": {"port": {"type": "string"}}, "required": ["port"]},
    },
}
BARE = {"name": "now", "description": "The time"}
RECORD = {
    "id": 7,
    "query": "When does the next ferry leave Oslo, and how high is the tide there?",
    "tools": json.dumps([FLAT, SCHEMA, BARE]),
    "answers": json.dumps(
        [
            {"name": "ferry_times", "arguments": {"port": "Oslo", "limit": 1}},
            {"name": "tide", "arguments": {"port": "Oslo"}},
        ]
    ),
}


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return file


def rows_of(source: HammerSource, seed: int = 0) -> list[Row | Dropped]:
    return [row for block in source.blocks() for row in source.rows(block, seed)]


def block_of(row: Row, name: str) -> str:
    found = re.search(rf"\[BEGIN OF {name}\]\n(.*?)\n\[END OF {name}\]", row.messages[0]["content"], re.DOTALL)
    assert found
    return found[1]


def tools_of(row: Row) -> list[dict[str, Any]]:
    tools: list[dict[str, Any]] = json.loads(block_of(row, "AVAILABLE TOOLS"))
    return tools


def test_a_row_is_the_record_under_other_names(tmp_path: Path) -> None:
    rows = rows_of(HammerSource(str(write(tmp_path / "xlam.jsonl", [RECORD])), keep_original=True))
    original, *masked = rows
    assert isinstance(original, Row)
    assert [row.row_id for row in masked if isinstance(row, Row)] == ["7/m0", "7/m1", "7/m2"]
    assert tools_of(original) == [FLAT, SCHEMA["function"], BARE]
    assert json.loads(original.messages[1]["content"]) == json.loads(str(RECORD["answers"]))
    for row in masked:
        assert isinstance(row, Row)
        assert row.part == "la_hammer"
        assert block_of(row, "QUERY") == RECORD["query"]
        tools = {tool["description"]: tool for tool in tools_of(row)}
        ferry, tide = tools["Departures of ferries"], tools["Height of the tide"]
        port, limit = ferry["parameters"]
        assert ferry["parameters"][port] == {"description": "Where from", "type": "str", "default": "Kiel"}
        (tide_port,) = tide["parameters"]["properties"]
        assert tide["parameters"]["required"] == [tide_port]
        assert json.loads(row.messages[1]["content"]) == [
            {"name": ferry["name"], "arguments": {port: "Oslo", limit: 1}},
            {"name": tide["name"], "arguments": {tide_port: "Oslo"}},
        ]
        assert not {ferry["name"], port, limit, tide["name"], tide_port} & {"ferry_times", "port", "limit", "tide"}


def test_maskings_differ_and_depend_on_seed_and_id_alone(tmp_path: Path) -> None:
    other = {**RECORD, "id": 8}
    rows = rows_of(HammerSource(str(write(tmp_path / "a.jsonl", [RECORD, other]))))
    assert len({str(row.messages) for row in rows if isinstance(row, Row)}) == 6
    turned = rows_of(HammerSource(str(write(tmp_path / "b.jsonl", [other, RECORD]))))
    assert turned == rows[3:] + rows[:3]
    assert rows_of(HammerSource(str(tmp_path / "a.jsonl")), seed=1) != rows


def test_irrelevance(tmp_path: Path) -> None:
    """Its ids start anew, its answers may be missing, and it may lie in the directory of the others."""
    write(tmp_path / "xlam.jsonl", [RECORD])
    rows = [{k: v for k, v in RECORD.items() if k != "answers"}, {**RECORD, "id": None, "answers": "[]"}]
    file = write(tmp_path / "irrelevance.jsonl", rows)
    source = HammerSource(str(tmp_path), irrelevance=str(file), maskings=1)
    assert source.files() == [tmp_path / "xlam.jsonl", file]
    kept = {row.row_id: row for row in rows_of(source) if isinstance(row, Row)}
    assert list(kept) == ["7/m0", "irrelevance/7/m0", "irrelevance/irrelevance.jsonl:2/m0"]
    assert [row.messages[1]["content"] == "[]" for row in kept.values()] == [False, True, True]


def test_lists_are_taken_as_well_as_strings_of_json(tmp_path: Path) -> None:
    calls = [{"name": "tide", "arguments": '{"port": "Oslo"}'}]
    plain = {**RECORD, "tools": [SCHEMA], "answers": calls}
    text = {**RECORD, "tools": json.dumps([SCHEMA]), "answers": json.dumps(calls)}
    first, second = (rows_of(HammerSource(str(write(tmp_path / "x.jsonl", [record])))) for record in (plain, text))
    assert first == second
    assert isinstance(first[0], Row)


DROPS = [
    ({"query": " "}, "empty_query"),
    ({"tools": "[{"}, "malformed_tools"),
    ({"tools": '[{"description": "x"}]'}, "malformed_tools"),
    ({"tools": '[{"name": "f", "parameters": ["a"]}]'}, "malformed_tools"),
    ({"tools": '[{"name": "f", "description": "\\ud83d"}]'}, "malformed_tools"),
    ({"answers": None}, "malformed_answers"),
    ({"answers": '{"name": "tide"}'}, "malformed_answers"),
    ({"answers": '[{"name": "tide", "arguments": ["Oslo"]}]'}, "malformed_answers"),
    ({"answers": '[{"name": "tide", "arguments": {"port": NaN}}]'}, "malformed_answers"),
    ({"answers": '[{"name": "tides", "arguments": {}}]'}, "call_of_unknown_function"),
    ({"answers": '[{"name": "tide", "arguments": {"limit": 3}}]'}, "argument_of_unknown_name"),
]


@pytest.mark.parametrize(("change", "reason"), DROPS)
def test_unusable_records_are_dropped(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    rows = rows_of(HammerSource(str(write(tmp_path / "x.jsonl", [{**RECORD, **change}, RECORD]))))
    assert rows[0] == Dropped(reason, "7")
    assert len(rows) == 4


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"messages": []}, "record 1 has no 'query'"),
        ({"query": "x", "tools": "[]"}, "record 1 has no 'answers'"),
        ({**RECORD, "query": 3}, "record 1 has a 'query' that is not a string"),
        ({**RECORD, "tools": {}}, "record 1 has 'tools' that are neither"),
    ],
)
def test_another_layout_is_named(tmp_path: Path, record: dict[str, Any], sentence: str) -> None:
    file = write(tmp_path / "x.jsonl", [record])
    with pytest.raises(UserError, match=f"^{file}: {sentence}"):
        rows_of(HammerSource(str(file)))


def test_no_maskings_are_no_rows() -> None:
    with pytest.raises(UserError, match="maskings is 0"):
        HammerSource("x", maskings=0)
    assert HammerSource("x", maskings=0, keep_original=True).maskings == 0


NAMES = st.sampled_from(["a", "b", "city", "get.it", "type", "properties", "required", "name", "Ünï"])
VALUES = st.sampled_from(["Oslo", "Kiel", "", " ", "north pole"]) | st.integers(0, 3) | st.none() | st.booleans()
SPECS = st.fixed_dictionaries(
    {"description": st.sampled_from(["What", "Defaults to 'Kiel'."])},
    optional={"type": st.sampled_from(["str", "int", "str, optional", "string"]), "default": VALUES},
)
PROPERTIES = st.dictionaries(NAMES, SPECS, max_size=4)


@st.composite
def records_of_calls(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Tools in both spellings, and calls that fit them."""
    tools = []
    for name in draw(st.lists(NAMES, max_size=4)):
        tool: dict[str, Any] = {"name": name, "description": "x"}
        inner = draw(PROPERTIES)
        if draw(st.booleans()):
            tool["parameters"] = {"type": "object", "properties": inner, "required": list(inner)[:1]}
        elif draw(st.booleans()):
            tool |= {"parameters": inner, "required": list(inner)[:1]}
        tools.append(tool)
    calls = []
    for tool in draw(st.lists(st.sampled_from(tools), max_size=3)) if tools else []:
        chosen = [p for p in properties(tool) if draw(st.booleans())]
        calls.append({"name": tool["name"], "arguments": {p: draw(VALUES) for p in chosen}})
    return tools, calls


def inverse(masking: Masking) -> Masking:
    """The renaming backwards."""
    functions, parameters = masking.functions, masking.parameters
    return Masking(
        {new: old for old, new in functions.items()},
        {(functions[f], new): p for (f, p), new in parameters.items()},
        {(functions[f], parameters[f, p], new): old for (f, p, old), new in masking.defaults.items()},
    )


@settings(max_examples=300, deadline=None)
@given(
    record=records_of_calls(),
    query=st.sampled_from(["", "to oslo!", "Kiel"]),
    seed=st.integers(),
    defaults=st.booleans(),
)
def test_masking_is_a_renaming(record: Any, query: str, seed: int, defaults: bool) -> None:
    tools, calls = record
    masking = draw_masking(tools, calls, query, random.Random(seed), defaults)
    masked = [masking.tool(tool) for tool in tools]
    answers = [masking.call(call) for call in calls]

    given_out = [*masking.functions.values(), *masking.parameters.values(), *masking.defaults.values()]
    assert len(set(given_out)) == len(given_out)
    assert not set(given_out) & ({t["name"] for t in tools} | {p for t in tools for p in properties(t)})
    assert all(re.fullmatch(r"[A-Za-z0-9_.]{4,15}", name) for name in given_out)

    offered = {(t["name"], p) for t in masked for p in properties(t)}
    assert {a["name"] for a in answers} <= {t["name"] for t in masked}
    assert {(a["name"], p) for a in answers for p in a["arguments"]} <= offered
    assert all(set(t.get("required", [])) <= set(properties(t)) for t in masked)

    back = inverse(masking)
    assert [back.tool(tool) for tool in masked] == tools
    assert [back.call(answer) for answer in answers] == calls


@pytest.mark.parametrize(
    ("query", "given", "spec", "masked"),
    [
        ("ferries, please", "Kiel", {}, True),
        ("ferries from kiel, please", "Kiel", {}, False),
        ("ferries from kiel, please", "Oslo", {}, True),
        ("ferries, please", "Kiel", {"description": "Defaults to Kiel."}, False),
        ("ferries, please", "Kiel", {"enum": ["Kiel", "Oslo"]}, False),
        ("ferries, please", "Kiel", {"type": "int"}, False),
    ],
)
def test_a_default_is_masked_where_the_answer_stays_derivable(
    query: str, given: str, spec: dict[str, Any], masked: bool
) -> None:
    tool = {"name": "f", "parameters": {"port": {"type": "str", "default": "Kiel", **spec}}}
    calls = [{"name": "f", "arguments": {"port": given}}]
    masking = draw_masking([tool], calls, query, random.Random(0), True)
    (new_spec,) = masking.tool(tool)["parameters"].values()
    (argument,) = masking.call(calls[0])["arguments"].values()
    assert (new_spec["default"] != "Kiel") == masked
    assert argument == (new_spec["default"] if given == "Kiel" else given)


def test_defaults_are_masked_on_request(tmp_path: Path) -> None:
    file = str(write(tmp_path / "x.jsonl", [RECORD]))
    for wanted in (False, True):
        row = rows_of(HammerSource(file, mask_defaults=wanted))[0]
        assert isinstance(row, Row)
        assert ("Kiel" in row.messages[0]["content"]) != wanted
