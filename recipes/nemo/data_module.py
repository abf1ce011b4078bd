"""NeMo's data module over our rows: a set of `coalm data build`, or chat rows that are tokenised at the start.

Its batches are `Feed`'s: the same rows, masks and positions in the same order on every data-parallel rank, and after a
resume. Imported only where NeMo is.
"""

# No `from __future__ import annotations` here: nemo_run's command reads the arguments' types, not their names.

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from nemo.lightning.data import WrappedDataLoader
from nemo.lightning.io.mixin import IOMixin
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from torch.utils.data import DataLoader, Dataset

from coalm_nemo.config import RunConfig
from coalm_nemo.data.batch import Shape, build_micro_batch
from coalm_nemo.data.sampler import NO_ITEM, rank_items
from coalm_nemo.errors import UserError
from coalm_nemo.models.llama import LlamaConfig, load_llama_config
from coalm_nemo.training.feed import Feed

PAD_EDGE = -1
"""Fills `cu_seqlens` behind a pack's last edge; NeMo finds the end by it."""


class Positions(Dataset[int]):
    """Positions in the order of training; `collate` makes the tensors of those that a rank has of one step."""

    def __init__(self, feed: Feed, steps: int, end: int | None) -> None:
        self.feed, self.steps, self.end = feed, steps, end

    def __len__(self) -> int:
        return self.steps * self.feed.run.batch.global_size

    def __getitem__(self, position: int) -> int:
        return position

    def collate(self, positions: list[int]) -> dict[str, torch.Tensor]:
        """Positions of one step -> NeMo's batch: [b, s] tensors, and `cu_seqlens` [b, edges] where rows are packed."""
        size = self.feed.run.batch.global_size
        start = positions[0] // size * size
        batch = self.feed.global_batch(start, self.end)
        items = [int(batch.items[p - start]) for p in positions]
        groups = [self.feed.items[i] if i != NO_ITEM else [] for i in items]
        made = [
            build_micro_batch(self.feed.rows, [group], batch.length, self.feed.shape, torch.device("cpu"))
            for group in groups
        ]
        names = ("tokens", "labels", "loss_mask", "position_ids")
        tensors = {name: torch.cat([getattr(m, name) for m in made]) for name in names}
        return tensors | (_edges([m.packed_seq_params.cu_seqlens_q for m in made]) if self.feed.shape.packed else {})


