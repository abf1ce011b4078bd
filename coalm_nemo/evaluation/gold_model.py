"""Models that know the gold answers: one replays them, one spoils its calls in a known way. They check the scorers."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from coalm_nemo.evaluation.base import Prompt
from coalm_nemo.evaluation.calls import Call, Parsed, parse_calls, render_call


class GoldModel:
    """Answers every prompt with its gold answer: what a benchmark gives it is the benchmark's ceiling."""

    name = "gold"
    fingerprint = "gold"

    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        return [p.gold for p in prompts]


@dataclass
class Damage:
    """What was done to one gold answer that holds calls."""

    prompt: Prompt
    answer: str
    dropped: list[Call] = field(default_factory=list)
    misspelt: list[Call] = field(default_factory=list)
    """As they were before."""
    changed: list[tuple[str, str]] = field(default_factory=list)
    """(function, argument) whose value is another one."""

    @property
    def sound(self) -> bool:
        return not (self.dropped or self.misspelt or self.changed)


class DamagedGoldModel:
    """Gold answers of which a share is spoiled, drawn by seed and prompt, whatever the order of asking.

    Answers without calls stay as they are. `log` has an entry for every answer that holds calls, in the order of asking.
    """

    name = "damaged gold"

    def __init__(self, seed: int = 0, *, change: float = 0.25, drop: float = 0.1, misspell: float = 0.1) -> None:
        """`change`: share of argument values; `drop`, `misspell`: shares of calls."""
        self.seed, self.change, self.drop, self.misspell = seed, change, drop, misspell
        self.fingerprint = f"damaged gold {seed} {change} {drop} {misspell}"
        self.log: list[Damage] = []

    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        return [self._answer(p) for p in prompts]

    def _answer(self, prompt: Prompt) -> str:
        parsed = parse_calls(prompt.gold)
        if not parsed.calls:
            return prompt.gold
        rng = random.Random(json.dumps([self.seed, list(prompt.messages), prompt.gold], sort_keys=True))
        damage = Damage(prompt, prompt.gold)
        calls = [spoiled for call in parsed.calls if (spoiled := self._spoil(rng, call, damage)) is not None]
        if not damage.sound:
            damage.answer = render_like(prompt.gold, parsed, calls)
        self.log.append(damage)
        return damage.answer

    def _spoil(self, rng: random.Random, call: Call, damage: Damage) -> Call | None:
        if rng.random() < self.drop:
            damage.dropped.append(call)
            return None
        name = call.name
        if rng.random() < self.misspell:
            damage.misspelt.append(call)
            name = name + name[-1]
        arguments = dict(call.arguments)
        for key in arguments:
            if rng.random() < self.change:
                damage.changed.append((call.name, key))
                arguments[key] = another_value(arguments[key])
        return Call(name, arguments)


def another_value(value: Any) -> Any:
    """A value that no reasonable comparison takes for this one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1000
    if isinstance(value, list):
        return [*value, "something else"]
    return "something else entirely" if value != "something else entirely" else "none of it"


def render_like(gold: str, parsed: Parsed, calls: Sequence[Call]) -> str:
    """The calls in the form that the gold answer has; without any, what a model says that calls nothing."""
    before = gold[: gold.find("Action:")] if parsed.form == "action" else ""
    if not calls:
        return "[]" if parsed.form != "action" else f"{before}System: I can do nothing about that."
    if parsed.form == "action":
        return before + "\n".join(f"Action: {render_call(c.name, c.arguments)}" for c in calls)
    if parsed.form == "python":
        return f"[{', '.join(render_call(c.name, c.arguments) for c in calls)}]"
    if parsed.form == "json":
        text = json.dumps([{"name": c.name, "arguments": c.arguments} for c in calls], ensure_ascii=False)
        return f"```\n{text}\n```" if "```" in gold else text
    raise ValueError(f"gold answers of the form {parsed.form!r} cannot be damaged")
