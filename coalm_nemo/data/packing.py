"""Whole rows side by side in sequences of fixed length."""

from __future__ import annotations

import numpy as np


def pack_rows(lengths: np.ndarray, capacity: int, multiple: int = 1) -> list[list[int]]:
    """First-fit decreasing: row lengths [N] -> packs, each a list of row indices.

    Every row is in exactly one pack, and a pack's lengths, each rounded up to `multiple` (context parallelism cuts rows
    evenly; to no more than the capacity), add up to at most `capacity`. The same input gives the same packs.
    First-fit decreasing needs at most 11/9 of the fewest possible packs (Johnson 1973).
    """
    lengths = np.asarray(lengths)
    rounded = -(-lengths // multiple) * multiple
    rounded = np.where(lengths <= capacity, np.minimum(rounded, capacity), rounded)  # a row that just fits is a pack
    order = np.argsort(-rounded, kind="stable")
    packs: list[list[int]] = []
    room = _FirstFit(len(order), capacity)
    for index in order.tolist():
        pack = room.place(int(rounded[index]))
        if pack == len(packs):
            packs.append([])
        packs[pack].append(index)
    return packs


class _FirstFit:
    """Finds the first bin with enough room in O(log N): a tree of the largest room below each node."""

    def __init__(self, bins: int, capacity: int) -> None:
        self.leaves = 1 << max(0, bins - 1).bit_length()
        self.capacity = capacity
        self.room = [capacity] * (2 * self.leaves)

    def place(self, size: int) -> int:
        """Take `size` from the first bin that has it; returns the bin."""
        if size > self.capacity:
            raise ValueError(f"a row of {size} positions does not fit into {self.capacity}")
        node = 1
        while node < self.leaves:
            node = 2 * node if self.room[2 * node] >= size else 2 * node + 1
        bin_index = node - self.leaves
        self.room[node] -= size
        while node > 1:
            node //= 2
            self.room[node] = max(self.room[2 * node], self.room[2 * node + 1])
        return bin_index
