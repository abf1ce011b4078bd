"""Batches made beforehand are the batches; what goes wrong in the making is told at its step."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coalm_nemo.config import RunConfig
from coalm_nemo.data.batch import MicroBatch, Shape
from coalm_nemo.data.tokens import TokenRows
from coalm_nemo.training.feed import Feed
from coalm_nemo.training.prefetch import Prefetcher

CPU = torch.device("cpu")


def make_feed(ahead: int, packing: bool = False, batch: int = 4, micro: int = 2) -> Feed:
    lengths = np.random.default_rng(1).integers(4, 30, 23)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.random.default_rng(2).integers(0, 99, int(offsets[-1]), dtype=np.int32)
    rows = TokenRows(tokens, np.ones_like(tokens, dtype=np.uint8), offsets, [str(i) for i in range(23)], "drawn")
    run = RunConfig()
    run.speed.prefetch_steps, run.data.packing, run.train.seq_len_tokens = ahead, packing, 64
    run.batch.global_size, run.batch.micro_size = batch, 1 if packing else micro
    return Feed(rows, run, Shape(64, packing), shuffle=True, data_rank=0, data_size=1)


def flat(micro: MicroBatch) -> list[list[int]]:
    edges = micro.packed_seq_params.cu_seqlens_q.tolist() if micro.packed_seq_params else []
    tensors = (micro.tokens, micro.labels, micro.loss_mask, micro.position_ids)
    return [*(t.flatten().tolist() for t in tensors), edges]


@settings(max_examples=25, deadline=None)
@given(
    ahead=st.integers(0, 3), start=st.integers(0, 60), steps=st.integers(0, 6), packing=st.booleans(),
    end=st.none() | st.integers(1, 70),
)  # fmt: skip
def test_same_batches_from_any_position(ahead: int, start: int, steps: int, packing: bool, end: int | None) -> None:
    """As `Feed` gives them when asked step by step, which is what a resumed run asks."""
    feed = make_feed(ahead, packing)
    with Prefetcher(feed, CPU, start, end, steps) as batches:
        for step in range(steps):
            made = batches.next()
            wanted = feed.global_batch(start + 4 * step, end)
            assert made.batch.items.tolist() == wanted.items.tolist() and made.batch.rows == wanted.rows
            assert [flat(m) for m in made.micro_batches] == [flat(m) for m in feed.micro_batches(wanted, CPU)]
        with pytest.raises(StopIteration):
            batches.next()


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_a_row_that_cannot_be_read_fails_at_its_own_step(ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = make_feed(ahead)
    made, read = 0, TokenRows.row

    def torn(rows: TokenRows, index: int) -> tuple[np.ndarray, np.ndarray]:
        nonlocal made
        made += 1
        if made > 8:  # two steps of four rows
            raise OSError("the disk is gone")
        return read(rows, index)

    monkeypatch.setattr(TokenRows, "row", torn)
    with Prefetcher(feed, CPU, 0, None, 5) as batches:
        batches.next(), batches.next()
        with pytest.raises(OSError, match="the disk is gone"):
            batches.next()


def test_the_next_step_is_made_while_this_one_trains() -> None:
    feed, begun, main = make_feed(1), threading.Event(), threading.current_thread()
    plain = feed.micro_batches

    def watched(batch, device):  # type: ignore[no-untyped-def]
        assert threading.current_thread() is not main
        if batch.items.tolist() == feed.global_batch(4, None).items.tolist():
            begun.set()
        return plain(batch, device)

    feed.micro_batches = watched  # type: ignore[method-assign]
    with Prefetcher(feed, CPU, 0, None, 9) as batches:
        batches.next()
        assert begun.wait(20)  # nobody has asked for the second step yet
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_a_batch_moves_whole() -> None:
    """Every tensor of a micro-batch goes to the device, its row boundaries too."""
    feed = make_feed(0, packing=True)
    (micro, *_) = feed.micro_batches(feed.global_batch(0, None), CPU)
    moved = micro.to(torch.device("meta"))
    tensors = [moved.tokens, moved.labels, moved.loss_mask, moved.position_ids]
    tensors += [moved.packed_seq_params.cu_seqlens_q, moved.packed_seq_params.cu_seqlens_kv]
    assert {t.device.type for t in tensors} == {"meta"}
    assert moved.packed_seq_params.max_seqlen_q == micro.packed_seq_params.max_seqlen_q
    assert micro.tokens.device.type == "cpu" and micro.to(CPU) is micro


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_arrives_whole() -> None:
    feed = make_feed(1, packing=True)
    with Prefetcher(feed, torch.device("cuda", 0), 0, None, 3) as batches:
        for step in range(3):
            made, wanted = batches.next(), feed.micro_batches(feed.global_batch(4 * step, None), CPU)
            assert all(m.tokens.is_cuda for m in made.micro_batches)
            assert [flat(m) for m in made.micro_batches] == [flat(m) for m in wanted]
