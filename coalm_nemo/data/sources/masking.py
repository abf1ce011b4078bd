"""Function masking after Hammer (arXiv 2410.04587): names become noise, so a model must read what a tool does.

Descriptions are left as they are. One that spells a masked name out ("the `city` to look up") hints at what was
hidden, but misleads nobody: the call still needs the identifier that stands in the tool list. A default that its
description spells out would contradict it, so such a default keeps its value.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Tool = dict[str, Any]
Call = dict[str, Any]

_ALPHABET = string.ascii_letters + string.digits + "_."
_LENGTHS = range(4, 16)
"""Both as in the masked rows that Hammer's authors show."""


@dataclass(frozen=True)
class Masking:
    """One renaming of a record: applied to its tools and its calls alike. No two entries share an identifier."""

    functions: dict[str, str]
    parameters: dict[tuple[str, str], str]
    """(function, parameter) -> identifier: what two functions both call `city` gets two."""
    defaults: dict[tuple[str, str, str], str] = field(default_factory=dict)
    """(function, parameter, default) -> identifier."""

    def tool(self, tool: Tool) -> Tool:
        name = tool["name"]
        masked = {**tool, "name": self.functions[name]}
        specs = {self.parameters[name, p]: self._spec(name, p, spec) for p, spec in properties(tool).items()}
        if is_schema(tool):
            masked["parameters"] = self._required(name, {**tool["parameters"], "properties": specs})
        elif specs:
            masked["parameters"] = specs
        return self._required(name, masked)

    def call(self, call: Call) -> Call:
        name = call["name"]
        return {
            "name": self.functions[name],
            "arguments": {self.parameters[name, p]: self._value(name, p, v) for p, v in call["arguments"].items()},
        }

    def _spec(self, name: str, parameter: str, spec: Any) -> Any:
        if not isinstance(spec, dict) or "default" not in spec:
            return spec
        return {**spec, "default": self._value(name, parameter, spec["default"])}

    def _value(self, name: str, parameter: str, value: Any) -> Any:
        return self.defaults.get((name, parameter, value), value) if isinstance(value, str) else value

    def _required(self, name: str, holder: dict[str, Any]) -> dict[str, Any]:
        required = holder.get("required")
        if not isinstance(required, list):
            return holder
        return {**holder, "required": [self.parameters.get((name, str(p)), p) for p in required]}


def is_schema(tool: Tool) -> bool:
    """Whether `parameters` is a JSON schema rather than xLAM's name -> {description, type, default}."""
    parameters = tool.get("parameters") or {}
    inner = parameters.get("properties")
    if not isinstance(inner, dict):
        return False
    return isinstance(parameters.get("type"), str) or all(isinstance(spec, dict) for spec in inner.values())


def properties(tool: Tool) -> dict[str, Any]:
    """Parameter name -> its description, in either spelling."""
    parameters = tool.get("parameters") or {}
    if is_schema(tool):
        return dict(parameters["properties"])
    return {} if parameters.get("type") == "object" else dict(parameters)


def draw_masking(tools: list[Tool], calls: list[Call], query: str, draw: random.Random, defaults: bool) -> Masking:
    """Fresh identifiers for every function and parameter, and with `defaults` for the default values that allow it."""
    functions = list(dict.fromkeys(tool["name"] for tool in tools))
    parameters = list(dict.fromkeys((tool["name"], p) for tool in tools for p in properties(tool)))
    fresh = _identifiers(draw, {*functions, *(p for _, p in parameters)})
    named = {name: next(fresh) for name in functions}
    return Masking(
        named,
        {key: next(fresh) for key in parameters},
        {key: next(fresh) for key in _maskable_defaults(tools, calls, query)} if defaults else {},
    )


def _identifiers(draw: random.Random, taken: set[str]) -> Iterator[str]:
    """Identifiers never given before, with at least one letter."""
    while True:
        name = "".join(draw.choices(_ALPHABET, k=draw.choice(_LENGTHS)))
        if name not in taken and any(c.isalpha() for c in name):
            taken.add(name)
            yield name


def _maskable_defaults(tools: list[Tool], calls: list[Call], query: str) -> list[tuple[str, str, str]]:
    """Defaults whose replacement leaves the answer derivable.

    An argument equal to its default was either left to the default (then the masked one is right) or asked for in the
    query (then it must stay, and the default with it).
    """
    asked = {
        (call["name"], p, value)
        for call in calls
        for p, value in call["arguments"].items()
        if isinstance(value, str) and _mentions(query, value)
    }
    keys = [(t["name"], p, s["default"]) for t in tools for p, s in properties(t).items() if _is_free_text(s)]
    return [key for key in dict.fromkeys(keys) if key not in asked]


def _is_free_text(spec: Any) -> bool:
    """Whether the parameter is a string with a default that nothing else in its description pins down."""
    if not isinstance(spec, dict) or not isinstance(spec.get("default"), str) or not spec["default"].strip():
        return False
    kind = str(spec.get("type", "str")).lower()
    rest = str({key: value for key, value in spec.items() if key not in ("default", "type")})
    return kind.startswith("str") and not _mentions(rest, spec["default"])


def _mentions(text: str, value: str) -> bool:
    """Whether the value stands in the text as whole words, in whatever case."""
    return re.search(rf"(?<!\w){re.escape(value.strip())}(?!\w)", text, re.IGNORECASE) is not None
