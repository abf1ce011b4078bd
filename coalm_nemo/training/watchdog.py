"""A hang becomes an exit: no step for much longer than steps take, and every rank prints where it stands and ends.

A collective that one rank never reaches holds all others without a word. Each rank watches itself, so no rank has to
be asked; the ranks stand in the same step and end within moments of one another.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_HUNG = 5
"""No step for too long: the stack traces are in the ranks' logs; the same command goes on."""

REMEMBERED_STEPS = 50
LAST_RESORT_S = 60.0
"""How much later the C library's own timer ends a process whose interpreter lock is held by what hangs."""


class Watchdog:
    """Watches inside `with`. `factor` 0: never fires."""

    def __init__(
        self, rank: int, *, factor: float, floor_s: float, slow_s: float, end: Callable[[int], object] = os._exit
    ) -> None:
        self.rank = rank
        self.factor = factor
        self.floor_s = floor_s
        self.slow_s = slow_s
        self.end = end
        self.step = 0
        self._seconds: deque[float] = deque(maxlen=REMEMBERED_STEPS)
        self._closed = threading.Event()
        self._watching = False
        self._arm(slow_s)

    def __enter__(self) -> Watchdog:
        if self.factor:
            self._watching = True
            self._arm(self.slow_s)  # the first step compiles, connects, warms up
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self.factor:
            faulthandler.cancel_dump_traceback_later()

    def beat(self, step: int, seconds: float) -> None:
        """A step is done; it took `seconds`."""
        self.step = step
        self._seconds.append(seconds)
        self._arm(self.limit_s())

    def limit_s(self) -> float:
        """Longest time for a step: a multiple of the median, and not below the floor."""
        if not self._seconds:
            return self.slow_s
        return max(self.floor_s, self.factor * statistics.median(self._seconds))

    def step_seconds(self) -> list[float]:
        """Of the last steps."""
        return list(self._seconds)

    @contextmanager
    def slowly(self) -> Iterator[None]:
        """For what is no step: a validation, a save."""
        self._arm(self.slow_s)
        try:
            yield
        finally:
            self._arm(self.limit_s())

    def _arm(self, limit_s: float) -> None:
        self._armed = (time.monotonic(), limit_s)  # one assignment: the other thread never sees half of it
        if self._watching and not self._closed.is_set():
            faulthandler.dump_traceback_later(limit_s + LAST_RESORT_S, exit=True, file=sys.__stderr__ or 2)

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self.floor_s / 10)):
            since, limit_s = self._armed
            if time.monotonic() - since > limit_s:
                self._fire(limit_s)
                return

    def _fire(self, limit_s: float) -> None:
        usual = f"{statistics.median(self._seconds):.2f} s" if self._seconds else "unknown"
        print(
            f"watchdog: rank {self.rank} on {socket.gethostname()} has waited {limit_s:.0f} s in step {self.step + 1} "
            f"(a step takes {usual}); where its threads stand:",
            file=sys.__stderr__,
            flush=True,
        )
        faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
        self.end(EXIT_HUNG)
