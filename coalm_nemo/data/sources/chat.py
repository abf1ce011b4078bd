"""Anyone's chat rows: `messages` (OpenAI's tool messages included), ShareGPT's `conversations`, or Alpaca."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coalm_nemo.data.rows import Row, parse_row
from coalm_nemo.data.sources.base import Block, Dropped
from coalm_nemo.data.sources.readers import FileSource, bad_record, nested_json, records

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}


class _Unusable(Exception):
    """A row that can be read but not learnt from; the text is the reason it is counted under."""


@dataclass(frozen=True)
class ChatSource(FileSource):
    """One row a record, however many assistant turns it has."""

    def rows(self, block: Block, seed: int) -> Iterator[Row | Dropped]:
        for number, record in records(block):
            row_id = self.row_id(block, number, record)
            try:
                yield _row(record, row_id, block.file, number)
            except _Unusable as e:
                yield Dropped(str(e), row_id)


def _row(record: dict[str, Any], row_id: str, file: Path, number: int) -> Row:
    """Raises UserError for what is no chat row, _Unusable for a chat row with nothing to learn."""
    if file.suffix == ".parquet":
        record = _without_none(record)
    if "messages" not in record and "conversations" in record:
        record = _from_sharegpt(record, file, number)
    messages = record.get("messages")
    if isinstance(messages, list) and all(isinstance(m, dict) for m in messages):
        record["messages"] = [_openai_message(m) for m in messages]
        _refuse_unlearnable(record["messages"])
    elif isinstance(record.get("output"), str) and not record["output"].strip():
        raise _Unusable("empty_turn")
    if isinstance(record.get("tools"), str):
        record["tools"] = _tools(record["tools"], file, number)
    row = parse_row(record, f"{file}:{number}")
    if not row.messages:
        raise bad_record(file, number, "is plain text or token ids, which a chat source does not take; give 'messages'")
    return Row(row_id, messages=row.messages, tools=row.tools)


def _without_none(value: Any) -> Any:
    """Parquet gives every record every key that any record has, as None: an absent key again."""
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


def _from_sharegpt(record: dict[str, Any], file: Path, number: int) -> dict[str, Any]:
    turns, system = record["conversations"], record.get("system")
    if not isinstance(turns, list) or not isinstance(system, str | None):
        raise bad_record(file, number, "needs 'conversations' that are a list, and a 'system' that is a string if any")
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for place, turn in enumerate(turns, 1):
        role = _SHAREGPT_ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
        if role is None:
            raise bad_record(file, number, f"turn {place} needs a 'from' that is one of {', '.join(_SHAREGPT_ROLES)}")
        messages.append({"role": role, "content": turn.get("value")})
    return {**record, "messages": messages}


def _openai_message(message: dict[str, Any]) -> dict[str, Any]:
    """Keys of None go, and arguments given as JSON text become the object that chat templates expect."""
    message = {k: v for k, v in message.items() if v is not None and not (k == "tool_calls" and v == [])}
    if isinstance(message.get("tool_calls"), list):
        message["tool_calls"] = [_openai_call(call) for call in message["tool_calls"]]
    return message


def _openai_call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _Unusable("malformed_tool_call")
    arguments = function.get("arguments") or {}
    try:
        arguments = nested_json(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise _Unusable("malformed_tool_call")
    return {**call, "function": {**function, "arguments": arguments}}


def _refuse_unlearnable(messages: list[dict[str, Any]]) -> None:
    """Rows that parse_row would end the whole build for, though the next row may be good."""
    answers = [m for m in messages if m.get("role") == "assistant"]
    if not answers:
        raise _Unusable("no_assistant_turn")
    if messages[0] is answers[0]:
        raise _Unusable("assistant_first")
    if any(not m.get("tool_calls") and not str(m.get("content", "")).strip() for m in answers):
        raise _Unusable("empty_turn")


def _tools(text: str, file: Path, number: int) -> Any:
    try:
        return nested_json(text) if text.strip() else None
    except (ValueError, RecursionError) as e:
        raise bad_record(file, number, f"has 'tools' that are a string, but not JSON ({e})") from e
