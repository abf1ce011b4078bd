"""A rank that waits too long says where, and ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

from coalm_nemo.training.watchdog import EXIT_HUNG, Watchdog

HANGS = """
import time
from coalm_nemo.training.watchdog import Watchdog
def here_it_hangs():
    time.sleep(60)
with Watchdog(3, factor=2, floor_s=0.3, slow_s=60) as dog:
    for step in range(5):
        dog.beat(step + 1, 0.01)
    {then}
"""


def run(then: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", HANGS.format(then=then)], capture_output=True, text=True, timeout=50)


def test_a_hang_ends_with_a_stack() -> None:
    done = run("here_it_hangs()")
    assert done.returncode == EXIT_HUNG
    assert "watchdog: rank 3 on " in done.stderr and "in step 6 (a step takes 0.01 s)" in done.stderr
    assert "in here_it_hangs" in done.stderr


def test_what_may_take_long_is_waited_for() -> None:
    done = run("\n    with dog.slowly():\n        time.sleep(1.2)")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("seconds", "limit"), [([], 60.0), ([1.0], 10.0), ([4.0, 4.0, 400.0], 80.0)], ids=["none", "floor", "median"]
)
def test_the_limit_is_a_multiple_of_the_median(seconds: list[float], limit: float) -> None:
    dog = Watchdog(0, factor=20 if len(seconds) > 1 else 2, floor_s=10, slow_s=60)
    dog._seconds.extend(seconds)
    assert dog.limit_s() == limit
