"""Two ways to read a model's state: from the arguments of its calls, or from its answer to a separate question."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from coalm_nemo.evaluation.calls import Call
from coalm_nemo.evaluation.dialogue_states.fuzzy import partial_ratio, ratio
from coalm_nemo.evaluation.dialogue_states.scores import Points, State
from coalm_nemo.evaluation.multiwoz.slots import DOMAINS, FREE_FORM, SLOTS, normalize
from coalm_nemo.evaluation.multiwoz.tools import TOOLS, argument_text

FUZZY_PERCENT = 95
SLOT_LIST = "\n".join(
    f"{domain}: {', '.join(f'{domain}-{slot}' for slot in slots)}" for domain, slots in DOMAINS.items()
)


def after_calls(state: State, calls: Iterable[Call]) -> dict[str, str]:
    """`state` with the arguments of calls that were carried out: the latest value of a slot holds, `none` takes it back."""
    after = dict(state)
    for call in calls:
        domain = TOOLS[call.name].domain
        for name, value in call.arguments.items():
            slot = f"{domain}-{name}"
            after[slot] = normalize(slot, argument_text(value))
    return {slot: value for slot, value in after.items() if value and slot in SLOTS}


def from_answer(answer: Mapping[str, Any] | None) -> dict[str, str]:
    """`{"hotel-area": "north"}`, `{"hotel": {"area": "north"}}` or `{"domain": "hotel", "slot_values": {...}}` -> state.

    What names no slot of MultiWOZ is left out.
    """
    if answer is None:
        return {}
    if isinstance(answer.get("slot_values"), dict):
        answer = {str(answer.get("domain", "")): answer["slot_values"]}
    state = {}
    for key, value in answer.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        for name, held in inner:
            slot = (f"{key}-{name}" if name and "-" not in str(name) else str(name) or key).lower().replace(" ", "")
            if slot in SLOTS and not isinstance(held, list | dict):
                state[slot] = normalize(slot, argument_text(held))
    return {slot: value for slot, value in state.items() if value}


def exact(slot: str, value: str, right: tuple[str, ...]) -> float:
    """1 if `value` is one of the right ones once both are normalised."""
    return float(any(normalize(slot, value) == normalize(slot, each) for each in right))


def fuzzy(slot: str, value: str, right: tuple[str, ...]) -> float:
    """1 if equal, or, for names and places, at least 95 % alike."""
    if slot.rpartition("-")[2] not in FREE_FORM:
        return exact(slot, value, right)
    normal = normalize(slot, value)
    alike = any(ratio(normal, normalize(slot, each)) >= FUZZY_PERCENT for each in right)
    return max(float(alike), exact(slot, value, right))


def partial(slot: str, value: str, right: tuple[str, ...]) -> float:
    """1 if more than 95 % alike in part, for every slot: "1" is alike to "15:00". So the paper's authors' published fork of
    the evaluation compares states; it flatters, and is here for comparison with their figures only."""
    normal = normalize(slot, value)
    return float(any(partial_ratio(normal, normalize(slot, each)) > FUZZY_PERCENT for each in right))


WAYS: dict[str, Points] = {"jga": exact, "jga_fuzzy": fuzzy, "jga_partial": partial}
