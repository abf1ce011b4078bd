"""Files planned before they are written: each a list of items, an item some rows of weights in a frame of fixed bytes.

Both formats are that, so one loop writes both. As every size is known beforehand, an interrupted file is gone on with
at an item's boundary, and several files are written side by side, the result always the same.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from coalm_nemo.checkpoint.journal import Journal
from coalm_nemo.checkpoint.rows import DTYPE_BYTES, RowBlock, stream_blocks
from coalm_nemo.checkpoint.streams import HashingFile, ProgressMeter, recheck

MARK_BYTES = 32 << 20
"""A file's digest is recorded at the first item's end after so many bytes: what a kill can cost, plus an item."""


@dataclass(frozen=True)
class Item:
    """Bytes of a file: a head, rows of weights one after another, a tail."""

    head: bytes
    blocks: tuple[RowBlock, ...] = ()
    dtype: str | None = None
    """Dtype to write; None: as it is in the source."""
    tail: bytes = b""

    @property
    def data_bytes(self) -> int:
        return sum(b.rows * b.source.row_bytes * self._width(b) // DTYPE_BYTES[b.source.dtype] for b in self.blocks)

    def _width(self, block: RowBlock) -> int:
        return DTYPE_BYTES[self.dtype or block.source.dtype]

    @property
    def bytes(self) -> int:
        return len(self.head) + self.data_bytes + len(self.tail)


@dataclass(frozen=True)
class PlannedFile:
    """A file of the result."""

    name: str
    items: tuple[Item, ...]

    @property
    def data_bytes(self) -> int:
        return sum(item.data_bytes for item in self.items)


def plan_digest(files: Iterable[PlannedFile]) -> str:
    """A digest of what the files will look like, weights aside: another plan cannot go on with this one's files."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}:".encode())
        for item in file.items:
            rows = [(b.row, b.rows, b.source.row_bytes, b.source.dtype) for b in item.blocks]
            digest.update(item.head + item.tail + f"{rows}{item.dtype};".encode())
    return digest.hexdigest()


def cut_rows(blocks: Sequence[RowBlock], limit_bytes: int) -> Iterator[tuple[int, int, tuple[RowBlock, ...]]]:
    """Cut blocks, laid end to end, into runs of rows of at most `limit_bytes`: (first row, rows, their blocks)."""
    total = sum(block.rows for block in blocks)
    limit = max(1, limit_bytes // blocks[0].source.row_bytes)
    for first in range(0, total, limit):
        last = min(total, first + limit)
        yield first, last - first, tuple(_between(blocks, first, last))


def _between(blocks: Sequence[RowBlock], first: int, last: int) -> Iterator[RowBlock]:
    at = 0
    for block in blocks:
        begin, end = max(first, at), min(last, at + block.rows)
        if begin < end:
            yield RowBlock(block.source, block.row + begin - at, end - begin)
        at += block.rows


def write_files(
    directory: Path,
    files: Sequence[PlannedFile],
    journal: Journal,
    meter: ProgressMeter,
    *,
    buffer_size: int,
    workers: int,
) -> dict[str, str]:
    """Write the files, `workers` at a time, going on from what the journal knows; gives their SHA-256 by name.

    Raises OSError for a disk that fails, and what a source raises. However it ends, no thread is left writing.
    """
    job = _Job(directory, journal, meter, buffer_size)
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(job.write, file): file.name for file in files}
        try:
            return {futures[done]: done.result() for done in as_completed(futures)}
        except BaseException:
            job.stop.set()
            for future in futures:
                future.cancel()
            raise


class _Stopped(Exception):
    """Another worker failed, or the user stopped the run; that one's reason is the one to tell."""


class _Job:
    """What the workers share."""

    def __init__(self, directory: Path, journal: Journal, meter: ProgressMeter, buffer_size: int) -> None:
        self.stop = threading.Event()
        self._directory, self._journal, self._meter, self._buffer_size = directory, journal, meter, buffer_size

    def write(self, file: PlannedFile) -> str:
        """Write one file, or the rest of it; gives its SHA-256."""
        if self.stop.is_set():
            raise _Stopped
        path = self._directory / file.name
        start, digest = recheck(path, self._journal.marks(file.name))
        todo = self._after(file, start)
        with HashingFile(path, position=start, digest=digest) as out:
            marks = [(start, "")]
            for item in todo:
                self._write_item(out, item)
                if out.position - marks[-1][0] >= MARK_BYTES:
                    marks.append((out.position, out.sha256))
                marks = self._record(file.name, marks, out.handed_over)
            out.sync()
            sha256 = out.sha256
            self._record(file.name, [*marks, (out.position, sha256)], out.position)
        return sha256

    def _record(self, name: str, marks: list[tuple[int, str]], handed_over: int) -> list[tuple[int, str]]:
        """Journal the marks of bytes that a kill would leave; gives the last one and those that have to wait."""
        while len(marks) > 1 and marks[1][0] <= handed_over:
            if marks[1][0] > marks[0][0]:
                self._journal.mark(name, *marks[1])
            marks = marks[1:]
        return marks

    def _after(self, file: PlannedFile, start: int) -> list[Item]:
        """The items from byte `start` on; those before count as done."""
        at = 0
        for number, item in enumerate(file.items):
            if at == start:
                return list(file.items[number:])
            at += item.bytes
            self._meter.add(item.data_bytes, found=True)
        if at != start:
            raise ValueError(f"{file.name}: byte {start} is no item's boundary")
        return []

    def _write_item(self, out: HashingFile, item: Item) -> None:
        begin = out.position
        out.write(item.head)
        for piece in stream_blocks(item.blocks, self._buffer_size, item.dtype):
            if self.stop.is_set():
                raise _Stopped
            out.write(piece)
            self._meter.add(len(piece))
        if item.tail:
            out.write(item.tail)
        if out.position - begin != item.bytes:
            raise ValueError(f"{out.path.name}: an item has {out.position - begin} bytes instead of {item.bytes}")