def _edges(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Cumulative lengths of each pack -> one padded table, where each ends, and its longest row."""
    table = torch.full((len(rows), max(len(r) for r in rows) + 1), PAD_EDGE, dtype=torch.int32)
    for number, row in enumerate(rows):
        table[number, : len(row)] = row
    return {
        "cu_seqlens": table,
        "cu_seqlens_argmin": torch.tensor([[len(row)] for row in rows]),
        "max_seqlen": torch.stack([row.diff().max()[None] for row in rows]),
    }


class RowsSampler(MegatronDataSampler):  # type: ignore[misc]
    """Deals a step's positions over the ranks as `coalm train` does, for any micro-batch size."""

    def transform_dataloader(self, dataloader: DataLoader[int], consumed_samples: int = 0) -> DataLoader[int]:
        """The loader with this rank's batches, from the position that the run is at."""
        from megatron.core import parallel_state

        training = getattr(dataloader, "mode", "train") == "train"
        batches = RankBatches(
            total=len(dataloader.dataset),  # type: ignore[arg-type]
            consumed=self.init_consumed_samples if training else 0,
            global_size=self.global_batch_size,
            micro_size=self.micro_batch_size,
            data_rank=parallel_state.get_data_parallel_rank(),
            data_size=parallel_state.get_data_parallel_world_size(),
        )
        return DataLoader(
            dataloader.dataset,
            batch_sampler=batches,  # type: ignore[arg-type]
            num_workers=dataloader.num_workers,
            pin_memory=dataloader.pin_memory,
            collate_fn=dataloader.collate_fn,
        )


class RankBatches:
    """This rank's positions, step by step; micro-batches one after another."""

    def __init__(
        self, *, total: int, consumed: int, global_size: int, micro_size: int, data_rank: int, data_size: int
    ) -> None:
        self.total, self.consumed, self.global_size = total, consumed, global_size
        self.micro_size, self.data_rank, self.data_size = micro_size, data_rank, data_size

    def __len__(self) -> int:
        return (self.total - self.consumed) // self.global_size

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(self.consumed, self.total, self.global_size):
            step = np.arange(start, start + self.global_size)
            mine = rank_items(step, micro_size=self.micro_size, data_rank=self.data_rank, data_size=self.data_size)
            yield mine.reshape(-1).tolist()


class RowsDataModule(pl.LightningDataModule, IOMixin):  # type: ignore[misc]
    """Rows for `llm.finetune`. The arguments have RunConfig's meanings (coalm_nemo/config.py)."""

    def __init__(
        self,
        train: str,
        hf_path: str,
        seq_length: int,
        global_batch_size: int,
        micro_batch_size: int = 1,
        cache_dir: str = "runs/default",
        validation: str = "",
        validation_fraction: float = 0.0,
        packing: bool = True,
        pack_multiple: int = 4,
        length_multiple: int = 1,
        epochs: float = 0.0,
        shuffle: bool = True,
        seed: int = 42,
        overlong: str = "error",
        empty_rows: str = "error",
        num_workers: int = 2,
        tokenizer: Any = None,
    ) -> None:
        """`cache_dir` keeps tokenised rows. `length_multiple`: unpacked sequences are padded to a multiple of it.

        `epochs`: where the rows end, 0: only trainer.max_steps ends the run. `tokenizer` is NeMo's to set.
        """
        super().__init__()
        self.seq_length, self.length_multiple, self.epochs = seq_length, length_multiple, epochs
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.hf_path, self.num_workers, self.tokenizer = hf_path, num_workers, tokenizer
        self.run = RunConfig()
        self.run.run.dir, self.run.run.seed, self.run.model.hf_path = cache_dir, seed, hf_path
        data = self.run.data
        data.train, data.validation, data.validation_fraction = train, validation, validation_fraction
        data.packing, data.pack_multiple, data.shuffle, data.overlong = packing, pack_multiple, shuffle, overlong
        self.run.train.seq_len_tokens, self.run.train.empty_rows = seq_length, empty_rows
        self.run.batch.global_size, self.run.batch.micro_size = global_batch_size, micro_batch_size
        self.prepare_data_per_node = False
        self.data_sampler: MegatronDataSampler | None = None
        self.init_global_step = 0

    def prepare_data(self) -> None:
        """On one process: check the set, or tokenise the rows. Raises UserError for bad ones."""
        self._open()

    def setup(self, stage: str | None = None) -> None:
        """On every rank, with the data on disk."""
        self.train_feed, self.validation_feed = self._open()
        self.data_sampler = RowsSampler(
            seq_len=self.seq_length,
            micro_batch_size=self.micro_batch_size,
            global_batch_size=self.global_batch_size,
            dataloader_type="batch",  # NeMo takes a step's sequence length from the batch
        )

    def _open(self) -> tuple[Feed, Feed | None]:
        from coalm_nemo.training.prepare import Prepared, prepare_data
        from coalm_nemo.training.worker import open_rows

        source = Path(self.hf_path)
        llama: LlamaConfig = load_llama_config(source)
        rows, held_out = open_rows(self.run, Prepared(source, source, *prepare_data(self.run, llama, source)))
        shape = Shape(self.seq_length, self.run.data.packing, multiple=self.length_multiple)
        train = Feed(rows, self.run, shape, shuffle=self.run.data.shuffle, data_rank=0, data_size=1)
        if held_out is None:
            return train, None
        return train, Feed(held_out, self.run, shape, shuffle=False, data_rank=0, data_size=1)

    def train_dataloader(self) -> DataLoader[int]:
        """A batch is a rank's whole share of a step, up to trainer.max_steps."""
        end = max(1, round(self.epochs * len(self.train_feed.items))) if self.epochs else None
        return self._loader(Positions(self.train_feed, int(self.trainer.max_steps), end), "train")

    def val_dataloader(self) -> Any:
        """Each row of the validation rows once."""
        if self.validation_feed is None:
            return []
        items = len(self.validation_feed.items)
        return self._loader(
            Positions(self.validation_feed, math.ceil(items / self.global_batch_size), items), "validation"
        )

    def _loader(self, positions: Positions, mode: str) -> DataLoader[int]:
        assert self.data_sampler is not None and self.trainer is not None
        self.init_global_step = self.data_sampler.init_global_step = self.trainer.global_step
        return WrappedDataLoader(
            mode=mode, dataset=positions, num_workers=self.num_workers, pin_memory=True, collate_fn=positions.collate
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: how far the run is, and which rows it was on."""
        assert self.data_sampler is not None and self.trainer is not None
        steps = self.trainer.global_step - self.init_global_step
        consumed = self.data_sampler.compute_consumed_samples(steps)
        return {"consumed_samples": consumed, "fingerprint": self.train_feed.fingerprint()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint stopped. Raises UserError where the rows or their order are not the same."""
        from megatron.core.num_microbatches_calculator import update_num_microbatches

        if state_dict["fingerprint"] != self.train_feed.fingerprint():
            raise UserError(
                "the checkpoint was trained on other rows than data.train gives now, or in another order; use another dir"
            )
        assert self.data_sampler is not None
        consumed = state_dict["consumed_samples"]
        self.data_sampler.init_consumed_samples = self.data_sampler.prev_consumed_samples = consumed
        self.data_sampler.if_first_step = 1
        update_num_microbatches(consumed_samples=consumed, consistency_check=False)
