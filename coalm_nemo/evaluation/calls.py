"""The one place where a model's calls are read: `[f(a=1), g(b='x')]`, JSON, `Action: f(a=1)`; nothing is ever run.

What is no call is no error: `Parsed.calls` is empty and `Parsed.fault` says whether the answer tried to call and failed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coalm_nemo.evaluation.literals import Malformed, Reader, same_value

MAX_CHARS = 32_768
"""Longer answers are not read."""
MAX_CALLS = 256
_MAX_PLACES = 64
"""How many places in running text are tried as the start of a call."""

_END_TOKENS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>")
_PYTHON_TAG = re.compile(r"<\|python_tag\|>")
_TAG = re.compile(r"<(?:tool_call|tool_calls|function_call)>")
_END_TAG = re.compile(r"\s*(?:</(?:tool_call|tool_calls|function_call)>|\Z)")
_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_ACTION = re.compile(r"^[ \t]*Action[ \t]?\d{0,3}[ \t]?:[ \t]*", re.MULTILINE)
_OBSERVATION = re.compile(r"^[ \t]*Observation[ \t]?\d{0,3}[ \t]?:", re.MULTILINE)
_NAME = re.compile(r"[^\W\d][\w.\-]{0,127}(?=\()")
_LISTED_NAME = re.compile(r"[\w/][\w ./:\-]{0,127}(?=\()")
"""Between square brackets a name may hold spaces and slashes: some published sets have such functions."""
_KEYWORD = re.compile(r"[^\W\d]\w*(?=[ \t]*=(?!=))")
_PLACE = re.compile(r"[\[{]|^(?=[ \t]{0,32}[^\W\d][\w.\-]{0,127}\()", re.MULTILINE)
_BETWEEN = re.compile(r"[\s,;]*")
_BETWEEN_ON_A_LINE = re.compile(r"[ \t,;]*")
_REST_OF_LINE = re.compile(r"[ \t;.,]*(?:\n|\Z)")
_NO_CALL = "no_call"
_ANNOUNCEMENTS = {"tool_call": _TAG, "python_tag": _PYTHON_TAG, "action": _ACTION}
"""What a model writes before a call. The first one in an answer says how its calls are written."""


@dataclass(frozen=True)
class Call:
    """A function's name and its keyword arguments."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Parsed:
    """An answer as it was read."""

    calls: tuple[Call, ...]
    form: str
    """How the calls were written: python, json, action, tool_call, python_tag; "" where there are none."""
    fault: str
    """Why an attempt at a call is none: malformed_call, positional_argument, duplicate_argument, not_a_literal, too_deep,
    too_long; "" where the calls are sound or none was tried."""
    text: str
    """What the answer says beside its calls, all of it where it has none."""


def parse_calls(text: str) -> Parsed:
    """Read every call of an answer. Never raises, and takes time in proportion to the (bounded) length."""
    if len(text) > MAX_CHARS:
        return Parsed((), "", "too_long", text)
    said = _without_end_tokens(text)
    whole = _parse_whole(said)
    if whole is not None:
        return whole
    found = [(m, form) for form, pattern in _ANNOUNCEMENTS.items() if (m := pattern.search(said))]
    if found:
        first, form = min(found, key=lambda pair: pair[0].start())
        return _parse_fenced(said, first.start()) or _parse_announced(said, form)
    return _parse_fenced(said, len(said)) or _parse_anywhere(said)


def same_call(a: Call | None, b: Call | None) -> bool:
    """The same name and, as JSON, the same arguments in any order."""
    return a is not None and b is not None and a.name == b.name and same_value(a.arguments, b.arguments)


def parse_state(text: str) -> dict[str, Any] | None:
    """The dialogue state of `System: {...}`, of a fenced block, or of a bare JSON object; None if there is none."""
    if len(text) > MAX_CHARS:
        return None
    said = _without_end_tokens(text).removeprefix("System:").strip()
    fence = _FENCE.search(said)
    state = parse_literal(fence.group(1) if fence else said)
    return state if _is_object(state) else None


def parse_literal(text: str) -> Any:
    """The value of a text that is one JSON or Python literal and nothing else; None if it is not that (or is null)."""
    if len(text) > MAX_CHARS:
        return None
    reader = Reader(text)
    try:
        value = reader.read_value()
        return value if reader.peek() == "" else None
    except Malformed:
        return None


