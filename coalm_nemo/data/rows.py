"""Rows as users write them, one JSON object a line, read and checked.

`messages` (chat, with optional `tools`), Alpaca's `instruction`/`input`/`output`, `text` (every token supervised) or
`token_ids` with an optional `loss_mask`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coalm_nemo.errors import UserError

ROLES = ("system", "user", "assistant", "tool", "ipython")


@dataclass(frozen=True)
class Row:
    """One training example. Exactly one of `messages`, `text`, `token_ids` is given."""

    row_id: str
    """The row's own `id`, or `FILE:LINE`."""
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    loss_mask: list[int] | None = None
    part: str = ""
    """Which part of its source the row belongs to, where a source has parts (CRA action, CRA response, ...)."""


def read_rows(path: Path) -> list[Row]:
    """All rows of a JSONL file. Raises UserError naming the file and line of the first bad one."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"data file {path} does not exist")
    rows = [parse_row(raw, f"{path}:{number}") for number, raw in _json_lines(path)]
    if not rows:
        raise UserError(f"data file {path} holds no rows")
    return rows


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, parse_line(line)
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text; rows are JSON, one object a line") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}:{number} is not valid JSON ({e})") from e


def parse_line(line: str) -> Any:
    """One line's value. Raises ValueError for bad JSON, and for half a surrogate pair, which no tokenizer takes."""
    value = json.loads(line)
    if "\\ud" in line.lower():
        json.dumps(value, ensure_ascii=False).encode()
    return value


def parse_row(raw: Any, where: str) -> Row:
    """One JSON value -> Row. `where` (FILE:LINE) names it in error sentences and is its id if it has none."""
    if not isinstance(raw, dict):
        raise UserError(f"{where}: a row must be a JSON object, not {type(raw).__name__}")
    row_id = str(raw.get("id", where))
    if "messages" in raw:
        return Row(row_id, messages=_messages(raw["messages"], where), tools=_tools(raw.get("tools"), where))
    if "output" in raw:
        return Row(row_id, messages=alpaca_messages(raw, where))
    if isinstance(raw.get("text"), str):
        return Row(row_id, text=raw["text"])
    if "token_ids" in raw:
        return _token_row(raw, row_id, where)
    raise UserError(f"{where}: a row needs 'messages', or 'instruction' and 'output', or 'text'; found {sorted(raw)}")


def alpaca_messages(raw: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Alpaca row -> one user turn (instruction, blank line, input) and one assistant turn (output)."""
    parts = [raw.get("instruction") or "", raw.get("input") or ""]
    if not all(isinstance(p, str) for p in [*parts, raw["output"]]):
        raise UserError(f"{where}: 'instruction', 'input' and 'output' must be strings")
    prompt = "\n\n".join(p for p in parts if p.strip())
    if not prompt:
        raise UserError(f"{where}: 'instruction' and 'input' are both empty")
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": raw["output"]}]
    return _messages(messages, where)


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: 'messages' must be a non-empty list")
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise UserError(f"{where}: message {number} needs a 'role', one of {', '.join(ROLES)}")
        content = message.get("content")
        if not isinstance(message.get("tool_calls") or [], list):
            raise UserError(f"{where}: message {number}: 'tool_calls' must be a list")
        if not isinstance(content, str) and not message.get("tool_calls"):
            raise UserError(f"{where}: message {number} needs a 'content' string")
        if message["role"] == "assistant" and not message.get("tool_calls") and not str(content).strip():
            raise UserError(f"{where}: message {number} is an empty assistant turn; there is nothing to learn from it")
    if value[0]["role"] == "assistant":
        raise UserError(f"{where}: message 1 is an assistant turn, but there is nothing that it could answer")
    if not any(m["role"] == "assistant" for m in value):
        raise UserError(f"{where}: the row has no assistant turn, so nothing in it would be learnt")
    return value


def _tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as e:
            raise UserError(f"{where}: 'tools' is a string that is not JSON") from e
    if value is not None and not isinstance(value, list):
        raise UserError(f"{where}: 'tools' must be a list")
    return value or None


def _token_row(raw: dict[str, Any], row_id: str, where: str) -> Row:
    ids, mask = raw["token_ids"], raw.get("loss_mask")
    if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i < 2**31 for i in ids) or len(ids) < 2:
        raise UserError(f"{where}: 'token_ids' must be a list of at least two non-negative 32-bit integers")
    if mask is not None and (not isinstance(mask, list) or len(mask) != len(ids)):
        raise UserError(f"{where}: 'loss_mask' must have as many entries as 'token_ids'")
    if mask is not None and not all(isinstance(m, int) and m in (0, 1) for m in mask):
        raise UserError(f"{where}: 'loss_mask' must hold 0 and 1 only")
    return Row(row_id, token_ids=ids, loss_mask=mask)


def split_validation(rows: list[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """(train, validation) by a hash of each row's content: the same row falls on the same side whatever its place."""
    validation = [r for r in rows if _hash_fraction(r) < fraction]
    return [r for r in rows if _hash_fraction(r) >= fraction], validation


def _hash_fraction(row: Row) -> float:
    content = json.dumps([row.messages, row.tools, row.text, row.token_ids], sort_keys=True, ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") / 2**64
