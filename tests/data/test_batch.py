"""Token rows laid into sequences: labels, mask, edges, and what context parallelism cuts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coalm_nemo.data.batch import MicroBatch, Shape, build_micro_batch
from coalm_nemo.data.sampler import NO_ITEM
from coalm_nemo.data.tokens import TokenRows
from coalm_nemo.models.context_parallel import row_bounds, zigzag_order

CPU = torch.device("cpu")


def token_rows(*rows: list[int], masks: list[list[int]] | None = None) -> TokenRows:
    flat = np.array([t for row in rows for t in row], dtype=np.int32)
    mask = np.array([m for row in masks or [[1] * len(r) for r in rows] for m in row], dtype=np.uint8)
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return TokenRows(flat, mask, offsets, [f"r{i}" for i in range(len(rows))], "f")


def test_a_row_each() -> None:
    rows = token_rows([10, 11, 12], [20, 21, 22, 23, 24], masks=[[1, 0, 1], [0, 0, 1, 1, 0]])
    batch = build_micro_batch(rows, [[0], [1]], 6, Shape(8, packed=False), CPU)
    assert batch.tokens.tolist() == [[10, 11, 0, 0, 0, 0], [20, 21, 22, 23, 0, 0]]
    assert batch.labels.tolist() == [[11, 12, 0, 0, 0, 0], [21, 22, 23, 24, 0, 0]]
    assert batch.loss_mask.tolist() == [[0, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0]]
    assert batch.position_ids[0, :2].tolist() == [0, 1] and batch.position_ids[1, :4].tolist() == [0, 1, 2, 3]
    assert batch.packed_seq_params is None
    assert (batch.tokens.dtype, batch.labels.dtype, batch.loss_mask.dtype) == (torch.int64, torch.int64, torch.float32)


def test_a_pack() -> None:
    rows = token_rows([10, 11, 12], [20, 21, 22, 23])
    batch = build_micro_batch(rows, [[1, 0]], 8, Shape(8, packed=True), CPU)
    assert batch.tokens.tolist() == [[20, 21, 22, 10, 11, 0, 0, 0]]
    assert batch.labels.tolist() == [[21, 22, 23, 11, 12, 0, 0, 0]]
    assert batch.loss_mask.tolist() == [[1, 1, 1, 1, 1, 0, 0, 0]]
    assert batch.position_ids[0, :5].tolist() == [0, 1, 2, 0, 1]
    packed = batch.packed_seq_params
    assert packed.cu_seqlens_q.tolist() == packed.cu_seqlens_kv.tolist() == [0, 3, 5, 8]
    assert packed.cu_seqlens_q.dtype == torch.int32 and packed.max_seqlen_q == 3 and packed.qkv_format == "thd"


def test_a_full_pack_has_no_padding_edge() -> None:
    batch = build_micro_batch(token_rows([1, 2, 3], [4, 5, 6]), [[0, 1]], 4, Shape(4, packed=True), CPU)
    assert batch.packed_seq_params.cu_seqlens_q.tolist() == [0, 2, 4]


@pytest.mark.parametrize("group", [[], [NO_ITEM]])
@pytest.mark.parametrize("packed", [False, True])
def test_an_empty_place_teaches_nothing(group: list[int], packed: bool) -> None:
    batch = build_micro_batch(token_rows([1, 2]), [group], 4, Shape(4, packed), CPU)
    assert batch.tokens.tolist() == [[0, 0, 0, 0]] and batch.loss_mask.sum() == 0
    assert not packed or batch.packed_seq_params.cu_seqlens_q.tolist() == [0, 4]


@pytest.mark.parametrize(("longest", "multiple", "length"), [(5, 1, 5), (5, 4, 8), (8, 4, 8), (0, 4, 4), (0, 1, 1)])
def test_length_of_a_step(longest: int, multiple: int, length: int) -> None:
    assert Shape(64, packed=False, multiple=multiple).batch_length(longest) == length
    assert Shape(64, packed=True, multiple=multiple).batch_length(longest) == 64


def on_every_rank(rows: TokenRows, groups: list[list[int]], length: int, packed: bool, size: int) -> list[MicroBatch]:
    shapes = [Shape(length, packed, size, rank, 2 * size) for rank in range(size)]
    return [build_micro_batch(rows, groups, length, shape, CPU) for shape in shapes]


LENGTHS = st.lists(st.integers(2, 12), min_size=1, max_size=5)


@settings(max_examples=80, deadline=None)
@given(LENGTHS, st.sampled_from([2, 4]), st.booleans())
def test_context_parallel_ranks_share_all_tokens(lengths: list[int], size: int, packed: bool) -> None:
    """Each (token, label) is on exactly one rank, with its position within the row."""
    rows = token_rows(*[[100 * i + j for j in range(1, n + 1)] for i, n in enumerate(lengths)])
    groups = [list(range(len(lengths)))] if packed else [[i] for i in range(len(lengths))]
    length = (2 * size) * -(-sum(n + 2 * size for n in lengths) // (2 * size))
    batches = on_every_rank(rows, groups, length, packed, size)
    assert all(b.tokens.shape == (len(groups), length // size) for b in batches)
    seen = [
        (int(t), int(y), int(p))
        for b in batches
        for t, y, p, m in zip(
            b.tokens.flatten(), b.labels.flatten(), b.position_ids.flatten(), b.loss_mask.flatten(), strict=True
        )
        if m
    ]
    wanted = [(100 * i + j, 100 * i + j + 1, j - 1) for i, n in enumerate(lengths) for j in range(1, n)]
    assert sorted(seen) == sorted(wanted)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.sampled_from([1, 2, 4]))
def test_zigzag_covers_every_position_once(chunks: list[int], size: int) -> None:
    edges = np.cumsum([0, *(2 * size * c for c in chunks)])
    order = zigzag_order(row_bounds(torch.tensor(edges)), size)
    assert sorted(torch.cat(order).tolist()) == list(range(edges[-1]))
    for mine in order:  # the same causal work everywhere: positions within a row add up alike
        assert len(mine) == edges[-1] // size and mine.sum() == order[0].sum()


def test_zigzag_of_eight_on_two_ranks() -> None:
    assert [o.tolist() for o in zigzag_order([(0, 8)], 2)] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    with pytest.raises(ValueError, match="a row of 6 tokens cannot be cut into 4"):
        zigzag_order([(0, 6)], 2)
