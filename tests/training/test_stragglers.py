"""Who holds up the others is named, once, when it is no chance."""

from __future__ import annotations

import torch

from coalm_nemo.training.stragglers import IN_A_ROW, Stragglers


def watcher() -> Stragglers:
    found = Stragglers(torch.device("cpu"), 10, 1.5)
    found.places = ["node1, GPU 0", "node1, GPU 1", "node2, GPU 0", "node2, GPU 1"]
    return found


SLOW = [(0.020, 0.021, 0.060, 0.020), (0.001, 0.001, 0.001, 0.001)]
EVEN = [(0.020, 0.021, 0.022, 0.020), (0.001, 0.001, 0.004, 0.001)]


def test_a_persistent_outlier_is_named_once() -> None:
    found = watcher()
    told = [sentence for gathering in range(6) for sentence in found.judge(10 * gathering, SLOW)]
    assert len(told) == 1
    assert told[0].startswith("rank 2 (node2, GPU 0) calculates 2.9 times slower than the median rank")


def test_chance_is_not_named() -> None:
    found = watcher()
    for gathering in range(9):
        assert found.judge(gathering, EVEN if gathering % IN_A_ROW == IN_A_ROW - 1 else SLOW) == []


def test_slow_batches_are_told_apart() -> None:
    found = watcher()
    slow = [EVEN[0], (0.001, 0.9, 0.001, 0.001)]
    told = [sentence for gathering in range(IN_A_ROW) for sentence in found.judge(gathering, slow)]
    assert len(told) == 1 and told[0].startswith("rank 1 (node1, GPU 1) makes its batches")


def test_a_rank_times_its_own_work() -> None:
    assert 0 < watcher().own_seconds() < 10
    assert Stragglers(torch.device("cpu"), 0, 1.5).after_step(10, 0.1) == []
