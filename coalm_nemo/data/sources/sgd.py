"""Schema-Guided Dialogue (Rastogi et al. 2020) as published on GitHub: schema.json and dialogues_*.json of a split."""

from __future__ import annotations

from dataclasses import dataclass

from coalm_nemo.data.sources.cra.dialogue import Dialogue
from coalm_nemo.data.sources.cra.source import CraSource
from coalm_nemo.data.sources.cra.turns import Turn, make_turns


@dataclass(frozen=True)
class SgdSource(CraSource):
    """CRA rows from SGD's own calls and results."""

    def today(self) -> str:
        """Every "today" of SGD is annotated as 2019-03-01; without it no date in a call could be known."""
        return "Today is Friday, 2019-03-01."

    def turns(self, dialogue: Dialogue, seed: int) -> list[Turn]:
        return make_turns(dialogue, self.schema, seed)
