"""A file of JSON lines that a run appends to. A full disk does not end the run, and leaves no half of a line behind."""

from __future__ import annotations

import contextlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

KEPT_LINES = 100_000
"""Lines held in memory while the disk takes none; then the oldest are lost."""


def to_stderr(sentence: str) -> None:
    """For who has no console at hand."""
    import sys

    print(f"warning: {sentence}", file=sys.stderr)


class LineFile:
    """Each line is written at once; what the disk refuses is written with the next line that it takes."""

    def __init__(self, path: Path, warn: Callable[[str], None] = to_stderr) -> None:
        """Raises OSError where `path` cannot be opened."""
        self.path = Path(path)
        self.warn = warn
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.waiting: deque[bytes] = deque(maxlen=KEPT_LINES)
        self.refused = False
        self.number = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        self.size = _whole_lines(self.number)

    def write(self, line: dict[str, Any]) -> None:
        """Append one line, and those still waiting. The first refusal, and its end, are said."""
        self.waiting.append(json.dumps(line).encode() + b"\n")
        try:
            while self.waiting:
                self._append(self.waiting[0])
                self.waiting.popleft()
        except OSError as e:
            if not self.refused:
                self.warn(
                    f"{self.path} cannot be written ({e.strerror}); the run goes on, and keeps its lines for later"
                )
            self.refused = True
            return
        if self.refused:
            self.warn(f"{self.path} is written again; nothing is missing")
            self.refused = False

    def _append(self, data: bytes) -> None:
        written = os.pwrite(self.number, data, self.size)
        if written < len(data):  # the disk took a part: the next try writes the rest or says why not
            with contextlib.suppress(OSError):
                written += os.pwrite(self.number, data[written:], self.size + written)
        if written < len(data):
            os.ftruncate(self.number, self.size)
            raise OSError(28, os.strerror(28))
        self.size += written

    def close(self) -> None:
        os.close(self.number)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines; a torn line (the writer was killed, or is writing it now) is passed over."""
    if not Path(path).is_file():
        return
    with Path(path).open("rb") as file:
        yield from _objects(file)


def last_lines(path: Path, size: int = 1 << 16) -> list[dict[str, Any]]:
    """The objects within the last `size` bytes."""
    if not Path(path).is_file():
        return []
    with Path(path).open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - size))
        return list(_objects(file))


def _objects(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):
                yield found


def _whole_lines(number: int) -> int:
    """Bytes up to the last line feed; the rest, a torn line, is cut off."""
    size = end = os.fstat(number).st_size
    while end:
        start = max(0, end - (1 << 16))
        at = os.pread(number, end - start, start).rfind(b"\n")
        if at >= 0:
            end = start + at + 1
            break
        end = start
    if end < size:
        os.ftruncate(number, end)
    return end
