"""SGD's values: a state holds every form that was said, a call the service's own form; either is right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coalm_nemo.data.sources.cra.dialogue import Dialogue
from coalm_nemo.data.sources.cra.schema import Schema
from coalm_nemo.evaluation.dialogue_states.fuzzy import token_sort_ratio
from coalm_nemo.evaluation.dialogue_states.scores import GoldState, Points

FUZZY_PERCENT = 95


def normalize(value: str) -> str:
    """Lower case, one space between words, no full stop or comma at either end. Idempotent."""
    for _ in range(len(value) + 2):
        once = " ".join(value.casefold().replace("\u2019", "'").split()).strip(" .,")
        if once == value:
            break
        value = once
    return value


def argument_text(value: Any) -> str:
    """A call's argument as the files write it: True is "True", 2.0 is "2"."""
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else str(value)


def said_as(dialogue: Dialogue) -> dict[tuple[str, str, str], tuple[str, ...]]:
    """(service, slot, form that was said) -> the service's own forms of it, over all acts of a dialogue."""
    found: dict[tuple[str, str, str], dict[str, None]] = {}
    for turn in dialogue.turns:
        for frame in turn.frames:
            for act in frame.acts:
                for surface, value in zip(act.values, act.canonical, strict=True):
                    found.setdefault((frame.service, act.slot, normalize(surface)), {})[value] = None
    return {key: tuple(values) for key, values in found.items()}


def right_values(
    service: str, state: Mapping[str, list[str]], forms: Mapping[tuple[str, str, str], tuple[str, ...]]
) -> GoldState:
    """`Service_1-slot` -> every form that is right. Slots without a value are absent."""
    right = {}
    for slot, surfaces in state.items():
        own = [value for surface in surfaces for value in forms.get((service, slot, normalize(surface)), ())]
        if surfaces:
            right[f"{service}-{slot}"] = tuple(dict.fromkeys([*surfaces, *own]))
    return right


def exact(slot: str, value: str, right: tuple[str, ...]) -> float:
    """1 if `value` is one of the right ones but for case and spacing."""
    return float(any(normalize(value) == normalize(each) for each in right))


def ways(schema: Schema) -> dict[str, Points]:
    """The comparisons: exact; free-form slots from 95 % alike on; and SGD's own, where they score how alike they are."""

    def likeness(slot: str, value: str, right: tuple[str, ...]) -> float:
        service, _, name = slot.partition("-")
        if schema.slots[service][name].categorical:
            return exact(slot, value, right)
        best = max((token_sort_ratio(normalize(value), normalize(each)) for each in right), default=0) / 100
        return max(best, exact(slot, value, right))

    def fuzzy(slot: str, value: str, right: tuple[str, ...]) -> float:
        return float(likeness(slot, value, right) >= FUZZY_PERCENT / 100)

    return {"jga": exact, "jga_fuzzy": fuzzy, "jga_official": likeness}
