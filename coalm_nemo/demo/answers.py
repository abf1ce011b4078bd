"""Read a model's answers. They are parsed as text: literal values only, nothing is ever evaluated."""

from __future__ import annotations

import ast
import json
from typing import Any

from coalm_nemo.demo.world import Call

MAX_ANSWER_CHARS = 4000
"""Longer answers are not parsed: Python's parser may not be fed without bound."""


def parse_action(text: str) -> Call | None:
    """`Action: Name(arg='text', n=2)` -> Call; None for anything else (positional arguments, nested calls, no call)."""
    text = text.strip()
    if not text.startswith("Action:") or len(text) > MAX_ANSWER_CHARS:
        return None
    try:
        node = ast.parse(text.removeprefix("Action:").strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        return None
    arguments: dict[str, Any] = {}
    for keyword in node.keywords:
        value = keyword.value
        if keyword.arg is None or keyword.arg in arguments:
            return None
        if not isinstance(value, ast.Constant) or type(value.value) not in (str, int):
            return None
        arguments[keyword.arg] = value.value
    return Call(node.func.id, arguments)


def parse_call_list(text: str) -> list[Call] | None:
    """`[{"name": ..., "arguments": {...}}]` -> calls; None if it is not that."""
    calls = _parse_json(text)
    if not isinstance(calls, list):
        return None
    if not all(isinstance(c, dict) and c.keys() == {"name", "arguments"} for c in calls):
        return None
    if not all(isinstance(c["name"], str) and isinstance(c["arguments"], dict) for c in calls):
        return None
    return [Call(c["name"], c["arguments"]) for c in calls]


def parse_state(text: str) -> dict[str, Any] | None:
    """`System: {"domain": ..., "slot_values": {...}}` -> that object; None if it is not that."""
    text = text.strip()
    state = _parse_json(text.removeprefix("System:")) if text.startswith("System:") else None
    return state if isinstance(state, dict) and state.keys() == {"domain", "slot_values"} else None


def _parse_json(text: str) -> Any:
    if len(text) > MAX_ANSWER_CHARS:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def same(a: Any, b: Any) -> bool:
    """Equal as JSON: the order of keys is free, the type of a value is not."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def same_call(a: Call | None, b: Call) -> bool:
    """The same name and exactly the same arguments."""
    return a is not None and a.name == b.name and same(dict(a.arguments), dict(b.arguments))
