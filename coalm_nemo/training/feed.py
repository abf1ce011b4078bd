"""The step's place in the data: which rows, cut how, on this rank."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass

import numpy as np
import torch

from coalm_nemo.config import RunConfig
from coalm_nemo.data.batch import MicroBatch, Shape, Sources, build_micro_batch
from coalm_nemo.data.packing import pack_rows_flat
from coalm_nemo.data.sampler import NO_ITEM, items_at, rank_items
from coalm_nemo.data.shards import ShardSet
from coalm_nemo.data.tokens import RowSet


@dataclass(frozen=True)
class GlobalBatch:
    """What all ranks together train on in one step."""

    items: np.ndarray
    """int64 [global batch]: items, NO_ITEM where the run's last batch is not full"""
    length: int
    """Sequence length before context parallelism cuts it."""
    tokens: int
    supervised_tokens: int
    rows: list[int]


class Feed:
    """Rows of one set in training order; every rank computes the same order."""

    def __init__(
        self, rows: RowSet, run: RunConfig, shape: Shape, *, shuffle: bool, data_rank: int, data_size: int
    ) -> None:
        self.rows = rows
        self.run = run
        self.shape = shape
        self.shuffle = shuffle
        self.data_rank = data_rank
        self.data_size = data_size
        self.positions = rows.positions()
        self.items = self._items()
        self.supervised = rows.supervised()
        self.sources = sources_of(rows) if run.logging.loss_by_source else None

    def _items(self) -> list[list[int]]:
        """Each item's rows: a pack, or a single row."""
        if not self.run.data.packing:
            return [[i] for i in range(len(self.rows))]
        capacity, multiple = self.run.train.seq_len_tokens, self.run.data.pack_multiple
        packs = self.rows.packs(capacity, multiple) or pack_rows_flat(self.positions, capacity, multiple)
        return [packs.pack(i) for i in range(len(packs))]

    def fingerprint(self) -> str:
        """Hash of what decides which row comes when: rows, packs, seed. A run resumes only where it is the same."""
        order = [self.rows.fingerprint, self.run.run.seed, self.shuffle, self.items if self.run.data.packing else None]
        return hashlib.sha256(json.dumps(order).encode()).hexdigest()

    def fill(self) -> float:
        """Real tokens a position, over packs; 1.0 without packing (padding depends on the batch)."""
        if not self.run.data.packing:
            return 1.0
        return float(self.positions.sum() / (len(self.items) * self.run.train.seq_len_tokens))

    def global_batch(self, consumed_items: int, end: int | None) -> GlobalBatch:
        """The batch that starts at position `consumed_items`; nothing from position `end` on."""
        items = items_at(
            consumed_items,
            self.run.batch.global_size,
            size=len(self.items),
            seed=self.run.run.seed,
            shuffle=self.shuffle,
            end=end,
        )
        rows = [r for item in items if item != NO_ITEM for r in self.items[item]]
        longest = int(self.positions[rows].max()) if rows else 0
        return GlobalBatch(
            items,
            self.shape.batch_length(longest),
            int(self.positions[rows].sum()),
            int(self.supervised[rows].sum()),
            rows,
        )

    def micro_batches(self, batch: GlobalBatch, device: torch.device) -> list[MicroBatch]:
        """This rank's micro-batches of a global batch."""
        mine = rank_items(
            batch.items, micro_size=self.run.batch.micro_size, data_rank=self.data_rank, data_size=self.data_size
        )
        return [
            build_micro_batch(
                self.rows,
                [self.items[i] if i != NO_ITEM else [] for i in micro.tolist()],
                batch.length,
                self.shape,
                device,
                self.sources,
            )
            for micro in mine
        ]


def sources_of(rows: RowSet) -> Sources | None:
    """Where the rows of a built set came from; None where all came from one place."""
    if not isinstance(rows, ShardSet) or len(rows.source_names()) < 2:
        return None
    return Sources(tuple(rows.source_names()), rows.sources())


def total_steps(run: RunConfig, items: int) -> tuple[int, int | None]:
    """(steps of the run, position at which the data ends or None): from `train.steps`, else from `train.epochs`."""
    if run.train.steps:
        return run.train.steps, None
    end = round(run.train.epochs * items)
    return max(1, math.ceil(end / run.batch.global_size)), max(1, end)
