"""A built training set on disk: flat arrays that every rank maps into memory, and a manifest that says what they are.

    SET/  tokens.bin loss_mask.bin    int32 and uint8, all rows end to end
          offsets.npy                 int64 [rows + 1]
          supervised.npy sources.npy  int32, uint8 [rows]: targets in the row, index into the manifest's sources
          hashes.npy                  uint64 [rows]: of the row's tokens, for a validation split that does not move
          row_ids.bin row_id_ends.npy UTF-8 names
          order.npy                   int64 [items of an epoch]: rows in blended number, repeats included
          pack_offsets.npy pack_rows.npy  int64: packs as ranges of positions in `order`
          tokenizer/                  the tokenizer, with the chat template that the rows were written in
          manifest.json               written last: a set that has one is whole

The same inputs, options and seed give the same bytes: nothing here knows a time, a path outside the set or a worker.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from coalm_nemo.data.encoding import EncodedRow
from coalm_nemo.data.packing import Packs
from coalm_nemo.errors import UserError

MANIFEST = "manifest.json"
CHAT_TEMPLATE = "chat_template.jinja"
"""In `tokenizer/`: the template that the rows were rendered with."""
FORMAT = 1
KIND = "coalm-shards"


@dataclass(frozen=True)
class EncodedBlock:
    """What a worker made of one block: its rows end to end."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    lengths: np.ndarray
    supervised: np.ndarray
    hashes: np.ndarray
    row_ids: list[str]

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @staticmethod
    def of(rows: list[EncodedRow]) -> EncodedBlock:
        """Lay rows end to end."""
        empty = [np.zeros(0, dtype=np.int32)]
        hashes = [hashlib.blake2b(r.tokens.data, digest_size=8).digest() for r in rows]
        return EncodedBlock(
            np.concatenate([r.tokens for r in rows] or empty),
            np.concatenate([r.loss_mask for r in rows] or [np.zeros(0, dtype=np.uint8)]),
            np.array([len(r.tokens) for r in rows], dtype=np.int32),
            np.array([r.supervised for r in rows], dtype=np.int32),
            np.frombuffer(b"".join(hashes), dtype=np.uint64),
            [r.row.row_id for r in rows],
        )


class ShardWriter:
    """Appends blocks in the order they are given; memory grows by some 40 bytes a row."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tokens: BinaryIO = (directory / "tokens.bin").open("wb")
        self.loss_mask: BinaryIO = (directory / "loss_mask.bin").open("wb")
        self.row_ids: BinaryIO = (directory / "row_ids.bin").open("wb")
        self.lengths, self.supervised = array("i"), array("i")
        self.sources, self.hashes, self.row_id_ends = array("B"), array("Q"), array("q")
        self.digest = hashlib.sha256()
        self.largest_token = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for file in (self.tokens, self.loss_mask, self.row_ids):
            file.close()

    def append(self, block: EncodedBlock, source: int) -> None:
        """Write one block's rows."""
        for file, values in ((self.tokens, block.tokens), (self.loss_mask, block.loss_mask)):
            file.write(values.data)
            self.digest.update(values.data)
        self.largest_token = max(self.largest_token, int(block.tokens.max(initial=0)))
        self.lengths.frombytes(block.lengths.tobytes())
        self.supervised.frombytes(block.supervised.tobytes())
        self.sources.frombytes(bytes([source]) * block.rows)
        self.hashes.frombytes(block.hashes.tobytes())
        for row_id in block.row_ids:
            self.row_ids.write(row_id.encode())
            self.row_id_ends.append(self.row_ids.tell())

    def finish(self) -> None:
        """Write the small arrays; the large ones are on disk already."""
        self.__exit__(None, None, None)
        offsets = np.zeros(len(self.lengths) + 1, dtype=np.int64)
        np.cumsum(np.frombuffer(self.lengths, dtype=np.int32), out=offsets[1:])
        np.save(self.directory / "offsets.npy", offsets)
        np.save(self.directory / "supervised.npy", np.frombuffer(self.supervised, dtype=np.int32))
        np.save(self.directory / "sources.npy", np.frombuffer(self.sources, dtype=np.uint8))
        np.save(self.directory / "hashes.npy", np.frombuffer(self.hashes, dtype=np.uint64))
        np.save(self.directory / "row_id_ends.npy", np.frombuffer(self.row_id_ends, dtype=np.int64))


