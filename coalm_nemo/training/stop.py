"""Ctrl-C, SIGTERM and SIGUSR1 ask for a stop: the next step saves a checkpoint and the run ends."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopFlag:
    """Installed as a context; `asked` turns true on the first signal. The old handlers come back at the end."""

    def __init__(self) -> None:
        self.asked = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopFlag:
        for number in STOP_SIGNALS:
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


STOP_SECONDS_FILE = "stop_seconds"
REMEMBERED = 5


def write_stop_seconds(run_dir: Path, step_seconds: Sequence[float], save_seconds: Sequence[float]) -> None:
    """Leave in `run_dir` how long a stop takes by what was measured: the rest of a step, and a save; thrice, for bad days.

    The job script asks for the stop that long before its time is up. A full disk is no reason to end a run.
    """
    if not save_seconds:
        return
    needed = max(step_seconds[-REMEMBERED:], default=0.0) + max(save_seconds[-REMEMBERED:])
    aside = run_dir / f".{STOP_SECONDS_FILE}"
    try:
        aside.write_text(f"{math.ceil(3 * needed)}\n")
        os.replace(aside, run_dir / STOP_SECONDS_FILE)
    except OSError:
        return
