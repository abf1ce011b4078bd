"""The released CoALM-IT set: `instruction`, `input`, `output` strings, each row told apart by its structure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from coalm_nemo.data.rows import Row, alpaca_messages
from coalm_nemo.data.sources.base import Block, Dropped
from coalm_nemo.data.sources.readers import FileSource, bad_record, records
from coalm_nemo.errors import UserError

PARTS = ("tod", "la_hammer", "la_toolace", "cra_action", "cra_response", "unrecognised")

_FENCED = re.compile(r"```(?:\w*\s*\n)?(.*?)```", re.DOTALL)
_THOUGHT = re.compile(r"Thought\s*\d*\s*:.*?(?=\n[ \t]*(?:Action|System)\s*:|\Z)", re.DOTALL)
_LABEL = re.compile(r"(Action|System)\s*:\s*")
_HAMMER_BLOCK = re.compile(r"\[BEGIN OF (?:AVAILABLE TOOLS|QUERY)\]")
_PYTHON_CALLS = re.compile(r"\[\s*[^\W\d][^()\[\]{}\"'=]*\(.*\)\s*\]", re.DOTALL)
_TOOL_NAME = re.compile(r"[\"']name[\"']\s*:")
_TOOL_REST = re.compile(r"[\"'](?:parameters|arguments|description)[\"']\s*:")


@dataclass(frozen=True)
class ReleasedSource(FileSource):
    """Rows as released, word for word; `parts` leaves some out, as the paper's ablations do."""

    parts: list[str] = field(default_factory=lambda: list(PARTS))
    """Which of tod, la_hammer, la_toolace, cra_action, cra_response, unrecognised are kept."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.parts) - set(PARTS)):
            raise UserError(f"released CoALM-IT has no part {unknown[0]!r}; its parts are {', '.join(PARTS)}")

    def rows(self, block: Block, seed: int) -> Iterator[Row | Dropped]:
        for number, record in records(block):
            trouble = _wrong_columns(record)
            if trouble:
                raise bad_record(block.file, number, trouble)
            yield self._row(record, self.row_id(block, number, record))

    def _row(self, record: dict[str, Any], row_id: str) -> Row | Dropped:
        instruction, query, output = (record.get(c) or "" for c in ("instruction", "input", "output"))
        if not output.strip():
            return Dropped("empty_output", row_id)
        if not instruction.strip() and not query.strip():
            return Dropped("empty_prompt", row_id)
        part = recognise(instruction, query, output)
        if part not in self.parts:
            return Dropped("part_not_wanted", row_id)
        return Row(row_id, messages=alpaca_messages(record, row_id), part=part)


def recognise(instruction: str, query: str, output: str) -> str:
    """Which part of CoALM-IT a row is. The answer's form decides; the prompt only where answers look alike."""
    answer = _bare(output)
    label = _LABEL.match(answer)
    if label and label[1] == "Action":
        return "cra_action"
    if label:
        return "tod" if _is_state(answer[label.end() :]) else "cra_response"
    if _HAMMER_BLOCK.search(instruction) or _HAMMER_BLOCK.search(query):
        return "la_hammer" if _is_call_list(answer) else "unrecognised"
    if _PYTHON_CALLS.fullmatch(answer) or _offers_tools(instruction) or _offers_tools(query):
        return "la_toolace"
    return "unrecognised"


def _wrong_columns(record: dict[str, Any]) -> str:
    if "output" not in record or not ("instruction" in record or "input" in record):
        return f"needs the columns 'instruction', 'input' and 'output'; found {sorted(record)}"
    wrong = [c for c in ("instruction", "input", "output") if not isinstance(record.get(c, ""), str | None)]
    return f"has a {wrong[0]!r} that is not a string" if wrong else ""


def _bare(output: str) -> str:
    """The answer without code fence, and without the thought that rows trained to think write first."""
    answer = output.strip()
    if answer.startswith("```") and (fenced := _FENCED.fullmatch(answer)):
        answer = fenced[1].strip()
    if answer.startswith("Thought") and (thought := _THOUGHT.match(answer)):
        answer = answer[thought.end() :].lstrip() or answer
    return answer


def _is_state(text: str) -> bool:
    state = _json_or_none(_bare(text)) if "{" in text[:20] else None
    return isinstance(state, dict) and ("slot_values" in state or "domain" in state)


def _is_call_list(text: str) -> bool:
    calls = _json_or_none(text)
    return isinstance(calls, list) and all(isinstance(c, dict) and "name" in c for c in calls)


def _offers_tools(prompt: str) -> bool:
    return bool(_TOOL_NAME.search(prompt) and _TOOL_REST.search(prompt))


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
