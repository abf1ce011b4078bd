"""A measure over steps, and the few points of it that a picture needs."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

Point = tuple[float, float]


@dataclass
class Series:
    """Values by step, in the order they were written; 16 bytes a value."""

    steps: array[float] = field(default_factory=lambda: array("d"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def add(self, step: float, value: float) -> None:
        """A step written again (the run went back to a checkpoint) replaces what came after it."""
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
            self.values.pop()
        self.steps.append(step)
        self.values.append(value)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def last(self) -> float | None:
        return self.values[-1] if self.values else None

    def recent(self, count: int = 50) -> list[float]:
        """The last finite values."""
        return [v for v in self.values[-count:] if math.isfinite(v)]

    def points(self, buckets: int = 240) -> list[Point]:
        """At most 2 x buckets + 2 points: the lowest and the highest of each stretch of steps, the first and the last."""
        return thin(self.steps, self.values, buckets)

    def mean(self, buckets: int = 60) -> list[Point]:
        """The mean of each stretch of steps, at its middle: the line within the noise. Empty for short series."""
        keep = [i for i in range(len(self)) if math.isfinite(self.values[i])]
        if len(keep) < 3 * buckets:
            return []
        found = []
        for bucket in range(buckets):
            part = keep[len(keep) * bucket // buckets : len(keep) * (bucket + 1) // buckets]
            middle = (self.steps[part[0]] + self.steps[part[-1]]) / 2
            found.append((middle, math.fsum(self.values[i] for i in part) / len(part)))
        return found


def thin(xs: Sequence[float], ys: Sequence[float], buckets: int) -> list[Point]:
    """Points whose line looks like that of all: each bucket's extremes in their order, both ends; finite ones only."""
    keep = [i for i in range(len(xs)) if math.isfinite(ys[i])]
    if len(keep) <= 2 * buckets + 2:
        return [(xs[i], ys[i]) for i in keep]
    chosen = {keep[0], keep[-1]}
    for bucket in range(buckets):
        part = keep[len(keep) * bucket // buckets : len(keep) * (bucket + 1) // buckets]
        chosen |= {min(part, key=ys.__getitem__), max(part, key=ys.__getitem__)}
    return [(xs[i], ys[i]) for i in sorted(chosen)]
