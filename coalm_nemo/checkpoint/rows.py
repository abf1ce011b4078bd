"""Rows of weights read from files piece by piece: the one thing that both formats are to a conversion. No torch.

A source is a two-dimensional array somewhere on disk whose rows can be copied into a buffer. A target tensor is a list
of row blocks of sources; streaming it needs one buffer, whatever the tensor's size.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from coalm_nemo.checkpoint.direct_io import ALIGNMENT_BYTES, aligned_buffer, is_cached, read_direct, set_direct
from coalm_nemo.errors import UserError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""The dtypes that are converted, by torch's names, and the size of an element."""

_MAX_OPEN_FILES = 8
_DIRECT_BYTES = 256 << 10
_LARGEST_BUFFER_BYTES = 8 << 20  # more gains no speed: reads are sequential, and the page cache reads ahead
_SMALLEST_BUFFER_BYTES = 64 << 10


class RowSource(Protocol):
    """A two-dimensional array on disk."""

    @property
    def dtype(self) -> str: ...

    @property
    def row_bytes(self) -> int: ...

    def read_rows(self, row: int, out: memoryview) -> None:
        """Fill `out` (a whole number of rows, in bytes) from row `row` on. Raises UserError if the file is short."""


@dataclass(frozen=True)
class RowBlock:
    """`rows` consecutive rows of a source, from `row` on."""

    source: RowSource
    row: int
    rows: int


class FileReader:
    """Reads byte ranges of many files, holding few of them open. Threads may share it: each opens files for itself."""

    def __init__(self, max_open: int = _MAX_OPEN_FILES) -> None:
        self._max_open = max_open
        self._own = threading.local()
        self._all: list[OrderedDict[Path, int]] = []
        self._cached: dict[Path, bool] = {}

    def __enter__(self) -> FileReader:
        return self

    def __exit__(self, *_: object) -> None:
        for fds in self._all:
            while fds:
                os.close(fds.popitem()[1])

    def read_into(self, path: Path, offset: int, out: memoryview) -> None:
        """Fill `out` from byte `offset` on. Raises UserError if the file ends before or cannot be read."""
        done = 0
        try:
            fd = self._open(path)
            if len(out) >= _DIRECT_BYTES and self._read_past_the_cache(path, fd, offset, out):
                return
            while done < len(out):
                if not (count := os.preadv(fd, [out[done:]], offset + done)):
                    raise UserError(f"{path} ends at byte {offset + done}, before the data that it should hold")
                done += count
        except OSError as e:
            raise UserError(f"{path} cannot be read ({e.strerror})") from e

    def read(self, path: Path, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on, for headers."""
        data = bytearray(count)
        self.read_into(path, offset, memoryview(data))
        return bytes(data)

    def _open(self, path: Path) -> int:
        fds = self._descriptors()
        if path not in fds:
            if len(fds) >= self._max_open:
                os.close(fds.popitem(last=False)[1])
            fds[path] = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe in its place: no waiting
        fds.move_to_end(path)
        return fds[path]

    def _read_past_the_cache(self, path: Path, fd: int, offset: int, out: memoryview) -> bool:
        """Where the file is not in the page cache anyway; False if nothing was read."""
        if path not in self._cached:
            self._cached[path] = is_cached(fd)
        if self._cached[path] or not set_direct(fd, True):
            return False
        try:
            size = len(out) + 2 * ALIGNMENT_BYTES
            if len(stage := getattr(self._own, "stage", memoryview(b""))) < size:
                stage = self._own.stage = aligned_buffer(size)
            return read_direct(fd, offset, out, stage)
        finally:
            set_direct(fd, False)

    def _descriptors(self) -> OrderedDict[Path, int]:
        """This thread's open files, the one used last at the end."""
        if not hasattr(self._own, "fds"):
            self._own.fds = OrderedDict()
            self._all.append(self._own.fds)
        fds: OrderedDict[Path, int] = self._own.fds
        return fds


@dataclass(frozen=True)
class FileRows:
    """Rows one after another in a file."""

    reader: FileReader
    path: Path
    offset: int
    dtype: str
    row_bytes: int

    def read_rows(self, row: int, out: memoryview) -> None:
        self.reader.read_into(self.path, self.offset + row * self.row_bytes, out)


def buffer_bytes(max_memory_bytes: int) -> int:
    """Size of one of the two streaming buffers under a memory ceiling; a cast to fp32 makes twice as much of each."""
    if max_memory_bytes < 8 * _SMALLEST_BUFFER_BYTES:
        raise UserError(f"a memory ceiling of {max_memory_bytes} bytes is too low; give 1 MiB or more")
    return min(_LARGEST_BUFFER_BYTES, max_memory_bytes // 8)


def stream_blocks(blocks: Iterable[RowBlock], buffer_size: int, dtype: str | None = None) -> Iterator[memoryview]:
    """The blocks' rows one after another as pieces of at most about `buffer_size` bytes (at least one row).

    `dtype` None keeps the dtype. Two buffers take turns: a piece is valid until the next but one is asked for. All
    blocks have rows of one length.
    """
    buffer, other = memoryview(bytearray()), memoryview(bytearray())
    for piece in _pieces(blocks, buffer_size):
        size = sum(block.rows * block.source.row_bytes for block in piece)
        buffer, other = other, buffer
        if len(buffer) < size:
            buffer = memoryview(bytearray(size))
        start = 0
        for block in piece:
            stop = start + block.rows * block.source.row_bytes
            block.source.read_rows(block.row, buffer[start:stop])
            start = stop
        yield cast(buffer[:size], piece[0].source.dtype, dtype)


def _pieces(blocks: Iterable[RowBlock], buffer_size: int) -> Iterator[list[RowBlock]]:
    """Cut long blocks and gather short ones, so that each piece about fills the buffer."""
    piece: list[RowBlock] = []
    room = buffer_size
    for block in blocks:
        row, end, row_bytes = block.row, block.row + block.rows, block.source.row_bytes
        while row < end:
            if piece and room < row_bytes:
                yield piece
                piece, room = [], buffer_size
            rows = min(end - row, max(1, room // row_bytes))
            piece.append(RowBlock(block.source, row, rows))
            row, room = row + rows, room - rows * row_bytes
    if piece:
        yield piece


def cast(data: memoryview, source: str, target: str | None) -> memoryview:
    """The elements of `data` in another dtype, rounded as torch rounds them (to nearest, ties to even).

    Raises UserError if a finite value is too large for the target.
    """
    if target is None or target == source:
        return data
    import torch

    given = torch.frombuffer(data, dtype=getattr(torch, source))
    values = given.to(getattr(torch, target))
    if target != "float32" and bool((values.isinf() & given.isfinite()).any()):
        raise UserError(f"a weight is too large for {target}; export in bf16 or fp32")
    return values.view(torch.uint8).numpy().data
