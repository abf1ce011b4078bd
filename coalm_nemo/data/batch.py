"""Token rows -> the tensors of one micro-batch on one rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coalm_nemo.data.sampler import NO_ITEM
from coalm_nemo.data.tokens import RowSet
from coalm_nemo.models.context_parallel import zigzag_order


@dataclass(frozen=True)
class Shape:
    """How sequences are cut and padded on this layout."""

    seq_len_tokens: int
    packed: bool
    context_size: int = 1
    context_rank: int = 0
    multiple: int = 1
    """Sequence lengths are multiples of this: what tensor (sequence) and context parallelism divide by."""

    @property
    def row_multiple(self) -> int:
        """Packed rows are padded to a multiple of this, so that context parallelism cuts each evenly."""
        return 2 * self.context_size if self.context_size > 1 else 1

    def batch_length(self, longest: int) -> int:
        """Sequence length of a step: fixed when packed, else the longest row rounded up."""
        if self.packed:
            return self.seq_len_tokens
        return max(self.multiple, -(-longest // self.multiple) * self.multiple)


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass. s is the length that this context-parallel rank holds."""

    tokens: Tensor
    """int64 [b, s]"""
    labels: Tensor
    """int64 [b, s]: the next token"""
    loss_mask: Tensor
    """fp32 [b, s]: 1 where the label is supervised"""
    position_ids: Tensor
    """int64 [b, s]"""
    packed_seq_params: Any = None
    """megatron-core PackedSeqParams over the whole (not cut) sequence, when packed."""
    sources: Tensor | None = None
    """int64 [b, s]: which source the position's row came from, where that is logged"""
    source_count: int = 0

    def to(self, device: torch.device) -> MicroBatch:
        """The same on `device`; from pinned memory the copy does not hold up the caller."""
        return self if device.type == self.tokens.device.type else self._each(lambda t: t.to(device, non_blocking=True))

    def pinned(self) -> MicroBatch:
        """The same in memory that a GPU can fetch by itself."""
        return self._each(lambda t: t.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        return _each_tensor(replace(self, packed_seq_params=_each_tensor(self.packed_seq_params, change)), change)


def _each_tensor(holder: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A dataclass (or None) with each of its tensors changed."""
    if holder is None:
        return None
    values = {f.name: getattr(holder, f.name) for f in fields(holder)}
    return replace(holder, **{name: change(v) for name, v in values.items() if isinstance(v, Tensor)})


@dataclass(frozen=True)
class Sources:
    """Where rows came from."""

    names: tuple[str, ...]
    of_row: np.ndarray
    """Index into `names`, [N]"""


def build_micro_batch(
    rows: RowSet,
    items: list[list[int]],
    length: int,
    shape: Shape,
    device: torch.device,
    sources: Sources | None = None,
) -> MicroBatch:
    """`items`: for every sequence of the micro-batch the rows it holds (one, unless packed; none: all padding)."""
    sequences = [_lay_sequence(rows, group, length, shape, sources) for group in items]
    names = ("tokens", "labels", "mask", "positions", *(["sources"] if sources else []))
    arrays = {name: np.stack([s[name] for s in sequences]) for name in names}
    edges = sequences[0]["edges"]
    if shape.context_size > 1:
        bounds = list(zip(edges[:-1], edges[1:], strict=True)) if shape.packed else [(0, length)]
        mine = zigzag_order(bounds, shape.context_size)[shape.context_rank].numpy()
        arrays = {name: array[:, mine] for name, array in arrays.items()}
    put = {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in arrays.items()}
    packed = _packed_seq_params(edges, device) if shape.packed else None
    return MicroBatch(
        put["tokens"],
        put["labels"],
        put["mask"],
        put["positions"],
        packed,
        put.get("sources"),
        len(sources.names) if sources else 0,
    )


def _lay_sequence(
    rows: RowSet, group: list[int], length: int, shape: Shape, sources: Sources | None = None
) -> dict[str, Any]:
    """Rows side by side from the left, the rest padding. `edges` are the rows' boundaries, the padding a row too."""
    source = np.zeros(length, dtype=np.int64)
    tokens, labels = np.zeros(length, dtype=np.int64), np.zeros(length, dtype=np.int64)
    mask, positions = np.zeros(length, dtype=np.float32), np.zeros(length, dtype=np.int64)
    edges = [0]
    for index in group:
        if index == NO_ITEM:
            continue
        ids, targets = rows.row(index)
        start, n = edges[-1], len(ids) - 1
        tokens[start : start + n] = ids[:-1]
        labels[start : start + n] = ids[1:]
        mask[start : start + n] = targets[1:]
        if sources:
            source[start : start + n] = sources.of_row[index]
        padded = -(-n // shape.row_multiple) * shape.row_multiple
        positions[start : start + padded] = np.arange(padded)
        edges.append(start + padded)
    if edges[-1] < length:
        edges.append(length)
    return {"tokens": tokens, "labels": labels, "mask": mask, "positions": positions, "edges": edges, "sources": source}


def _packed_seq_params(edges: list[int], device: torch.device) -> Any:
    from megatron.core.packed_seq_params import PackedSeqParams

    cu_seqlens = torch.tensor(edges, dtype=torch.int32, device=device)
    longest = max(b - a for a, b in zip(edges[:-1], edges[1:], strict=True))
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
