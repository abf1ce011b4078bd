"""Names the rank that holds up all others.

In step time every rank is alike, for each waits for the slowest. What is a rank's own is timed apart: the making of its
micro-batches, and a small fixed calculation on its device.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

IN_A_ROW = 3
"""Gatherings in which a rank must be slow before it is named: once may be chance."""

ROUNDS = 5
LEAST_S = 0.005
"""What a rank may take longer than the median without being slow, however short the work is."""
WHAT = ("calculates", "makes its batches")


@dataclass
class Stragglers:
    """`ratio`: how many times the median is slow. `interval_steps` 0: never looks."""

    device: torch.device
    interval_steps: int
    ratio: float

    def __post_init__(self) -> None:
        size = {"cuda": 4096}.get(self.device.type, 256)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.matrix = torch.zeros(size, size, device=self.device, dtype=dtype) if self.interval_steps else None
        self.prepare_s: list[float] = []
        self.slow: dict[tuple[int, str], int] = {}
        self.places: list[str] = []

    def after_step(self, step: int, prepare_s: float) -> list[str]:
        """Sentences about ranks that have become slow; the same on every rank. All ranks call it at the same step."""
        if not self.interval_steps:
            return []
        self.prepare_s.append(prepare_s)
        if step % self.interval_steps:
            return []
        mine = (place(), self.own_seconds(), statistics.median(self.prepare_s))
        self.prepare_s.clear()
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, mine)
        self.places = [who for who, _, _ in everyone]
        return self.judge(step, list(zip(*(seconds for _, *seconds in everyone), strict=True)))

    def own_seconds(self) -> float:
        """The best of a few rounds of a product: what this device can do now."""
        assert self.matrix is not None
        best = float("inf")
        for _ in range(ROUNDS):
            self._synchronize()
            started = time.perf_counter()
            for _ in range(4):
                torch.mm(self.matrix, self.matrix)
            self._synchronize()
            best = min(best, time.perf_counter() - started)
        return best

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def judge(self, step: int, measured: list[tuple[float, ...]]) -> list[str]:
        """`measured`: seconds of every rank, for each of WHAT. Raises nothing; counts who is slow in a row."""
        told = []
        for what, seconds in zip(WHAT, measured, strict=True):
            usual = statistics.median(seconds)
            for rank, own in enumerate(seconds):
                slow = own > max(self.ratio * usual, usual + LEAST_S)
                count = self.slow[rank, what] = self.slow.get((rank, what), 0) + 1 if slow else 0
                if count == IN_A_ROW:
                    told.append(
                        f"rank {rank} ({self.places[rank]}) {what} {own / max(usual, 1e-9):.1f} times slower than the median "
                        f"rank, {own * 1e3:.1f} ms against {usual * 1e3:.1f} ms, {IN_A_ROW} times in a row up to step {step}"
                    )
        return told


def place() -> str:
    """`node3, GPU 1`: where this rank runs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    local = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    gpu = f", GPU {visible[local % len(visible)]}" if visible != [""] else f", local rank {local}"
    return socket.gethostname() + gpu
