"""Services, their functions and slots, as schema.json of Schema-Guided Dialogue (and MultiWOZ 2.2) describes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from coalm_nemo.data.sources.cra.literal import Value, render_call
from coalm_nemo.errors import UserError

DONTCARE = "dontcare"
"""SGD's and MultiWOZ's mark for "any value will do"."""


@dataclass(frozen=True)
class Slot:
    name: str
    categorical: bool
    """Only a value of `values` may be used. Such values carry no span in SGD: "two of us" is annotated as "2"."""
    values: tuple[str, ...]

    @cached_property
    def kind(self) -> str:
        """`bool` or `int` where the possible values are all of that type, otherwise `str`."""
        if self.categorical and self.values and set(self.values) <= {"True", "False"}:
            return "bool"
        if self.categorical and self.values and all(_is_plain_int(value) for value in self.values):
            return "int"
        return "str"

    def typed(self, text: str) -> Value:
        """The source's string as the Python value that stands in a call; `dontcare` stays a string in every slot."""
        if self.kind == "bool" and text in ("True", "False"):
            return text == "True"
        return int(text) if self.kind == "int" and _is_plain_int(text) else text


def _is_plain_int(text: str) -> bool:
    """Whether int and back gives the same text, so that the bare number stands for exactly this value."""
    return text.isascii() and text.isdigit() and str(int(text)) == text


@dataclass(frozen=True)
class Function:
    """An intent of a service, seen as a function with keyword arguments."""

    service: str
    name: str
    description: str
    transactional: bool
    required: tuple[str, ...]
    optional: Mapping[str, str]
    """Name -> default, in the file's order."""
    slots: Mapping[str, Slot]
    """All slots of the service."""

    @cached_property
    def arguments(self) -> tuple[str, ...]:
        return (*self.required, *self.optional)

    def typed(self, parameters: Mapping[str, str]) -> dict[str, Value]:
        """The source's parameters with their types, in the signature's order; unknown names go last, untyped."""
        known = [name for name in self.arguments if name in parameters]
        unknown = [name for name in parameters if name not in known]
        typed: dict[str, Value] = {name: self.slots[name].typed(parameters[name]) for name in known}
        return typed | {name: parameters[name] for name in unknown}

    def shown_arguments(self, with_optional: bool) -> tuple[str, ...]:
        return self.arguments if with_optional else self.required

    def signature(self, with_optional: bool) -> str:
        """`Fn(required, optional='default')`; the published tool list has the required ones only."""
        optional = self.optional if with_optional else {}
        defaults = [render_call("", {name: self.slots[name].typed(value)})[1:-1] for name, value in optional.items()]
        return f"{self.name}({', '.join([*self.required, *defaults])})"


@dataclass(frozen=True)
class Schema:
    functions: Mapping[tuple[str, str], Function]
    """By (service, name): several services have a FindBus of their own."""
    slots: Mapping[str, Mapping[str, Slot]]
    """By service."""

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(name for _, name in self.functions)

    def signatures(self, with_optional: bool, services: Collection[str] | None = None) -> list[str]:
        """In the file's order, one of each: where two services agree in all that is shown, they are one line.

        `services`: only theirs; None: those of all services.
        """
        shown = [f for f in self.functions.values() if services is None or f.service in services]
        return list(dict.fromkeys(f.signature(with_optional) for f in shown))


def read_schema(path: Path, rename: Callable[[str], str] = str) -> Schema:
    """schema.json -> Schema. `rename` maps slot names (MultiWOZ drops its domain prefix). Raises UserError."""
    try:
        services = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not valid JSON ({e})") from e
    if not isinstance(services, list) or not services:
        raise UserError(f"{path}: a schema is a JSON list of services, each with service_name, slots and intents")
    return _schema(services, path, rename)


def _schema(services: list[Any], path: Path, rename: Callable[[str], str]) -> Schema:
    slots: dict[str, Mapping[str, Slot]] = {}
    functions: dict[tuple[str, str], Function] = {}
    for number, service in enumerate(services, 1):
        try:
            name = service["service_name"]
            slots[name] = {slot.name: slot for slot in (_slot(raw, rename) for raw in service["slots"])}
            for intent in service["intents"]:
                functions[name, intent["name"]] = _function(name, intent, slots[name], rename)
        except (KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{path}: service {number} is not in the layout of an SGD schema ({e!r})") from e
    return Schema(functions, slots)


def _slot(raw: dict[str, Any], rename: Callable[[str], str]) -> Slot:
    return Slot(rename(raw["name"]), bool(raw["is_categorical"]), tuple(raw.get("possible_values", ())))


def _function(service: str, raw: dict[str, Any], slots: Mapping[str, Slot], rename: Callable[[str], str]) -> Function:
    required = tuple(rename(name) for name in raw["required_slots"])
    optional = {rename(name): default for name, default in raw["optional_slots"].items()}
    unknown = [name for name in (*required, *optional) if name not in slots]
    if unknown:
        raise KeyError(f"intent {raw['name']} uses slot {unknown[0]}, which the service does not have")
    description = str(raw.get("description", ""))
    return Function(service, raw["name"], description, bool(raw["is_transactional"]), required, optional, slots)
