"""Rows as users write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coalm_nemo.data.rows import Row, alpaca_messages, parse_row, read_rows, split_validation
from coalm_nemo.errors import UserError

ASSISTANT = {"role": "assistant", "content": "yes"}
USER = {"role": "user", "content": "hi"}


def test_messages_with_tools() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = parse_row({"id": 7, "messages": [USER, ASSISTANT], "tools": tools}, "x:1")
    assert (row.row_id, row.messages, row.tools) == ("7", [USER, ASSISTANT], tools)
    assert parse_row({"messages": [USER, ASSISTANT], "tools": json.dumps(tools)}, "x:1").tools == tools
    assert parse_row({"messages": [USER, ASSISTANT], "tools": []}, "x:1").tools is None


def test_a_call_needs_no_content() -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    assert parse_row({"messages": [USER, call]}, "x:1").messages[1] == call


@pytest.mark.parametrize(
    ("raw", "prompt"),
    [
        ({"instruction": "Do.", "input": "this", "output": "done"}, "Do.\n\nthis"),
        ({"instruction": "Do.", "input": "", "output": "done"}, "Do."),
        ({"instruction": "Do.", "output": "done"}, "Do."),
        ({"instruction": None, "input": "this", "output": "done"}, "this"),
    ],
)
def test_alpaca(raw: dict[str, str], prompt: str) -> None:
    assert alpaca_messages(raw, "x:1") == [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": "done"},
    ]


def test_text_and_token_rows() -> None:
    assert parse_row({"text": "abc"}, "x:1") == Row("x:1", text="abc")
    assert parse_row({"token_ids": [1, 2], "loss_mask": [0, 1]}, "x:1") == Row(
        "x:1", token_ids=[1, 2], loss_mask=[0, 1]
    )


@pytest.mark.parametrize(
    "raw",
    [{"instruction": " ", "output": "x"}, {"token_ids": [1]}, {"token_ids": [1, -2]}, {"token_ids": "12"}, None, {}],
)
def test_what_is_refused_is_named(raw: object) -> None:
    with pytest.raises(UserError, match="^here:3: "):
        parse_row(raw, "here:3")


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "ü\\ud83d\\ude00"}\n', encoding="utf-8")
    rows = read_rows(path)
    assert [r.row_id for r in rows] == [f"{path}:1", f"{path}:3"]
    assert rows[1].text == "ü😀"


TEXTS = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=60, unique=True)


@given(TEXTS, st.floats(0, 0.99), st.randoms(use_true_random=False))
def test_the_split_depends_on_content_only(texts: list[str], fraction: float, draw: object) -> None:
    rows = [Row(f"r{i}", text=t) for i, t in enumerate(texts)]
    train, validation = split_validation(rows, fraction)
    assert sorted(r.row_id for r in train + validation) == sorted(r.row_id for r in rows)
    draw.shuffle(rows)  # type: ignore[attr-defined]
    again = split_validation([Row("other id", text=r.text) for r in rows], fraction)
    assert {r.text for r in again[1]} == {r.text for r in validation}
    larger = split_validation(rows, min(1.0, fraction + 0.1))[1]
    assert {r.text for r in validation} <= {r.text for r in larger}


def test_the_split_is_about_the_fraction() -> None:
    rows = [Row(str(i), text=f"row {i}") for i in range(4000)]
    assert 300 < len(split_validation(rows, 0.1)[1]) < 500
    assert split_validation(rows, 0.0)[1] == []
