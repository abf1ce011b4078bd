"""Writing a file front to back, hashing on the way, so that a finished file need not be read again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

Progress = Callable[[int, int], None]
"""Called with the bytes of weights done and to do."""

_HASH_APART_BYTES = 1 << 20
_WRITEBACK_BYTES = 64 << 20


class HashingFile:
    """A new file, written sequentially; its SHA-256 is known at the end. Large pieces are hashed in a thread beside.

    With `hashed` False no digest is taken.
    """

    def __init__(self, path: Path, *, hashed: bool = True) -> None:
        self.path = path
        self.position = 0
        self._hashed = hashed
        self._digest = hashlib.sha256()
        self._flushing_from = 0
        self._pending: Future[None] | None = None
        self._pool = ThreadPoolExecutor(1)
        self._file = path.open("xb", buffering=0)

    def __enter__(self) -> HashingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        self._file.close()

    @property
    def sha256(self) -> str:
        """Digest of what was written so far."""
        self._wait()
        return self._digest.hexdigest()

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`, which must not change until the next write has returned. Raises OSError (a full disk, say)."""
        left = memoryview(data)
        if self._hashed:
            self._hash(data)
        while left:
            left = left[self._file.write(left) :]
        self.position += len(data)
        if self.position - self._flushing_from >= _WRITEBACK_BYTES:
            self._start_writeback()

    def _start_writeback(self) -> None:
        """Have the kernel write to disk now; else writes stall, and the fsync at the end waits for everything."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, self._flushing_from, os.POSIX_FADV_DONTNEED)
        self._flushing_from = self.position

    def _hash(self, data: bytes | memoryview) -> None:
        self._wait()
        if len(data) >= _HASH_APART_BYTES:
            self._pending = self._pool.submit(self._digest.update, data)
        else:
            self._digest.update(data)

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None


class ProgressMeter:
    """Adds up the bytes done and tells them on."""

    def __init__(self, total_bytes: int, progress: Progress | None) -> None:
        self.done_bytes = 0
        self.total_bytes = total_bytes
        self._progress = progress

    def add(self, count: int) -> None:
        self.done_bytes += count
        if self._progress:
            self._progress(self.done_bytes, self.total_bytes)
