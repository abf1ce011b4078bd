"""A function call as one line of Python, `Fn(a='v', n=2)`, written and read back without ever evaluating it."""

from __future__ import annotations

import ast
from collections.abc import Mapping

Value = str | int | bool


def quoted(text: str) -> str:
    """A Python string literal that is always single-quoted, unlike repr's, which changes to double quotes for an apostrophe.

    repr keeps single quotes when the string holds a double quote, so one is put in front and cut off again.
    """
    return "'" + repr('"' + text)[2:]


def literal(value: Value) -> str:
    return quoted(value) if isinstance(value, str) else repr(value)


def render_call(name: str, arguments: Mapping[str, Value]) -> str:
    return f"{name}({', '.join(f'{key}={literal(value)}' for key, value in arguments.items())})"


def parse_call(text: str) -> tuple[str, dict[str, Value]]:
    """`Fn(a='v', n=2)` -> ("Fn", {"a": "v", "n": 2}). Raises ValueError for anything else, positional arguments included."""
    try:
        call = ast.parse(text, mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as e:
        raise ValueError(f"not a Python expression: {text!r}") from e
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise ValueError(f"not one call with keyword arguments only: {text!r}")
    arguments: dict[str, Value] = {}
    for keyword in call.keywords:
        value = _constant(keyword.value)
        if keyword.arg is None or keyword.arg in arguments or not isinstance(value, str | int):
            raise ValueError(f"an argument is unnamed, given twice or neither text, number nor truth value: {text!r}")
        arguments[keyword.arg] = value
    return call.func.id, arguments


def _constant(node: ast.expr) -> object:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as e:
        raise ValueError("an argument is not a literal") from e
