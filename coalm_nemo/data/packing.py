"""Whole rows side by side in sequences of fixed length.

The work is done on the histogram of lengths, so that it costs little more than the number of packs. Best-fit decreasing
comes first. Where it leaves more packs than the tokens fill, packs that are full to the last position are made instead,
for as long as the stock of lengths yields them, and best-fit takes what is left (in the way of Gupta and Ho's minimum bin
slack, 1999). The better of the two stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_THIRDS = 16
"""Third-last lengths tried before a pack is given up: more of them gain nothing on the sets in benchmarks/."""

_WORK = 2_000_000_000
"""Histogram cells that the search for full packs may look at: about two seconds. Sets of chat rows need a tenth."""

_CELLS_A_LOOK = 3_000
"""What calling numpy costs, in cells."""


@dataclass(frozen=True)
class Packs:
    """Every row in exactly one pack: pack i holds rows[offsets[i] : offsets[i + 1]]."""

    offsets: np.ndarray
    """int64 [packs + 1]"""
    rows: np.ndarray
    """int64 [rows]: row indices"""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def pack(self, index: int) -> list[int]:
        """The rows of one pack."""
        return self.rows[self.offsets[index] : self.offsets[index + 1]].tolist()


def pack_rows(lengths: np.ndarray, capacity: int, multiple: int = 1, seed: int = 0) -> list[list[int]]:
    """`pack_rows_flat` as lists of row indices."""
    packs = pack_rows_flat(lengths, capacity, multiple, seed)
    return [packs.pack(i) for i in range(len(packs))]


def pack_rows_flat(lengths: np.ndarray, capacity: int, multiple: int = 1, seed: int = 0) -> Packs:
    """Row lengths [N] -> packs. Raises ValueError for a row longer than the capacity.

    A pack's lengths, each rounded up to `multiple` (context parallelism cuts rows evenly; to no more than the capacity),
    add up to at most `capacity`. The same input gives the same packs. `seed` decides which of the rows of one length go
    where, so that a pack is not made of neighbours in the file.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.max(initial=0) > capacity:
        raise ValueError(f"a row of {lengths.max()} positions does not fit into {capacity}")
    room = max(1, capacity // multiple)  # in units of `multiple`, as the sizes
    sizes = np.clip(-(-lengths // multiple), 1, room)
    order = np.lexsort((np.random.PCG64(seed).random_raw(len(sizes)), -sizes))
    bins = _pack_sizes(np.bincount(sizes, minlength=room + 1))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(bins))]).astype(np.int64)
    return Packs(offsets, order[np.argsort(bins, kind="stable")])


