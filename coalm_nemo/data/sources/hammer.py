"""xLAM function-calling records, masked as Hammer masks them: the LA part of CoALM-IT that is not ToolACE."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coalm_nemo.data.rows import Row, alpaca_messages
from coalm_nemo.data.sources.base import Block, Dropped
from coalm_nemo.data.sources.masking import Call, Tool, draw_masking, properties
from coalm_nemo.data.sources.readers import FileSource, bad_record, data_files, nested_json, records
from coalm_nemo.errors import UserError

TASK = (
    "You turn a user's request into tool calls. Read what each tool below does and what each of its parameters means; "
    "names may say nothing. Then\n"
    "1. choose the tool or tools that fulfil the request, and call one as often as the request needs it;\n"
    "2. give every argument a value that the request states or that the tool has as its default;\n"
    "3. call nothing where no tool fits."
)
FORMAT = (
    "Answer with a JSON list of calls and with nothing else. Keep to the type that each parameter asks for. "
    "An empty list [] says that no tool fits. The form is\n"
    '[{"name": "tool_name", "arguments": {"parameter_name": "value"}}]'
)


@dataclass(frozen=True)
class HammerSource(FileSource):
    """Records of `query`, `tools` and `answers`, each given as `maskings` rows with other identifiers."""

    irrelevance: str = ""
    """A second file or directory: records whose tools do not fit the query, so the answer is `[]`."""
    maskings: int = 3
    mask_defaults: bool = False
    """Also replace string defaults, in the answer too where it relies on them."""
    keep_original: bool = False
    """Add each record unmasked as well."""

    def __post_init__(self) -> None:
        if self.maskings < (0 if self.keep_original else 1):
            raise UserError(f"hammer: maskings is {self.maskings}, which gives no rows; it must be at least 1")

    def files(self) -> list[Path]:
        more = data_files(Path(self.irrelevance)) if self.irrelevance else []
        known = {file.resolve() for file in more}
        return [f for f in data_files(Path(self.path)) if f.resolve() not in known] + more

    def row_id(self, block: Block, number: int, record: dict[str, Any]) -> str:
        """Ids of the irrelevance records start anew in the public file, so they get a prefix."""
        if not self._is_irrelevance(block.file):
            return super().row_id(block, number, record)
        return f"irrelevance/{record['id'] if record.get('id') is not None else f'{block.file.name}:{number}'}"

    def rows(self, block: Block, seed: int) -> Iterator[Row | Dropped]:
        answerless = self._is_irrelevance(block.file)
        for number, record in records(block):
            trouble = _wrong_keys(record, answerless)
            if trouble:
                raise bad_record(block.file, number, trouble)
            answers = record.get("answers")
            calls = [] if answerless and not answers else _calls(answers)
            yield from self._maskings(record, calls, self.row_id(block, number, record), seed)

    def _is_irrelevance(self, file: Path) -> bool:
        return bool(self.irrelevance) and Path(self.irrelevance) in (file, *file.parents)

    def _maskings(
        self, record: dict[str, Any], calls: list[Call] | None, row_id: str, seed: int
    ) -> Iterator[Row | Dropped]:
        query, tools = record["query"].strip(), _tools(record["tools"])
        trouble = _trouble(query, tools, calls)
        if trouble or tools is None or calls is None:
            yield Dropped(trouble, row_id)
            return
        if self.keep_original:
            yield _row(row_id, query, tools, calls)
        for k in range(self.maskings):
            draw = random.Random(f"{seed}:{row_id}:{k}")
            masking = draw_masking(tools, calls, query, draw, self.mask_defaults)
            masked = [masking.tool(tool) for tool in tools]
            draw.shuffle(masked)
            yield _row(f"{row_id}/m{k}", query, masked, [masking.call(call) for call in calls])


def _row(row_id: str, query: str, tools: list[Tool], calls: list[Call]) -> Row:
    blocks = {"TASK INSTRUCTION": TASK, "AVAILABLE TOOLS": _text(tools), "FORMAT INSTRUCTION": FORMAT}
    record = {
        "instruction": "\n\n".join(_fenced(name, body) for name, body in blocks.items()),
        "input": _fenced("QUERY", query),
        "output": _text(calls),
    }
    return Row(row_id, messages=alpaca_messages(record, row_id), part="la_hammer")


def _fenced(name: str, body: str) -> str:
    return f"[BEGIN OF {name}]\n{body}\n[END OF {name}]"


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _wrong_keys(record: dict[str, Any], answerless: bool) -> str:
    missing = [k for k in ("query", "tools", "answers") if k not in record and not (answerless and k == "answers")]
    if missing:
        return f"has no {missing[0]!r}; an xLAM record has 'query', 'tools' and 'answers'; found {sorted(record)}"
    if not isinstance(record["query"], str):
        return "has a 'query' that is not a string"
    wrong = [k for k in ("tools", "answers") if not isinstance(record.get(k), str | list | None)]
    return f"has {wrong[0]!r} that are neither a list nor a string of JSON" if wrong else ""


def _trouble(query: str, tools: list[Tool] | None, calls: list[Call] | None) -> str:
    """Why the record cannot be used; "" if it can."""
    if not query:
        return "empty_query"
    if tools is None:
        return "malformed_tools"
    if calls is None:
        return "malformed_answers"
    names = {tool["name"] for tool in tools}
    if any(call["name"] not in names for call in calls):
        return "call_of_unknown_function"
    known = {(tool["name"], p) for tool in tools for p in properties(tool)}
    if any((call["name"], p) not in known for call in calls for p in call["arguments"]):
        return "argument_of_unknown_name"
    return ""


def _tools(value: Any) -> list[Tool] | None:
    """The tools, OpenAI's {"type": "function", "function": TOOL} unwrapped. None where they are malformed."""
    entries = _list(value)
    if entries is None:
        return None
    tools = [e["function"] if isinstance(e, dict) and isinstance(e.get("function"), dict) else e for e in entries]
    return tools if all(_is_named(t) and isinstance(t.get("parameters"), dict | None) for t in tools) else None


def _calls(value: Any) -> list[Call] | None:
    """The calls as {"name", "arguments"}. None where they are malformed."""
    entries = _list(value)
    if entries is None or not all(map(_is_named, entries)):
        return None
    calls = [{"name": e["name"], "arguments": _nested(e.get("arguments", {}))} for e in entries]
    return calls if all(isinstance(call["arguments"], dict) for call in calls) else None


def _is_named(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str) and bool(value["name"].strip())


def _list(value: Any) -> list[Any] | None:
    value = _nested(value)
    return value if isinstance(value, list) else None


def _nested(value: Any) -> Any:
    """JSON in a string is read, all else taken as it is; None where it is not JSON."""
    try:
        return nested_json(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return None
