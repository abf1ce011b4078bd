"""Chat rows of any common spelling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coalm_nemo.data.rows import Row
from coalm_nemo.data.sources.base import Dropped
from coalm_nemo.data.sources.chat import ChatSource
from coalm_nemo.errors import UserError

USER = {"role": "user", "content": "How high is the tide in Oslo?"}
ANSWER = {"role": "assistant", "content": "30 centimetres."}
TOOLS = [{"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "properties": {}}}}]
RESULT = {"role": "tool", "content": "0.3", "tool_call_id": "c1"}


def call(arguments: Any) -> dict[str, Any]:
    function = {"name": "tide", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": function}]}


def rows_of(file: Path) -> list[Row | Dropped]:
    source = ChatSource(str(file))
    return [row for block in source.blocks() for row in source.rows(block, 0)]


def row_of(tmp_path: Path, *records: Any) -> list[Row | Dropped]:
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(json.dumps(record) for record in records))
    return rows_of(file)


def test_messages_conversations_and_alpaca(tmp_path: Path) -> None:
    sharegpt = [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": ANSWER["content"]}]
    rows = row_of(
        tmp_path,
        {"messages": [USER, ANSWER]},
        {"id": 5, "conversations": sharegpt},
        {"id": None, "instruction": USER["content"], "input": None, "output": ANSWER["content"]},
    )
    assert rows == [Row(name, messages=[USER, ANSWER]) for name in ("chat.jsonl:1", "5", "chat.jsonl:3")]


def test_a_system_prompt_of_sharegpt(tmp_path: Path) -> None:
    turns = [
        {"from": "user", "value": "Hi"},
        {"from": "observation", "value": "0"},
        {"from": "assistant", "value": "Yes?"},
    ]
    (row,) = row_of(tmp_path, {"system": "Be brief.", "conversations": turns, "tools": json.dumps(TOOLS)})
    assert isinstance(row, Row)
    assert [m["role"] for m in row.messages] == ["system", "user", "tool", "assistant"]
    assert row.tools == TOOLS


def test_openai_tool_messages(tmp_path: Path) -> None:
    spelled = {**call('{"port": "Oslo"}'), "content": None, "name": None}
    said = [USER, spelled, RESULT, {**ANSWER, "tool_calls": []}]
    (row,) = row_of(tmp_path, {"messages": said, "tools": TOOLS})
    assert row == Row("chat.jsonl:1", messages=[USER, call({"port": "Oslo"}), RESULT, ANSWER], tools=TOOLS)
    assert row_of(tmp_path, {"messages": [USER, call("")]}) == [Row("chat.jsonl:1", messages=[USER, call({})])]


def test_parquet_gives_the_same_rows(tmp_path: Path) -> None:
    """A table has every key in every record: what JSON lacks is None there."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    records: list[dict[str, Any]] = [
        {"messages": [USER, ANSWER]},
        {"id": "x", "messages": [USER, call('{"port": "Oslo"}'), RESULT, ANSWER], "tools": TOOLS_FOR_TABLE},
    ]
    columns = {name: [r.get(name) for r in records] for name in ("id", "messages", "tools")}
    messages = pa.array(columns["messages"])
    assert {"tool_calls", "tool_call_id"} <= {field.name for field in messages.type.value_type}
    pq.write_table(pa.table({**columns, "messages": messages}), tmp_path / "chat.parquet")
    as_lines = row_of(tmp_path, *records)
    as_table = rows_of(tmp_path / "chat.parquet")
    assert [getattr(row, "messages", None) for row in as_table] == [getattr(row, "messages", None) for row in as_lines]
    assert [getattr(row, "tools", None) for row in as_table] == [None, TOOLS_FOR_TABLE]
    assert [row.row_id for row in as_table] == ["chat.parquet:1", "x"]


TOOLS_FOR_TABLE = [{"type": "function", "function": {"name": "tide", "description": "Height"}}]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [USER, call('{"port": ')]}, "malformed_tool_call"),
        ({"messages": [USER, call('["Oslo"]')]}, "malformed_tool_call"),
        ({"messages": [USER, call('{"port": "\\ud83d"}')]}, "malformed_tool_call"),
        ({"messages": [USER, call(3)]}, "malformed_tool_call"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": ["tide"]}]}, "malformed_tool_call"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {}}]}]}, "malformed_tool_call"),
        ({"messages": [USER]}, "no_assistant_turn"),
        ({"messages": []}, "no_assistant_turn"),
        ({"conversations": []}, "no_assistant_turn"),
        ({"messages": [ANSWER, USER]}, "assistant_first"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "empty_turn"),
        ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": []}]}, "empty_turn"),
        ({"instruction": "Do.", "output": ""}, "empty_turn"),
    ],
)
def test_what_cannot_be_learnt_is_dropped(tmp_path: Path, record: dict[str, Any], reason: str) -> None:
    good = {"messages": [USER, ANSWER]}
    assert row_of(tmp_path, record, good) == [
        Dropped(reason, "chat.jsonl:1"),
        Row("chat.jsonl:2", messages=[USER, ANSWER]),
    ]


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"text": "Once upon a time"}, "record 2 is plain text"),
        ({"token_ids": [1, 2, 3]}, "record 2 is plain text or token ids"),
        ({"question": "Why?"}, "a row needs 'messages'"),
        ({"messages": "Hi"}, "'messages' must be a non-empty list"),
        ({"messages": ["Hi"]}, "message 1 needs a 'role'"),
        ({"messages": [{"role": "narrator", "content": "Once"}, ANSWER]}, "message 1 needs a 'role'"),
        ({"messages": [USER, {**call({}), "tool_calls": "tide"}]}, "message 2: 'tool_calls' must be a list"),
        ({"messages": [USER, ANSWER], "tools": "tide"}, "record 2 has 'tools' that are a string, but not JSON"),
        ({"messages": [USER, ANSWER], "tools": {}}, "'tools' must be a list"),
        ({"conversations": "Hi"}, "record 2 needs 'conversations' that are a list"),
        ({"conversations": [{"from": "narrator", "value": "Once"}]}, "record 2 turn 1 needs a 'from'"),
        ({"conversations": ["Hi"]}, "record 2 turn 1 needs a 'from'"),
        ({"conversations": [{"from": "user"}, {"from": "gpt", "value": "Hi"}]}, "message 1 needs a 'content' string"),
    ],
)
def test_another_layout_is_named(tmp_path: Path, record: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=rf"chat\.jsonl:.*{sentence}"):
        row_of(tmp_path, {"messages": [USER, ANSWER]}, record)
