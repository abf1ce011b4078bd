"""The released CoALM-IT layout: every row kept as it is, and its part told from its form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coalm_nemo.data.rows import Row
from coalm_nemo.data.sources.base import Dropped
from coalm_nemo.data.sources.released import PARTS, ReleasedSource, recognise
from coalm_nemo.errors import UserError

SHARED = Path(__file__).parents[4] / "shared" / "data"

TOOL = '{"name": "find_boat", "description": "Boats on a lake", "parameters": {"lake": {"type": "str"}}}'
HAMMER = f"[BEGIN OF TASK INSTRUCTION]\nCall.\n[END OF TASK INSTRUCTION]\n\n[BEGIN OF AVAILABLE TOOLS]\n[{TOOL}]\n"
TOOLACE = f"Here are functions you may call:\n[{TOOL}]\nAnswer as [f(a=1)]."
CRA = (
    "Think, then act.\nTools:\nFindBoat(lake)\n[BEGIN OF CONVERSATION HISTORY]\nUser: hi\n[END OF CONVERSATION HISTORY]"
)
QUERY = "[BEGIN OF QUERY]\nA boat, please.\n[END OF QUERY]"
CALLS = '[{"name": "find_boat", "arguments": {"lake": "Como"}}]'
STATE = '{"domain": "Boats", "slot_values": {"lake": "Como"}}'

ROWS = [
    ("tod", "Slots: lake", "User: boats on Como", f"System: {STATE}"),
    ("tod", "Slots: lake", "User: boats on Como", f" System:\n```json\n{STATE}\n```\n"),
    ("la_hammer", HAMMER, QUERY, CALLS),
    ("la_hammer", HAMMER + QUERY, "", f"```\n{CALLS}\n```"),
    ("la_hammer", HAMMER, QUERY, f"```json\n{CALLS}```"),
    ("la_hammer", HAMMER, QUERY, " []\n"),
    ("la_toolace", TOOLACE, "User: boats on Como", '[find_boat(lake="Como")]'),
    ("la_toolace", TOOLACE, "User: boats on Como", '[Find Boat/v2.1(lake="Co(m)o", n=[1, 2]), now()]'),
    ("la_toolace", TOOLACE, "User: boats", "On which lake would you like a boat?"),
    ("la_toolace", "Be helpful.", "User: boats", '[find_boat(lake="Como")]'),
    ("cra_action", CRA, "User: boats\nThought: look", "Action: FindBoat(lake='Como')"),
    ("cra_action", CRA, "User: boats", "Thought: I should look\nfor boats.\nAction: FindBoat(lake='Como')"),
    ("cra_response", CRA, "User: boats\nThought: ask", "System: On which lake?"),
    ("cra_response", CRA, "User: boats", "Thought1: ask\n\nSystem : On {which} lake?"),
    ("cra_response", CRA, "User: boats", 'System: {"not": "a state"}'),
    ("unrecognised", HAMMER, QUERY, "I cannot call anything."),
    ("unrecognised", "Say hello.", "", "Hello."),
    ("unrecognised", "Count.", "", "[1, 2]"),
]


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def rows_of(source: ReleasedSource, seed: int = 0) -> list[Row | Dropped]:
    return [row for block in source.blocks() for row in source.rows(block, seed)]


@pytest.mark.parametrize(("part", "instruction", "query", "output"), ROWS)
def test_a_row_is_recognised_by_its_form(part: str, instruction: str, query: str, output: str) -> None:
    assert recognise(instruction, query, output) == part


def test_rows_are_kept_word_for_word(tmp_path: Path) -> None:
    raw = [{"instruction": i, "input": q, "output": o} for _, i, q, o in ROWS]
    rows = rows_of(ReleasedSource(str(write(tmp_path / "it.jsonl", raw))))
    assert [row.part for row in rows if isinstance(row, Row)] == [part for part, *_ in ROWS]
    for number, (row, record) in enumerate(zip(rows, raw, strict=True), 1):
        assert isinstance(row, Row)
        assert row.row_id == f"it.jsonl:{number}"
        prompt = "\n\n".join(t for t in (record["instruction"], record["input"]) if t)
        assert [m["content"] for m in row.messages] == [prompt, record["output"]]


def test_parquet_json_and_lines_give_the_same(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    raw: list[dict[str, Any]] = [
        {"instruction": i, "input": q or None, "output": o, "id": n} for n, (_, i, q, o) in enumerate(ROWS)
    ]
    for kind in ("a", "b", "c"):
        (tmp_path / kind).mkdir()
    pq.write_table(pa.Table.from_pylist(raw), tmp_path / "a" / "train-00000-of-00001.parquet")
    (tmp_path / "b" / "it.json").write_text(json.dumps(raw, indent=1))
    write(tmp_path / "c" / "it.json", raw)
    a, b, c = (rows_of(ReleasedSource(str(tmp_path / kind))) for kind in ("a", "b", "c"))
    assert a == b == c
    assert len(a) == len(ROWS)


def test_parts_leave_rows_out(tmp_path: Path) -> None:
    raw = [{"instruction": i, "input": q, "output": o} for _, i, q, o in ROWS]
    source = ReleasedSource(str(write(tmp_path / "it.jsonl", raw)), parts=[p for p in PARTS if not p.startswith("la_")])
    rows = rows_of(source)
    out = [row.reason for row in rows if isinstance(row, Dropped)]
    assert out == ["part_not_wanted"] * sum(part.startswith("la_") for part, *_ in ROWS)
    with pytest.raises(UserError, match="no part 'hammer'"):
        ReleasedSource("x", parts=["hammer"])


def test_rows_without_prompt_or_answer_are_dropped(tmp_path: Path) -> None:
    raw: list[dict[str, Any]] = [
        {"instruction": "Do.", "output": " "},
        {"instruction": " ", "input": None, "output": "done"},
    ]
    rows = rows_of(ReleasedSource(str(write(tmp_path / "it.jsonl", raw))))
    assert rows == [Dropped("empty_output", "it.jsonl:1"), Dropped("empty_prompt", "it.jsonl:2")]


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"messages": []}, "record 2 needs the columns"),
        ({"output": "x"}, "record 2 needs the columns"),
        ({"instruction": "Do.", "output": 3}, "record 2 has a 'output' that is not a string"),
        ({"instruction": ["Do."], "output": "x"}, "record 2 has a 'instruction' that is not a string"),
    ],
)
def test_another_layout_is_named(tmp_path: Path, record: dict[str, Any], sentence: str) -> None:
    file = write(tmp_path / "it.jsonl", [{"instruction": "Do.", "input": "", "output": "done"}, record])
    with pytest.raises(UserError, match=f"^{file}: {sentence}"):
        rows_of(ReleasedSource(str(file)))


@pytest.mark.parametrize("name", ["hammer/masking_sft_data_example.json", "api-bank/hammer_apibank_l1.json"])
def test_real_hammer_prompts_are_recognised(name: str) -> None:
    file = SHARED / name
    if not file.is_file():
        pytest.skip(f"the shared example {name} is not beside this checkout")
    rows = rows_of(ReleasedSource(str(file)))
    assert len(rows) >= 10
    assert all(isinstance(row, Row) and row.part == "la_hammer" for row in rows)
