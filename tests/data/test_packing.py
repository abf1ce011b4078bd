"""Whole rows side by side: each once, none too many, few packs."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coalm_nemo.data.packing import pack_rows

LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=120)


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(64, 200), st.sampled_from([1, 2, 4, 8]))
def test_each_row_once_and_no_pack_too_full(lengths: list[int], capacity: int, multiple: int) -> None:
    packs = pack_rows(np.array(lengths), capacity, multiple)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    rounded = [-(-n // multiple) * multiple for n in lengths]
    assert all(sum(rounded[i] for i in pack) <= capacity for pack in packs)
    assert packs == pack_rows(np.array(lengths), capacity, multiple)


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 60), st.integers(1, 25), st.randoms(use_true_random=False))
def test_few_packs(capacity: int, fewest: int, draw: random.Random) -> None:
    """Full packs, cut into rows: the fewest are known. First-fit decreasing takes 11/9 of them + 6/9 (Dosa 2007)."""
    lengths: list[int] = []
    for _ in range(fewest):
        cuts = sorted(draw.sample(range(1, capacity), draw.randint(0, min(6, capacity - 1))))
        lengths += [b - a for a, b in zip([0, *cuts], [*cuts, capacity], strict=True)]
    draw.shuffle(lengths)
    assert fewest <= len(pack_rows(np.array(lengths), capacity)) <= 11 / 9 * fewest + 6 / 9


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(64, 200))
def test_the_tree_packs_as_the_plain_search_does(lengths: list[int], capacity: int) -> None:
    """First-fit decreasing in O(N^2), as one would write it down."""
    room: list[int] = []
    packs: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = next((b for b, left in enumerate(room) if left >= lengths[index]), len(room))
        if at == len(room):
            room.append(capacity)
            packs.append([])
        room[at] -= lengths[index]
        packs[at].append(index)
    assert pack_rows(np.array(lengths), capacity) == packs


def test_long_rows_first() -> None:
    assert pack_rows(np.array([3, 10, 4, 7]), 10) == [[1], [3, 0], [2]]


def test_a_row_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="a row of 11 positions does not fit into 10"):
        pack_rows(np.array([11]), 10)


def test_a_row_that_fits_only_without_rounding_is_a_pack_of_its_own() -> None:
    assert pack_rows(np.array([9, 1]), 10, multiple=4) == [[0], [1]]


def test_nothing() -> None:
    assert pack_rows(np.array([], dtype=np.int64), 10) == []
