"""Is a call the gold call? API-Bank writes every value as text, so 5 and "5" are one value here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from coalm_nemo.evaluation.calls import Call, Parsed, parse_literal
from coalm_nemo.evaluation.literals import same_value


@dataclass
class Match:
    """An answer against the gold call."""

    name: bool = False
    arguments: bool = False
    """All of the gold arguments and no other, each with the gold value; whatever the name."""
    values_right: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def call(self) -> bool:
        return self.name and self.arguments


def match_call(answer: Parsed, gold: Call) -> Match:
    """Exactly one call is due: of several, none is right."""
    if len(answer.calls) != 1:
        fault = "several_calls" if answer.calls else answer.fault or "no_call"
        return Match(faults=[fault])
    call = answer.calls[0]
    right = sum(k in call.arguments and same_argument(call.arguments[k], v) for k, v in gold.arguments.items())
    match = Match(call.name == gold.name, right == len(gold.arguments) == len(call.arguments), right)
    missing = gold.arguments.keys() - call.arguments.keys()
    checks = {
        "wrong_name": not match.name,
        "missing_argument": bool(missing),
        "unknown_argument": bool(call.arguments.keys() - gold.arguments.keys()),
        "wrong_argument": right + len(missing) < len(gold.arguments),
    }
    match.faults = [fault for fault, there in checks.items() if there]
    return match


def as_text(value: Any) -> str:
    """A value as the benchmark's own reader would have it."""
    return value if isinstance(value, str) else str(value)


def same_argument(a: Any, b: Any) -> bool:
    """The same text but for blanks around it, or the same literal (5 and 5.0, lists in either quotes)."""
    one, other = as_text(a).strip(), as_text(b).strip()
    if one == other:
        return True
    first, second = parse_literal(one), parse_literal(other)
    return first is not None and second is not None and same_value(first, second)
