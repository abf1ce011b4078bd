"""What a source of training rows is: files cut into blocks that a worker process turns into rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coalm_nemo.data.rows import Row


@dataclass(frozen=True)
class Block:
    """A few megabytes of a source at most: what one worker works on at a time."""

    file: Path
    first: int
    """Number of its first record in the file (1-based line, or 1-based position in an array)."""
    payload: Any = None
    """Picklable: raw text or bytes of whole records; None where the worker reads `file` itself."""


@dataclass(frozen=True)
class Dropped:
    """A row, or what would have been one, left out; the manifest counts them by reason."""

    reason: str
    """snake_case, few distinct values: it is counted, not read."""
    row_id: str


@dataclass(frozen=True)
class Source(ABC):
    """One entry of `sources:` in a data configuration. Subclasses are frozen dataclasses; their fields are its options.

    Rows may depend on the file's content, the options and the seed, never on where the blocks were cut, on the worker
    or on the machine: the same set must come out everywhere.
    """

    path: str
    """File, or directory of files in the source's public layout."""

    @abstractmethod
    def files(self) -> list[Path]:
        """The files that are read, sorted. Raises UserError where there are none."""

    @abstractmethod
    def blocks(self) -> Iterator[Block]:
        """The files cut into blocks, in order, in bounded memory."""

    @abstractmethod
    def rows(self, block: Block, seed: int) -> Iterator[Row | Dropped]:
        """Rows of one block, in order. Raises UserError naming file and record for what is not this layout."""

    def counts(self, block: Block) -> dict[str, int]:
        """Further figures of a block for the manifest (dialogues, calls); summed over blocks."""
        return {}
