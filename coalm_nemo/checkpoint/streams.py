"""Writing a file front to back, hashing on the way, so that a finished file need not be read again."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from coalm_nemo.checkpoint.direct_io import aligned_buffer, floor, set_direct

Progress = Callable[[int, int], None]
"""Called with the bytes of weights done and to do."""

STAGE_BYTES = 8 << 20
"""Size of a write."""

_HASH_APART_BYTES = 1 << 20
_WRITEBACK_BYTES = 64 << 20
_READ_BYTES = 4 << 20


class HashingFile:
    """A file written sequentially; its SHA-256 is known at the end.

    What is written is gathered in two buffers that take turns. Full ones are written in a thread beside, past the page
    cache where possible; large pieces are hashed in another, while the caller reads the next one. All three release
    the interpreter, so two cores are used. With `hashed` False no digest is taken. With `position` the file is gone on
    with from there (what lies beyond is cut off), `digest` being that of the bytes before.
    """

    def __init__(self, path: Path, *, hashed: bool = True, position: int = 0, digest: Any = None) -> None:
        self.path = path
        self.position = position
        self.handed_over = position
        """Bytes that the operating system has: what is left of the file if this process is killed."""
        self._digest = (digest or hashlib.sha256()) if hashed else None
        self._stage, self._other = aligned_buffer(STAGE_BYTES), aligned_buffer(STAGE_BYTES)
        self._hashing: Future[None] | None = None
        self._writing: Future[None] | None = None
        self._flushing_from = floor(position)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        self._filled = os.preadv(self._fd, [self._stage[: position - floor(position)]], floor(position))
        os.ftruncate(self._fd, position)
        os.lseek(self._fd, floor(position), os.SEEK_SET)
        self._direct = set_direct(self._fd, True)
        self._pool = ThreadPoolExecutor(2)

    def __enter__(self) -> HashingFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.flush()  # a write that failed beside must not pass unseen
        finally:
            self._pool.shutdown()
            os.close(self._fd)

    @property
    def sha256(self) -> str:
        """Digest of what was written so far."""
        self._wait_for_hash()
        assert self._digest is not None
        return str(self._digest.copy().hexdigest())

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`, which must not change until the next write has returned.

        Raises OSError (a full disk, say), perhaps only at a later call.
        """
        self._wait_for_hash()
        if self._digest is not None and len(data) >= _HASH_APART_BYTES:
            self._hashing = self._pool.submit(self._digest.update, data)
        elif self._digest is not None:
            self._digest.update(data)
        left = memoryview(data)
        while left:
            count = min(len(left), len(self._stage) - self._filled)
            self._stage[self._filled : self._filled + count] = left[:count]
            self._filled += count
            left = left[count:]
            if self._filled == len(self._stage):
                self._hand_over(self._stage)
        self.position += len(data)

    def flush(self) -> None:
        """Hand everything over to the operating system."""
        rest = self._stage[: self._filled]
        if self._direct:
            whole = floor(len(rest))
            self._hand_over(rest[:whole])
            self._wait_for_write()
            self._direct = set_direct(self._fd, False)  # the file's end is no whole block, nor what comes after it
            rest = rest[whole:]
        self._hand_over(rest)
        self._wait_for_write()

    def sync(self) -> None:
        """Wait until everything written is on the disk."""
        self.flush()
        os.fsync(self._fd)

    def _hand_over(self, full: memoryview) -> None:
        self._wait_for_write()
        self._writing = self._pool.submit(self._append, full)
        self._stage, self._other, self._filled = self._other, self._stage, 0

    def _append(self, left: memoryview) -> None:
        while left:
            try:
                left = left[os.write(self._fd, left) :]
            except OSError as e:
                if e.errno != errno.EINVAL or not self._direct:
                    raise
                self._direct = set_direct(self._fd, False)  # said it could, and cannot
        self.handed_over = os.lseek(self._fd, 0, os.SEEK_CUR)
        if not self._direct and self.handed_over - self._flushing_from >= _WRITEBACK_BYTES:
            # Have the kernel write to disk now; else writes stall, and the fsync at the end waits for everything.
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._fd, self._flushing_from, 0, os.POSIX_FADV_DONTNEED)
            self._flushing_from = self.handed_over

    def _wait_for_write(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _wait_for_hash(self) -> None:
        if self._hashing is not None:
            self._hashing.result()
            self._hashing = None


def recheck(path: Path, marks: Mapping[int, str]) -> tuple[int, Any]:
    """How far a file of an earlier run is still what was recorded, and the running SHA-256 up to there.

    `marks` gives the digest of the file's first N bytes for some N. The file is read up to the first that is not so.
    """
    running = hashlib.sha256()
    sound, at = running.copy(), 0
    with suppress(OSError), path.open("rb", buffering=0) as file:
        for end in sorted(marks):
            if not _read_to(file, end - file.tell(), running) or running.hexdigest() != marks[end]:
                break
            sound, at = running.copy(), end
    return at, sound


def _read_to(file: Any, count: int, digest: Any) -> bool:
    """Hash the next `count` bytes; False if the file ends before."""
    buffer = memoryview(bytearray(min(count, _READ_BYTES)))
    while count:
        got = file.readinto(buffer[: min(count, len(buffer))])
        if not got:
            return False
        digest.update(buffer[:got])
        count -= got
    return True


class ProgressMeter:
    """Adds up the bytes done, by whatever thread, and tells them on."""

    def __init__(self, total_bytes: int, progress: Progress | None) -> None:
        self.done_bytes = 0
        self.found_bytes = 0
        """Of those done, the bytes that an interrupted run had written."""
        self.total_bytes = total_bytes
        self._progress = progress
        self._lock = threading.Lock()

    def add(self, count: int, *, found: bool = False) -> None:
        with self._lock:
            self.done_bytes += count
            self.found_bytes += count if found else 0
            if self._progress:
                self._progress(self.done_bytes, self.total_bytes)
