"""Read the demo's answers: exactly the forms that its rows have. Literal values only, nothing is ever evaluated."""

from __future__ import annotations

from typing import Any

from coalm_nemo.demo.world import Call
from coalm_nemo.evaluation.calls import as_call, parse_calls, parse_literal
from coalm_nemo.evaluation.literals import same_value as same

__all__ = ["parse_action", "parse_call_list", "parse_state", "same", "same_call"]

MAX_ANSWER_CHARS = 4000
"""The demo's answers are far shorter; a longer one is wrong unread."""


def parse_action(text: str) -> Call | None:
    """`Action: Name(arg='text', n=2)` -> Call; None for anything else (positional arguments, nested calls, no call)."""
    text = text.strip()
    if not text.startswith("Action:") or not text.endswith(")") or len(text) > MAX_ANSWER_CHARS:
        return None
    parsed = parse_calls(text)
    if parsed.text or len(parsed.calls) != 1 or not parsed.calls[0].name.isidentifier():
        return None
    arguments = parsed.calls[0].arguments
    if not all(type(v) is str or (type(v) is int and v >= 0) for v in arguments.values()):
        return None
    return Call(parsed.calls[0].name, arguments)


def parse_call_list(text: str) -> list[Call] | None:
    """`[{"name": ..., "arguments": {...}}]` -> calls; None if it is not that."""
    values = _parse(text)
    if not isinstance(values, list):
        return None
    calls = [as_call(v) if isinstance(v, dict) and v.keys() == {"name", "arguments"} else None for v in values]
    return None if None in calls else [Call(c.name, c.arguments) for c in calls if c is not None]


def parse_state(text: str) -> dict[str, Any] | None:
    """`System: {"domain": ..., "slot_values": {...}}` -> that object; None if it is not that."""
    text = text.strip()
    state = _parse(text.removeprefix("System:")) if text.startswith("System:") else None
    return state if isinstance(state, dict) and state.keys() == {"domain", "slot_values"} else None


def _parse(text: str) -> Any:
    return parse_literal(text) if len(text) <= MAX_ANSWER_CHARS else None


def same_call(a: Call | None, b: Call) -> bool:
    """The same name and exactly the same arguments."""
    return a is not None and a.name == b.name and same(dict(a.arguments), dict(b.arguments))
