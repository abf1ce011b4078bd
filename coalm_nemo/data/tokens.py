"""Tokenised rows as flat arrays on disk: made once on one process, mapped into memory by every rank."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from coalm_nemo.checkpoint.layout import atomic_directory
from coalm_nemo.data.chat import ChatEncoder
from coalm_nemo.data.packing import Packs
from coalm_nemo.data.rows import Row
from coalm_nemo.errors import UserError


class RowSet(Protocol):
    """What a run trains on: rows tokenised at its start (`TokenRows`), or a built set (`ShardSet`).

    A row of L tokens makes L-1 predictions and takes L-1 positions in a sequence.
    """

    @property
    def fingerprint(self) -> str: ...
    def __len__(self) -> int: ...
    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]: ...
    def row_id(self, index: int) -> str: ...
    def positions(self) -> np.ndarray: ...
    def supervised(self) -> np.ndarray: ...
    def packs(self, capacity: int, multiple: int) -> Packs | None: ...


@dataclass(frozen=True)
class TokenRows:
    """N rows of tokens, laid end to end, as `RowSet` says."""

    tokens: np.ndarray
    """int32 [total]"""
    loss_mask: np.ndarray
    """uint8 [total], 1 where the token is a target"""
    offsets: np.ndarray
    """int64 [N+1]"""
    row_ids: list[str]
    fingerprint: str
    """Hash of everything above: a resumed run checks that it goes on with the same data."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask of one row."""
        a, b = self.offsets[index], self.offsets[index + 1]
        return self.tokens[a:b], self.loss_mask[a:b]

    def positions(self) -> np.ndarray:
        """Positions that each row takes: its tokens less one, int64 [N]."""
        return np.diff(self.offsets) - 1

    def supervised(self) -> np.ndarray:
        """Supervised predictions of each row (a row's first token is never predicted), int64 [N]."""
        sums = np.concatenate([[0], np.cumsum(self.loss_mask, dtype=np.int64)])
        per_row = sums[self.offsets[1:]] - sums[self.offsets[:-1]]
        return per_row - self.loss_mask[self.offsets[:-1]]

    def row_id(self, index: int) -> str:
        """The row's own `id`, or `FILE:LINE`."""
        return self.row_ids[index]

    def packs(self, capacity: int, multiple: int) -> Packs | None:
        """Packs that were made beforehand: none."""
        return None

    def save(self, directory: Path) -> None:
        """Write aside, then rename: a directory that exists is whole. Raises UserError for a full disk."""
        shutil.rmtree(directory, ignore_errors=True)
        with atomic_directory(directory) as aside:
            for name in ("tokens", "loss_mask", "offsets"):
                np.save(aside / f"{name}.npy", getattr(self, name))
            (aside / "rows.json").write_text(json.dumps({"row_ids": self.row_ids, "fingerprint": self.fingerprint}))

    @staticmethod
    def load(directory: Path) -> TokenRows:
        """Map the arrays of `save` into memory."""
        info = json.loads((Path(directory) / "rows.json").read_text())
        tokens, mask, offsets = (
            np.load(Path(directory) / f"{name}.npy", mmap_mode="r") for name in ("tokens", "loss_mask", "offsets")
        )
        return TokenRows(tokens, mask, offsets, info["row_ids"], info["fingerprint"])


def tokenize_rows(
    rows: list[Row], encoder: ChatEncoder, *, max_positions: int, overlong: str = "error", empty: str = "error"
) -> TokenRows:
    """Encode every row. `overlong` and `empty` say "error" or "drop" for rows that do not fit or teach nothing."""
    kept: list[tuple[list[int], list[int]]] = []
    ids: list[str] = []
    for row in rows:
        tokens, mask = encoder.encode(row)
        if len(tokens) - 1 > max_positions:
            if overlong == "drop":
                continue
            raise UserError(
                f"{row.row_id} has {len(tokens)} tokens and train.seq_len_tokens is {max_positions}; "
                "raise it, or drop such rows with data.overlong=drop"
            )
        if not any(mask[1:]):
            if empty == "drop":
                continue
            raise UserError(f"{row.row_id} has no supervised token; drop such rows with train.empty_rows=drop")
        kept.append((tokens, mask))
        ids.append(row.row_id)
    if not kept:
        raise UserError("no row is left to train on; all were dropped")
    return _lay_out(kept, ids)


def _lay_out(rows: list[tuple[list[int], list[int]]], ids: list[str]) -> TokenRows:
    tokens = np.concatenate([np.asarray(t, dtype=np.int32) for t, _ in rows])
    mask = np.concatenate([np.asarray(m, dtype=np.uint8) for _, m in rows])
    offsets = np.cumsum([0, *(len(t) for t, _ in rows)], dtype=np.int64)
    digest = hashlib.sha256()
    for array in (tokens, mask, offsets):
        digest.update(array.tobytes())
    return TokenRows(tokens, mask, offsets, ids, digest.hexdigest())
