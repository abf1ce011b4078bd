"""What a perfect agent does in MultiWOZ: the files have states and words but no calls, so calls are made of state changes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from coalm_nemo.data.sources.cra.literal import Value, render_call
from coalm_nemo.evaluation.dialogue_states.agent import MAX_CALLS
from coalm_nemo.evaluation.multiwoz.reader import Booking, WozTurn
from coalm_nemo.evaluation.multiwoz.slots import DOMAINS, NUMBERS, normalize
from coalm_nemo.evaluation.multiwoz.tools import TAKE_BACK, TOOLS, Tool

_TAXI_PHONE = re.compile(r"\b07\d{9}\b")
"""Cambridge's own numbers begin with 01223."""
First = Mapping[str, str]
"""Slot -> the alternative that is kept to."""


def kept_values(turns: Sequence[WozTurn]) -> list[dict[str, str]]:
    """One value a slot and turn: the one before while it is right still, otherwise the first alternative."""
    kept: dict[str, str] = {}
    states = []
    for turn in turns:
        kept = {
            slot: kept[slot] if kept.get(slot) in values else values[0]
            for slot, values in turn.state.items()
        }  # fmt: skip
        states.append(kept)
    return states


def gold_actions(turn: WozTurn, before: First, after: First) -> tuple[list[str], list[str]]:
    """The calls that bring `before` to `after` and make the turn's bookings, as text; and faults: the counted reasons why
    even a perfect agent cannot do what the file has."""
    actions = [
        text
        for domain in DOMAINS
        for tool in (tool for tool in TOOLS.values() if tool.domain == domain)
        if (text := _action(tool, turn, before, after))
    ]
    beyond = ["gold_beyond_call_limit"] * (len(actions) > MAX_CALLS)
    return actions[:MAX_CALLS], beyond


def _action(tool: Tool, turn: WozTurn, before: First, after: First) -> str:
    """A search when one of its slots changed, a booking when one of its details did or the file's system booked."""
    slots = [slot for slot in tool.arguments if slot in DOMAINS[tool.domain]]
    own = [slot for slot in slots if slot != "name"] if tool.books else slots
    changed = [slot for slot in own if before.get(f"{tool.domain}-{slot}") != after.get(f"{tool.domain}-{slot}")]
    booking = next((b for b in turn.booked if b.domain == tool.domain and tool.books), None)
    if not changed and booking is None:
        return ""
    arguments: dict[str, Value] = {}
    for slot in slots:
        value = after.get(f"{tool.domain}-{slot}", TAKE_BACK if slot in changed else "")
        if value:
            arguments[slot] = typed(slot, value)
    if booking and booking.key and "trainid" in tool.arguments:
        arguments["trainid"] = booking.key
    return render_call(tool.name, arguments)


def typed(slot: str, value: str) -> Value:
    """Counts as bare numbers, as in our rows."""
    number = normalize(slot, value)
    return int(number) if slot in NUMBERS and number.isascii() and number.isdigit() else value


def gold_words(words: str, booked: Sequence[Booking], references: Mapping[str, Sequence[str]]) -> str:
    """The file's response with the reference numbers and the taxi's telephone that the tools gave."""
    for booking in booked:
        given = references.get(booking.domain)
        if given:
            words = words.replace(booking.reference, given[-1])
    return _TAXI_PHONE.sub(references["taxi"][-1], words) if references.get("taxi") else words
