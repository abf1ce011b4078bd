"""MultiWOZ 2.2 (Zang et al. 2020) as published on GitHub: schema.json and dialogues_*.json of a split, databases beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from coalm_nemo.data.sources.cra.derived import candidates, with_calls, without_booking
from coalm_nemo.data.sources.cra.dialogue import Dialogue
from coalm_nemo.data.sources.cra.schema import Schema
from coalm_nemo.data.sources.cra.source import CraSource
from coalm_nemo.data.sources.cra.turns import Turn, make_turns


@dataclass(frozen=True)
class MultiwozSource(CraSource):
    """CRA rows with calls derived from changes of the state, and results looked up in the domain's database."""

    optional_slots: bool = True
    """None of MultiWOZ's slots is required, so a list of required ones would show none."""
    database: str = ""
    """Directory of hotel_db.json, restaurant_db.json and so on; a call in a domain without one is dropped."""

    def schema_names(self) -> tuple[str, ...]:
        return ("schema.json", "schema_2.2.json")

    def rename(self, slot: str) -> str:
        """`hotel-pricerange` -> `pricerange`: the function already says the domain."""
        return slot.partition("-")[2] or slot

    @cached_property
    def schema(self) -> Schema:
        return without_booking(super().schema)

    def turns(self, dialogue: Dialogue, seed: int) -> list[Turn]:
        like_sgd, left_out = with_calls(dialogue, self.schema, self.database)
        return [replace(turn, left_out=left_out[turn.number]) for turn in make_turns(like_sgd, self.schema, seed)]

    def calls(self, dialogues: Sequence[Dialogue]) -> int:
        """Calls derived, whether or not a result exists for them."""
        return sum(self._calls(dialogue) for dialogue in dialogues)

    def _calls(self, dialogue: Dialogue) -> int:
        number = 0
        states: dict[str, Mapping[str, list[str]]] = {}
        for turn in dialogue.turns[: len(dialogue.turns) // 2 * 2 : 2]:
            number += len(candidates(turn.frames, states, self.schema))
            states |= {frame.service: frame.state or {} for frame in turn.frames}
        return number