def as_call(value: Any) -> Call | None:
    """`{"name": ..., "arguments" | "parameters": {...}}`, also within `{"function": ...}` -> Call; None for all else."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    given = [value[k] for k in ("arguments", "parameters") if k in value]
    if len(given) != 1:
        return None
    arguments = parse_literal(given[0]) if isinstance(given[0], str) else given[0]
    return Call(value["name"], arguments) if _is_object(arguments) else None


def render_call(name: str, arguments: Mapping[str, Any]) -> str:
    """`name(a='x', n=2)`: the Python spelling, literals only."""
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) for k in value)


def _without_end_tokens(text: str) -> str:
    text = text.strip()
    while text.endswith(_END_TOKENS):
        text = text[: text.rindex("<|")].rstrip()
    return text


def _parse_whole(said: str) -> Parsed | None:
    """An answer that is calls and nothing else."""
    reader = Reader(said)
    try:
        calls = _read_sequence(reader, _BETWEEN)
    except Malformed:
        return None
    return None if reader.peek() or not calls else _parsed(calls, _form(said), "", said)


def _parse_announced(said: str, form: str) -> Parsed:
    """Whatever is no call where the answer announces one is a fault. Made-up observations end the reading."""
    announcement, on_a_line = _ANNOUNCEMENTS[form], form == "action"
    stop = _OBSERVATION.search(said) if on_a_line else None
    reader = Reader(said[: stop.start()] if stop else said)
    calls: list[Call] = []
    beside, last = "", 0
    try:
        while found := announcement.search(reader.text, reader.at):
            beside += said[last : found.start()]
            reader.at = found.end()
            calls += _read_sequence(reader, _BETWEEN_ON_A_LINE if on_a_line else _BETWEEN)
            if reader.match_here(_REST_OF_LINE if on_a_line else _END_TAG) is None:
                raise Malformed("malformed_call")
            last = reader.at
    except Malformed as e:
        return Parsed((), "", "malformed_call" if str(e) == _NO_CALL else str(e), said)
    return _parsed(calls, form, (beside + said[last:]).strip(), said)


def _parse_fenced(said: str, before: int) -> Parsed | None:
    """Calls in a fenced block that begins `before`; a fence that holds something else is running text."""
    for fence in _FENCE.finditer(said):
        if fence.start() >= before:
            break
        reader = Reader(fence.group(1))
        try:
            calls = _read_sequence(reader, _BETWEEN)
            if reader.peek():
                raise Malformed("malformed_call")
        except Malformed as e:
            if str(e) == _NO_CALL:
                continue
            return Parsed((), "", str(e), said)
        return _parsed(calls, _form(fence.group(1)), (said[: fence.start()] + said[fence.end() :]).strip(), said)
    return None


def _parse_anywhere(said: str) -> Parsed:
    """Calls at the start of the answer, or a whole list, object or line of them within running text."""
    fault = ""
    for number, place in enumerate(_PLACE.finditer(said)):
        if number == _MAX_PLACES:
            break
        reader = Reader(said, place.start())
        try:
            calls = _read_sequence(reader, _BETWEEN)
            if not place.group() and reader.match_here(_REST_OF_LINE) is None:
                raise Malformed("malformed_call")
            if calls or not said[reader.at :].strip():
                return _parsed(
                    calls, _form(said[place.start() :]), (said[: place.start()] + said[reader.at :]).strip(), said
                )
        except Malformed as e:
            if place.start() == 0 and str(e) != _NO_CALL:
                fault = str(e)  # it began as a call: unless a sound one follows, that is why there is none
    return Parsed((), "", fault, said)


def _parsed(calls: Sequence[Call], form: str, beside: str, said: str) -> Parsed:
    if len(calls) > MAX_CALLS:
        return Parsed((), "", "too_long", said)
    return Parsed(tuple(calls), form, "", beside) if calls else Parsed((), "", "", said)


def _form(text: str) -> str:
    return "json" if text.lstrip("[ \t\r\n").startswith("{") else "python"


def _read_sequence(reader: Reader, between: re.Pattern[str]) -> list[Call]:
    """Lists, objects and calls one after another, until something else comes; at least one."""
    calls = _read_element(reader)
    while True:
        end = reader.at
        reader.match_here(between)
        if reader.at == len(reader.text) or not _PLACE.match(reader.text, reader.at) and not reader.sees(_NAME):
            reader.at = end
            return calls
        calls += _read_element(reader)


def _read_element(reader: Reader) -> list[Call]:
    first = reader.peek()
    if first == "[":
        return _read_call_list(reader)
    if first == "{":
        return [_read_object(reader)]
    name = reader.match(_NAME)
    if name is None:
        raise Malformed(_NO_CALL)
    return [Call(name, _read_arguments(reader))]


def _read_call_list(reader: Reader) -> list[Call]:
    reader.take("[")
    calls: list[Call] = []
    while reader.peek() != "]":
        if reader.peek() == "{":
            calls.append(_read_object(reader))
        elif name := reader.match(_LISTED_NAME):
            calls.append(Call(name.strip(), _read_arguments(reader)))
        else:
            raise Malformed("malformed_call" if calls else _NO_CALL)
        if reader.peek() != "]":
            reader.take(",")
    reader.take("]")
    return calls


def _read_object(reader: Reader) -> Call:
    value = reader.read_value()
    call = as_call(value)
    if call is None:
        tried = isinstance(value, dict) and "name" in value and ("arguments" in value or "parameters" in value)
        raise Malformed("malformed_call" if tried else _NO_CALL)
    return call


def _read_arguments(reader: Reader) -> dict[str, Any]:
    reader.take("(")
    arguments: dict[str, Any] = {}
    while reader.peek() != ")":
        keyword = reader.match(_KEYWORD)
        if keyword is None:
            reader.read_value()
            raise Malformed("positional_argument")
        if keyword in arguments:
            raise Malformed("duplicate_argument")
        reader.take("=")
        arguments[keyword] = reader.read_value()
        if reader.peek() != ")":
            reader.take(",")
    reader.take(")")
    return arguments
