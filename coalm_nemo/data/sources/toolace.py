"""ToolACE conversations: one row an assistant turn, with everything said before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from coalm_nemo.data.rows import Row, alpaca_messages
from coalm_nemo.data.sources.base import Block, Dropped
from coalm_nemo.data.sources.readers import FileSource, bad_record, records

_ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "ipython",
    "observation": "ipython",
    "function": "ipython",
}
_LABELS = {"user": "User", "assistant": "System", "ipython": "Observation"}

Message = dict[str, Any]


@dataclass(frozen=True)
class ToolAceSource(FileSource):
    """Records of `system` and `conversations` (`from`, `value`)."""

    chat: bool = False
    """Real chat turns that end in the assistant turn to learn, instead of the published single prompt."""

    def rows(self, block: Block, seed: int) -> Iterator[Row | Dropped]:
        for number, record in records(block):
            trouble = _wrong_keys(record)
            if trouble:
                raise bad_record(block.file, number, trouble)
            yield from self._turns(record, self.row_id(block, number, record))

    def _turns(self, record: dict[str, Any], record_id: str) -> Iterator[Row | Dropped]:
        system = record.get("system") or ""
        said = [{"role": _ROLES[t["from"]], "content": t["value"]} for t in record["conversations"]]
        ends = [end for end, message in enumerate(said) if message["role"] == "assistant"]
        if not ends:
            yield Dropped("no_assistant_turn", record_id)
        for turn, end in enumerate(ends, 1):
            row_id = f"{record_id}/turn{turn}"
            trouble = _trouble(said[: end + 1])
            if trouble:
                yield Dropped(trouble, row_id)
                continue
            messages = _chat(system, said[: end + 1]) if self.chat else _published(system, said[: end + 1], row_id)
            yield Row(row_id, messages=messages, part="la_toolace")


def _wrong_keys(record: dict[str, Any]) -> str:
    turns = record.get("conversations")
    if not isinstance(turns, list) or not isinstance(record.get("system"), str | None):
        return f"needs 'conversations', a list, and 'system', a string; found {sorted(record)}"
    for place, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str | None):
            return f"turn {place} needs 'from' and 'value', both strings"
        if not isinstance(turn.get("from"), str) or turn["from"] not in _ROLES:
            return f"turn {place} is from {turn.get('from')!r}, which is none of {', '.join(_ROLES)}"
    return ""


def _trouble(said: list[Message]) -> str:
    """Why the last turn cannot be learnt from these; "" if it can."""
    if said[0]["role"] == "assistant":
        return "assistant_first"
    if any(not (message["content"] or "").strip() for message in said):
        return "empty_turn"
    return "assistant_after_assistant" if said[-2]["role"] == "assistant" else ""


def _chat(system: str, said: list[Message]) -> list[Message]:
    return [{"role": "system", "content": system}, *said] if system.strip() else said


def _published(system: str, said: list[Message], row_id: str) -> list[Message]:
    """System prompt and history as the instruction, the turn to answer as the input."""
    *history, last, answer = said
    block = ["[BEGIN OF CONVERSATION HISTORY]", *map(_line, history), "[END OF CONVERSATION HISTORY]"]
    parts = [system.strip(), "\n".join(block) if history else ""]
    record = {
        "instruction": "\n\n".join(part for part in parts if part),
        "input": _line(last),
        "output": answer["content"],
    }
    return alpaca_messages(record, row_id)


def _line(message: Message) -> str:
    return f"{_LABELS[message['role']]}: {message['content']}"
