"""The next step's micro-batches, made by a thread while this step trains."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from coalm_nemo.data.batch import MicroBatch
from coalm_nemo.training.feed import Feed, GlobalBatch


@dataclass(frozen=True)
class Prepared:
    """A step's data."""

    batch: GlobalBatch
    micro_batches: list[MicroBatch]
    made_s: float
    """Seconds that the making took, on whichever thread."""
    waited_s: float
    """Seconds that the training waited for it."""


class Prefetcher:
    """Steps in order from `position` on, as many as `steps`; the batches are those that `feed` gives when asked directly.

    Nothing is kept but the position, so a run that stops and goes on starts here again. What goes wrong in the making
    is raised by `next`, at the step that it belongs to.
    """

    def __init__(self, feed: Feed, device: torch.device, position: int, end: int | None, steps: int) -> None:
        self.feed, self.device, self.end = feed, device, end
        self.position, self.left = position, steps
        self.ahead = feed.run.speed.prefetch_steps
        self.waiting: deque[Future[Prepared]] = deque()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch") if self.ahead else None

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        if self.thread is not None:
            self.thread.shutdown(cancel_futures=True)

    def next(self) -> Prepared:
        """The next step's data, on the device. Raises StopIteration after the last step."""
        started = time.monotonic()
        if self.thread is None:
            made = self._make(self._advance())
        else:
            self._fill()  # only before the first step is nothing under way
            if not self.waiting:
                raise StopIteration
            made = self.waiting.popleft().result()
            self._fill()
        moved = [micro.to(self.device) for micro in made.micro_batches]
        return Prepared(made.batch, moved, made.made_s, time.monotonic() - started)

    def _fill(self) -> None:
        assert self.thread is not None
        while len(self.waiting) < self.ahead and self.left:
            self.waiting.append(self.thread.submit(self._make, self._advance()))

    def _advance(self) -> int:
        """Position of the next step that is not begun yet."""
        if not self.left:
            raise StopIteration
        position, self.left = self.position, self.left - 1
        self.position += self.feed.run.batch.global_size
        return position

    def _make(self, position: int) -> Prepared:
        """On the CPU: the thread touches no CUDA stream and no random state."""
        started = time.monotonic()
        batch = self.feed.global_batch(position, self.end)
        micro_batches = self.feed.micro_batches(batch, torch.device("cpu"))
        if self.device.type == "cuda":
            micro_batches = [micro.pinned() for micro in micro_batches]
        return Prepared(batch, micro_batches, time.monotonic() - started, 0.0)