def _pack_sizes(counts: np.ndarray) -> np.ndarray:
    """Histogram [capacity + 1] -> the pack of each item, int64 [items], items in decreasing order of size."""
    sizes = np.arange(len(counts))
    fewest = -(-int(counts @ sizes) // (len(counts) - 1))
    bins = _best_fit(counts)
    if bins.max(initial=-1) + 1 == fewest:
        return bins
    full, rest = _full_packs(counts)
    other = np.concatenate([np.repeat(np.arange(len(full)), [len(p) for p in full]), len(full) + _best_fit(rest)])
    if other.max() >= bins.max():
        return bins
    item_sizes = np.concatenate([*full, np.repeat(sizes, rest)[::-1]])
    return other[np.argsort(-item_sizes, kind="stable")].astype(np.int64)


def _best_fit(counts: np.ndarray) -> np.ndarray:
    """Best-fit decreasing: each item, largest first, goes where it leaves the least room. The result as `_pack_sizes`."""
    bins = _OpenBins(len(counts) - 1)
    placed = [np.empty(0, dtype=np.int64)]
    for size in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[size])
        while left:
            room = bins.tightest(size, left)
            each = min(left, room // size)
            filled = bins.fill(room, left // each, each * size)
            placed.append(np.repeat(np.array(filled, dtype=np.int64), each))
            left -= each * len(filled)
    return np.concatenate(placed)


class _OpenBins:
    """Bins by the room they have left. A bit map of the rooms that occur finds the tightest in one shift."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.by_room: dict[int, list[int]] = {}
        self.bit_map = 0
        self.count = 0

    def tightest(self, size: int, items: int) -> int:
        """The least room that takes `size`; where there is none, bins for `items` of them are opened."""
        fitting = self.bit_map >> size
        if fitting:
            return size + (fitting & -fitting).bit_length() - 1
        more = -(-items // (self.capacity // size))
        self._put(self.capacity, list(range(self.count, self.count + more)))
        self.count += more
        return self.capacity

    def fill(self, room: int, most: int, size: int) -> list[int]:
        """Take `size` from up to `most` of the bins with this room; returns them."""
        group = self.by_room[room]
        filled = group[-most:]
        del group[-most:]
        if not group:
            del self.by_room[room]
            self.bit_map ^= 1 << room
        if room > size:
            self._put(room - size, filled)
        return filled

    def _put(self, room: int, bins: list[int]) -> None:
        self.by_room.setdefault(room, []).extend(bins)
        self.bit_map |= 1 << room


def _full_packs(counts: np.ndarray) -> tuple[list[list[int]], np.ndarray]:
    """(packs that are full to the last position, as sizes; histogram of what they left over).

    Each pack starts with the largest size in stock, which has the fewest partners. A size whose search fails is left
    over with all its items: the stock only shrinks, so a second search would hardly fare better.
    """
    stock = _Stock(counts)
    packs: list[list[int]] = []
    rest = np.zeros_like(counts)
    while stock.items and stock.work < _WORK:
        pack = _full_pack(stock, len(counts) - 1)
        if pack:
            packs.append(pack)
        else:
            size = stock.largest(len(counts) - 1)
            rest[size] = stock.counts[size]
            stock.change(size, -int(rest[size]))
    return packs, rest + stock.counts


def _full_pack(stock: _Stock, capacity: int) -> list[int] | None:
    """Takes one full pack from the stock; None, and the stock as it was, where none is found.

    Large sizes are placed first, down to a room that three average ones fill; for the last three there are so many
    combinations that some exact one is in stock until little else is.
    """
    first = stock.largest(capacity)
    pack, room = [first], capacity - first
    stock.change(first, -1)
    while room > min(4 * stock.mean(), 3 * first):
        size = stock.largest(min(pack[-1], max(int(room - 3 * stock.mean()), room // 4)))
        if not size:
            break
        stock.change(size, -1)
        pack.append(size)
        room -= size
    ending = _ending(stock, room, pack[-1])
    for size in pack if ending is None else []:
        stock.change(size, 1)
    for size in ending or []:
        stock.change(size, -1)
    return None if ending is None else pack + ending


def _ending(stock: _Stock, room: int, at_most: int) -> list[int] | None:
    """Up to three sizes in stock that add up to `room`."""
    ending = stock.one_or_two(room)
    third = at_most + 1
    for _ in range(_THIRDS):
        third = stock.largest(min(third, room) - 1) if ending is None else 0
        if not third:
            break
        stock.change(third, -1)
        two = stock.one_or_two(room - third)
        stock.change(third, 1)
        ending = None if two is None else [third, *two]
    return ending


class _Stock:
    """How many items of each size are left, and what adds up to what."""

    def __init__(self, counts: np.ndarray) -> None:
        self.counts = counts.astype(np.int64)
        self.items = int(counts.sum())
        self.total = int(counts @ np.arange(len(counts)))
        self.work = 0
        present = np.packbits(counts > 0, bitorder="little")
        self.bit_map = int.from_bytes(present.tobytes(), "little")

    def change(self, size: int, by: int) -> None:
        """Put items back, or take them."""
        before = int(self.counts[size])
        self.counts[size] = before + by
        self.items += by
        self.total += by * size
        if (before == 0) != (before + by == 0):
            self.bit_map ^= 1 << size

    def mean(self) -> float:
        return self.total / max(1, self.items)

    def largest(self, at_most: int) -> int:
        """The largest size in stock up to `at_most`, 0 if none."""
        return max(0, (self.bit_map & ((2 << max(0, at_most)) - 1)).bit_length() - 1)

    def one_or_two(self, room: int) -> list[int] | None:
        """One size that is `room`, or the two that add up to it and of which most are left; [] for no room."""
        if room == 0 or self.counts[room]:
            return [room] if room else []
        low, half = max(1, room - self.bit_map.bit_length() + 1), room // 2
        if low > half:
            return None
        self.work += half - low + _CELLS_A_LOOK
        partners = self.counts[room - half : room - low + 1][::-1]
        pairs = np.minimum(self.counts[low : half + 1], partners)
        if 2 * half == room:
            pairs[-1] //= 2
        best = int(pairs.argmax())
        return [low + best, room - low - best] if pairs[best] else None
