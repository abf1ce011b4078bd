"""ToolACE conversations: one row for each thing the assistant said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coalm_nemo.data.rows import Row
from coalm_nemo.data.sources.base import Dropped
from coalm_nemo.data.sources.toolace import ToolAceSource
from coalm_nemo.errors import UserError

SYSTEM = 'You may call:\n[{"name": "tide", "parameters": {"port": {"type": "str"}}}]\n'
CALL = '[tide(port="Oslo")]\n'
SAID = [
    ("user", "How high is the tide?"),
    ("assistant", "In which port?"),
    ("user", "Oslo"),
    ("assistant", CALL),
    ("tool", '{"metres": 0.3}'),
    ("assistant", "30 centimetres."),
    ("user", "Thanks"),
]


def record(said: list[tuple[Any, Any]], **more: Any) -> dict[str, Any]:
    return {"system": SYSTEM, "conversations": [{"from": who, "value": what} for who, what in said], **more}


def rows_of(tmp_path: Path, records: list[dict[str, Any]], **options: Any) -> list[Row | Dropped]:
    file = tmp_path / "data.json"
    file.write_text(json.dumps(records))
    source = ToolAceSource(str(file), **options)
    return [row for block in source.blocks() for row in source.rows(block, 0)]


def test_the_published_form(tmp_path: Path) -> None:
    rows = [row for row in rows_of(tmp_path, [record(SAID)]) if isinstance(row, Row)]
    assert [row.row_id for row in rows] == [f"data.json:1/turn{n}" for n in (1, 2, 3)]
    assert {row.part for row in rows} == {"la_toolace"}
    assert [row.messages[1]["content"] for row in rows] == ["In which port?", CALL, "30 centimetres."]
    assert rows[0].messages[0]["content"] == f"{SYSTEM.strip()}\n\nUser: How high is the tide?"
    assert rows[2].messages[0]["content"] == (
        f"{SYSTEM.strip()}\n\n[BEGIN OF CONVERSATION HISTORY]\nUser: How high is the tide?\nSystem: In which port?\n"
        f'User: Oslo\nSystem: {CALL}\n[END OF CONVERSATION HISTORY]\n\nObservation: {{"metres": 0.3}}'
    )


def test_chat_turns(tmp_path: Path) -> None:
    rows = [row for row in rows_of(tmp_path, [record(SAID, id="x")], chat=True) if isinstance(row, Row)]
    assert [len(row.messages) for row in rows] == [3, 5, 7]
    assert rows[2].row_id == "x/turn3"
    assert rows[2].messages == [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "How high is the tide?"},
        {"role": "assistant", "content": "In which port?"},
        {"role": "user", "content": "Oslo"},
        {"role": "assistant", "content": CALL},
        {"role": "ipython", "content": '{"metres": 0.3}'},
        {"role": "assistant", "content": "30 centimetres."},
    ]


def test_other_spellings_of_the_roles(tmp_path: Path) -> None:
    names = {"user": "human", "assistant": "gpt", "tool": "observation"}
    said = [(names[who], what) for who, what in SAID]
    assert rows_of(tmp_path, [record(said)]) == rows_of(tmp_path, [record(SAID)])
    assert rows_of(tmp_path, [record(said)], chat=True) == rows_of(tmp_path, [record(SAID)], chat=True)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("system", [None, "", " \n"])
def test_without_system_prompt(tmp_path: Path, system: str | None, chat: bool) -> None:
    row = rows_of(tmp_path, [record(SAID[:2]) | {"system": system}], chat=chat)[0]
    assert isinstance(row, Row)
    assert [m["role"] for m in row.messages] == ["user", "assistant"]
    assert row.messages[0]["content"] == ("" if chat else "User: ") + "How high is the tide?"


def test_two_user_turns_in_a_row(tmp_path: Path) -> None:
    row = rows_of(tmp_path, [record([("user", "Hi"), *SAID[:2]])])[0]
    assert isinstance(row, Row)
    assert "[BEGIN OF CONVERSATION HISTORY]\nUser: Hi\n[END" in row.messages[0]["content"]
    assert row.messages[0]["content"].endswith("\n\nUser: How high is the tide?")


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(
    ("said", "reasons"),
    [
        (SAID[1:4], ["assistant_first", "assistant_first"]),
        ([("user", ""), *SAID[1:4]], ["empty_turn", "empty_turn"]),
        ([*SAID[:3], ("assistant", " ")], ["", "empty_turn"]),
        ([*SAID[:4], ("tool", None), *SAID[5:]], ["", "", "empty_turn"]),
        ([*SAID[:2], *SAID[1:4]], ["", "assistant_after_assistant", ""]),
        (SAID[:1], ["no_assistant_turn"]),
        ([], ["no_assistant_turn"]),
    ],
)
def test_what_cannot_be_learnt_is_dropped(
    tmp_path: Path, said: list[tuple[str, str]], reasons: list[str], chat: bool
) -> None:
    rows = rows_of(tmp_path, [record(said)], chat=chat)
    assert [row.reason if isinstance(row, Dropped) else "" for row in rows] == reasons


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ({"messages": []}, "record 2 needs 'conversations'"),
        (record(SAID, system=3), "record 2 needs 'conversations', a list, and 'system', a string"),
        (record([("narrator", "Once")]), "record 2 turn 1 is from 'narrator'"),
        (record([*SAID[:1], (None, "Once")]), "record 2 turn 2 is from None"),
        (record([(["user"], "Once")]), "record 2 turn 1 is from"),
        (record([("user", 3)]), "record 2 turn 1 needs 'from' and 'value'"),
        ({"system": "", "conversations": ["Hi"]}, "record 2 turn 1 needs 'from' and 'value'"),
    ],
)
def test_another_layout_is_named(tmp_path: Path, bad: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=rf"data\.json: {sentence}"):
        rows_of(tmp_path, [record(SAID), bad])
