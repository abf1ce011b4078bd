"""The order of training is a pure function of (seed, position)."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from coalm_nemo.data.sampler import NO_ITEM, epoch_order, items_at, rank_items

SIZES = st.integers(1, 40)
SEEDS = st.integers(0, 2**31)


@settings(max_examples=100, deadline=None)
@given(SIZES, SEEDS, st.integers(0, 5), st.booleans())
def test_each_epoch_is_a_permutation(size: int, seed: int, epoch: int, shuffle: bool) -> None:
    items = items_at(epoch * size, size, size=size, seed=seed, shuffle=shuffle)
    assert sorted(items.tolist()) == list(range(size))
    assert shuffle or items.tolist() == list(range(size))


@settings(max_examples=100, deadline=None)
@given(SIZES, SEEDS, st.lists(st.integers(1, 17), min_size=1, max_size=12), st.integers(0, 100))
def test_any_cut_gives_the_same_stream(size: int, seed: int, counts: list[int], start: int) -> None:
    """Whatever the batch sizes and wherever the run stopped in between."""
    whole = items_at(start, sum(counts), size=size, seed=seed)
    pieces, at = [], start
    for count in counts:
        epoch_order.cache_clear()  # a resumed process remembers nothing
        pieces.append(items_at(at, count, size=size, seed=seed))
        at += count
    assert np.concatenate(pieces).tolist() == whole.tolist()


@settings(max_examples=50, deadline=None)
@given(SIZES, SEEDS, st.integers(0, 90), st.integers(1, 20))
def test_nothing_comes_after_the_end(size: int, seed: int, end: int, count: int) -> None:
    start = max(0, end - count // 2)
    items = items_at(start, count, size=size, seed=seed, end=end)
    kept = max(0, min(count, end - start))
    assert (items[kept:] == NO_ITEM).all()
    assert items[:kept].tolist() == items_at(start, count, size=size, seed=seed)[:kept].tolist()


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_ranks_share_the_batch(micro_size: int, data_size: int, micro_batches: int) -> None:
    batch = np.arange(micro_size * data_size * micro_batches)
    shares = [rank_items(batch, micro_size=micro_size, data_rank=r, data_size=data_size) for r in range(data_size)]
    assert all(share.shape == (micro_batches, micro_size) for share in shares)
    assert sorted(np.concatenate(shares, axis=None).tolist()) == batch.tolist()
    # Micro-batch m of all ranks together is the same part of the batch, however it is dealt.
    for m in range(micro_batches):
        together = sorted(i for share in shares for i in share[m].tolist())
        assert together == batch.reshape(micro_batches, -1)[m].tolist()


def test_seeds_and_epochs_differ() -> None:
    orders = {tuple(epoch_order(30, seed, epoch).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_the_order_is_the_one_it_always_was() -> None:
    """A change here would make a resumed run train on other rows than it should."""
    assert items_at(0, 8, size=8, seed=42).tolist() == [3, 4, 2, 7, 6, 1, 5, 0]
