"""Python's garbage collector, at a step of its own choosing, holds up one rank and with it all others: here all collect at
the same step."""

from __future__ import annotations

import gc


class CollectTogether:
    """Inside `with` nothing is collected but at every `interval_steps`th step; 0: Python decides, as always."""

    def __init__(self, interval_steps: int) -> None:
        self.interval_steps = interval_steps

    def __enter__(self) -> CollectTogether:
        if self.interval_steps:
            gc.collect()
            gc.freeze()  # modules, model, data set: they stay, and need not be looked through again
            gc.disable()
        return self

    def __exit__(self, *_: object) -> None:
        if self.interval_steps:
            gc.enable()
            gc.unfreeze()

    def after_step(self, step: int) -> None:
        """`step` counts from the run's beginning, so that it is the same on every rank and after a resume."""
        if self.interval_steps and step % self.interval_steps == 0:
            gc.collect()
