"""Joint goal accuracy and slot accuracy: a turn's predicted state against its gold one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

State = Mapping[str, str]
"""Slot such as `hotel-area` -> one value; a slot without a value is absent."""
GoldState = Mapping[str, tuple[str, ...]]
"""Slot -> the values that are all right."""
Points = Callable[[str, str, tuple[str, ...]], float]
"""(slot, predicted value, right values) -> 0 to 1."""


@dataclass
class Counts:
    """Metric -> (points, out of), as a Verdict has it."""

    sums: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, metric: str, points: float, out_of: float = 1.0) -> None:
        had, of = self.sums.get(metric, (0.0, 0.0))
        self.sums[metric] = (had + points, of + out_of)


def slot_points(gold: GoldState, predicted: State, points: Points) -> dict[str, float]:
    """For every slot of either state: 0 where only one of them has it."""
    return {
        slot: points(slot, predicted[slot], gold[slot]) if slot in predicted and slot in gold else 0.0
        for slot in sorted({*gold, *predicted})
    }


def joint(points: Mapping[str, float]) -> float:
    """The product: 1 where every slot is right (and where there is none)."""
    product = 1.0
    for value in points.values():
        product *= value
    return product


def count_turn(
    counts: Counts, gold: GoldState, predicted: State, ways: Mapping[str, Points], slots: Collection[str]
) -> list[str]:
    """Adds one turn. The first of `ways` (metric -> how values are compared) is the exact one, which also gives the figures
    by domain and slot. `slots` are all that a turn may fill; `slot_accuracy` counts those that are rightly empty too,
    `slot_accuracy_filled` does not. Returns faults, one a wrong slot."""
    first, *others = ways
    exact = slot_points(gold, predicted, ways[first])
    counts.add(first, joint(exact))
    for metric in others:
        counts.add(metric, joint(slot_points(gold, predicted, ways[metric])))
    counts.add("slot_accuracy", len(slots) - len(exact) + sum(exact.values()), len(slots))
    counts.add("slot_accuracy_filled", sum(exact.values()), len(exact))
    for domain in sorted({slot.partition("-")[0] for slot in exact}):
        of_domain = {slot: value for slot, value in exact.items() if slot.startswith(f"{domain}-")}
        counts.add(f"{first}/{domain}", joint(of_domain))
    for slot, value in exact.items():
        counts.add(f"slot/{slot}", value)
    return [_fault(slot, gold, predicted) for slot, value in exact.items() if value < 1]


def _fault(slot: str, gold: GoldState, predicted: State) -> str:
    return "slot_missing" if slot not in predicted else "slot_not_in_gold" if slot not in gold else "slot_wrong_value"
