"""What a run trains on, from a built set: each row once an epoch, on any number of ranks, over any stops and starts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coalm_nemo.config import RunConfig
from coalm_nemo.data.batch import Shape
from coalm_nemo.data.build import build
from coalm_nemo.data.build_config import load_build_config
from coalm_nemo.data.sampler import epoch_order
from coalm_nemo.data.shards import ShardSet
from coalm_nemo.training.feed import Feed, GlobalBatch
from tests.conftest import write_rows

LENGTH = 96
ROWS = 50


@pytest.fixture(scope="module")
def built(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("feed")
    rows = write_rows(directory / "rows.jsonl", ROWS)
    config = load_build_config(None, [f"chat={rows}"], [], tokenizer=str(tiny_llama), seq_len_tokens=LENGTH)
    return build(config, directory / "set", workers=1).directory


def make_feed(built: Path, packing: bool, batch: int, rank: int, ranks: int, context: int = 1) -> Feed:
    """A feed as a rank makes it when it starts: nothing is kept from an earlier start."""
    run = RunConfig()
    run.data.packing, run.batch.global_size, run.train.seq_len_tokens = packing, batch, LENGTH
    shape = Shape(LENGTH, packing, context, 0, 2 * context if context > 1 else 1)
    return Feed(ShardSet.load(built), run, shape, shuffle=True, data_rank=rank, data_size=ranks)


def row_texts(feed: Feed, batch: GlobalBatch) -> list[tuple[int, ...]]:
    """The rows that this rank's tensors hold, read back from the tensors."""
    found = []
    for micro in feed.micro_batches(batch, torch.device("cpu")):
        for sequence in range(len(micro.tokens)):
            edges = micro.packed_seq_params.cu_seqlens_q.tolist() if micro.packed_seq_params else [0, batch.length]
            for a, b in zip(edges[:-1], edges[1:], strict=True):
                tokens, labels, mask = (
                    t[sequence, a:b].tolist() for t in (micro.tokens, micro.labels, micro.loss_mask)
                )
                if any(mask):
                    last = max(i for i, m in enumerate(mask) if m)
                    assert micro.position_ids[sequence, a : a + last + 1].tolist() == list(range(last + 1))
                    found.append((*tokens[: last + 1], labels[last]))
    return found


@given(
    packing=st.booleans(),
    accumulation=st.integers(1, 3),
    worlds=st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=6),
    epochs=st.integers(1, 2),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_row_once_an_epoch_over_any_restarts(
    built: Path, packing: bool, accumulation: int, worlds: list[int], epochs: int
) -> None:
    """Every few steps the run stops and goes on with another number of ranks; tensors are compared, not indices."""
    batch_size = 4 * accumulation
    rows = ShardSet.load(built)
    expected = Counter(tuple(rows.row(i)[0].tolist()) for i in range(len(rows)))
    end = epochs * len(make_feed(built, packing, batch_size, 0, 1).items)
    seen: Counter[tuple[int, ...]] = Counter()
    consumed, start = 0, 0
    while consumed < end:
        ranks = worlds[start % len(worlds)]
        epoch_order.cache_clear()  # a restarted process remembers nothing
        feeds = [make_feed(built, packing, batch_size, rank, ranks) for rank in range(ranks)]
        for _ in range(1 + start % 3):
            batches = [feed.global_batch(consumed, end) for feed in feeds]
            texts = [t for feed, batch in zip(feeds, batches, strict=True) for t in row_texts(feed, batch)]
            assert all(batch.rows == batches[0].rows for batch in batches)
            assert batches[0].supervised_tokens == sum(rows.supervised()[r] for r in batches[0].rows)
            seen.update(texts)
            consumed += batch_size
        start += 1
    assert seen == Counter({row: epochs * count for row, count in expected.items()})


def test_stored_packs_are_the_ones_in_use(built: Path) -> None:
    feed = make_feed(built, True, 4, 0, 1)
    packs = feed.rows.packs(LENGTH, 4)
    assert packs is not None
    assert feed.items == [packs.pack(i) for i in range(len(packs))]
    manifest = json.loads((built / "manifest.json").read_text())
    assert feed.fill() == pytest.approx(manifest["fill"], abs=1e-6)


def test_packs_fit_context_parallelism(built: Path) -> None:
    """A set's packs are rounded to 4, which is what CP2 cuts rows into."""
    feed = make_feed(built, True, 1, 0, 1, context=2)
    for position in range(len(feed.items)):
        (micro,) = feed.micro_batches(feed.global_batch(position, None), torch.device("cpu"))
        edges: Any = micro.packed_seq_params.cu_seqlens_q
        assert (np.diff(edges.tolist()) % 4 == 0).all()
        assert edges[-1] == LENGTH
