"""Which items a step trains on: a pure function of (seed, position), so a resumed run needs no sampler state.

Positions count items since the start of the run. Epoch e holds the positions [e*N, (e+1)*N), in an order drawn from
(seed, e): every item comes exactly once an epoch, and a batch may straddle two epochs.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

NO_ITEM = -1
"""Fills the last batch of a run that is measured in epochs: nothing is trained twice to make the batch even."""


def items_at(
    start: int, count: int, *, size: int, seed: int, shuffle: bool = True, end: int | None = None
) -> np.ndarray:
    """Items [count] at positions start..start+count of a set of `size`; NO_ITEM from position `end` on."""
    positions = np.arange(start, start + count, dtype=np.int64)
    items = np.empty(count, dtype=np.int64)
    epochs = positions // size
    for epoch in np.unique(epochs):
        here = epochs == epoch
        items[here] = epoch_order(size, seed, int(epoch), shuffle)[positions[here] % size]
    if end is not None:
        items[positions >= end] = NO_ITEM
    return items


@lru_cache(maxsize=4)
def epoch_order(size: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """The order of one epoch, int64 [size]."""
    if not shuffle:
        return np.arange(size, dtype=np.int64)
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(size)


def rank_items(items: np.ndarray, *, micro_size: int, data_rank: int, data_size: int) -> np.ndarray:
    """A global batch [G] -> this data-parallel rank's share [micro-batches, micro_size].

    Micro-batch m is dealt over the ranks before micro-batch m+1, so splits of the same batch hold the same items.
    """
    return items.reshape(-1, data_size, micro_size)[:, data_rank]