def write_order(directory: Path, order: np.ndarray, packs: Packs) -> None:
    """The epoch's rows, and how they lie side by side."""
    np.save(directory / "order.npy", order.astype(np.int64))
    np.save(directory / "pack_offsets.npy", packs.offsets)
    np.save(directory / "pack_rows.npy", packs.rows)


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Seal a set."""
    text = json.dumps({"kind": KIND, "format": FORMAT, **manifest}, indent=1, ensure_ascii=False)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a set. Raises UserError where `directory` is not one, or was built by a later version."""
    path = Path(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{directory} is not a set of `coalm data build`: {MANIFEST} is missing or torn") from e
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise UserError(f"{directory} is not a set of `coalm data build`: its {MANIFEST} is of another kind")
    if manifest.get("format") != FORMAT:
        raise UserError(f"{directory} is of format {manifest.get('format')}; this version reads {FORMAT}")
    return manifest


@dataclass(frozen=True)
class ShardSet:
    """The rows of a set in blended order, mapped into memory. A drop-in for `TokenRows`."""

    directory: Path
    manifest: dict[str, Any]
    tokens: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray
    order: np.ndarray
    """int64 [N]: which stored row each of this view's rows is"""
    whole: bool = True
    """False for a part of the set: the stored packs are not this view's."""

    @staticmethod
    def load(directory: Path) -> ShardSet:
        """Map a set. Raises UserError where it is not one or a file is missing or cut short."""
        directory = Path(directory)
        manifest = read_manifest(directory)
        try:
            offsets = np.load(directory / "offsets.npy", mmap_mode="r")
            order = np.load(directory / "order.npy", mmap_mode="r")
            tokens = np.memmap(directory / "tokens.bin", dtype=np.int32, mode="r")
            mask = np.memmap(directory / "loss_mask.bin", dtype=np.uint8, mode="r")
        except (OSError, ValueError) as e:
            raise UserError(f"{directory} is torn ({e}); build it again") from e
        if not len(tokens) == len(mask) == offsets[-1]:
            raise UserError(f"{directory} is torn: its arrays do not fit together; build it again")
        return ShardSet(directory, manifest, tokens, mask, offsets, order)

    def __len__(self) -> int:
        return len(self.order)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask of one row."""
        stored = self.order[index]
        a, b = self.offsets[stored], self.offsets[stored + 1]
        return self.tokens[a:b], self.loss_mask[a:b]

    def positions(self) -> np.ndarray:
        """Positions that each row takes: its tokens less one, int64 [N]."""
        return np.diff(self.offsets)[self.order] - 1

    def supervised(self) -> np.ndarray:
        """Supervised predictions of each row, int64 [N]. A row's first token is never a target."""
        return np.load(self.directory / "supervised.npy")[self.order].astype(np.int64)

    def source_names(self) -> list[str]:
        """Names of the sources, in the order of `sources`."""
        return list(self.manifest["sources"])

    def sources(self) -> np.ndarray:
        """Index into `source_names` of each row, uint8 [N]."""
        return np.load(self.directory / "sources.npy")[self.order]

    def row_id(self, index: int) -> str:
        """The row's name: where in its source it came from."""
        ends = np.load(self.directory / "row_id_ends.npy", mmap_mode="r")
        stored = int(self.order[index])
        start = int(ends[stored - 1]) if stored else 0
        with (self.directory / "row_ids.bin").open("rb") as file:
            file.seek(start)
            return file.read(int(ends[stored]) - start).decode()

    @property
    def fingerprint(self) -> str:
        """Hash of rows and order: a resumed run checks that it goes on with the same data."""
        if self.whole:
            return str(self.manifest["content_sha256"])
        return hashlib.sha256(str(self.manifest["content_sha256"]).encode() + self.order.tobytes()).hexdigest()

    def packs(self, capacity: int, multiple: int) -> Packs | None:
        """The stored packs, if they are of this view and were made for these."""
        packing = self.manifest["packing"]
        if not self.whole or (packing["seq_len_tokens"], packing["multiple"]) != (capacity, multiple):
            return None
        return Packs(np.load(self.directory / "pack_offsets.npy"), np.load(self.directory / "pack_rows.npy"))

    def split(self, fraction: float) -> tuple[ShardSet, ShardSet | None]:
        """(train, validation) by the hash of each row's tokens: the same row falls on the same side in every set."""
        if not fraction:
            return self, None
        hashes = np.load(self.directory / "hashes.npy")[self.order]
        held_out = hashes < np.uint64(int(fraction * 2**64))
        train, validation = self.order[~held_out], np.unique(self.order[held_out])
        if not len(train) or not len(validation):
            raise UserError(f"data.validation_fraction={fraction} leaves one side of {self.directory} without a row")
        return replace(self, order=train, whole=False), replace(self, order=validation, whole=False)


def is_shard_set(path: Path) -> bool:
    """Whether `path` is a set of `coalm data build`."""
    return (Path(path) / MANIFEST).is_file()
