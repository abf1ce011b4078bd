"""Files written and read past the page cache have the bytes that they should, at any offset and in any pieces."""

from __future__ import annotations

import errno
import hashlib
import os
import random
from pathlib import Path

import pytest
from helpers import refused

from coalm_nemo.checkpoint import direct_io, rows, streams
from coalm_nemo.checkpoint.rows import FileReader
from coalm_nemo.checkpoint.streams import HashingFile, recheck

CONTENT = random.Random(0).randbytes(3_000_000)
SIZES = (1, 4095, 4096, 70_000, 1_200_000, 300_000)


@pytest.fixture(autouse=True, params=["direct", "through the cache"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As the file system lets us, and as on one that cannot pass by the page cache."""
    monkeypatch.setattr(streams, "STAGE_BYTES", 64 << 10)
    if request.param != "direct":
        for module in (streams, rows):
            monkeypatch.setattr(module, "set_direct", lambda fd, on: False)
    return str(request.param)


def append(file: HashingFile, begin: int, end: int) -> None:
    """In pieces of all sizes."""
    number = 0
    while begin < end:
        size = min(SIZES[number % len(SIZES)], end - begin)
        file.write(memoryview(CONTENT)[begin : begin + size])
        begin, number = begin + size, number + 1


def test_what_is_written_is_in_the_file(tmp_path: Path) -> None:
    with HashingFile(tmp_path / "file") as file:
        append(file, 0, 1_000_001)
        assert file.sha256 == hashlib.sha256(CONTENT[:1_000_001]).hexdigest()
        assert file.handed_over <= 1_000_001
        file.sync()
        assert (tmp_path / "file").read_bytes() == CONTENT[:1_000_001]
        append(file, 1_000_001, len(CONTENT))
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("at", [0, 1, 4096, 100_000, 2_999_999, 3_000_000])
def test_an_interrupted_file_is_gone_on_with(tmp_path: Path, at: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT[:at] + b"what a kill left")
    start, digest = recheck(path, {at: hashlib.sha256(CONTENT[:at]).hexdigest()})
    assert start == at
    with HashingFile(path, position=at, digest=digest) as file:
        append(file, at, len(CONTENT))
        assert file.sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert path.read_bytes() == CONTENT


def test_only_what_is_as_recorded_counts(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    marks = {n: hashlib.sha256(CONTENT[:n]).hexdigest() for n in (1000, 2000)} | {3000: "another"}
    assert recheck(path, marks)[0] == 2000
    assert recheck(tmp_path / "nothing", marks)[0] == 0


def test_a_write_that_fails_beside_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(streams.os, "write", full)
    with pytest.raises(OSError, match="No space"), HashingFile(tmp_path / "file") as file:
        file.write(CONTENT[:200_000])


@pytest.mark.parametrize("offset", [0, 1, 4096, 123_457])
@pytest.mark.parametrize("count", [300_000, 1_000_000])
def test_reading_past_the_cache(tmp_path: Path, offset: int, count: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    out = bytearray(count)
    with FileReader() as reader:
        reader.read_into(path, offset, memoryview(out))
        assert out == CONTENT[offset : offset + count]
        tail = bytearray(300_000)
        reader.read_into(path, len(CONTENT) - len(tail), memoryview(tail))
        assert tail == CONTENT[-len(tail) :]
        with refused("ends at byte 3000000"):
            reader.read_into(path, len(CONTENT) - 1000, memoryview(bytearray(300_000)))


def test_rounding() -> None:
    assert [direct_io.floor(n) for n in (0, 4095, 4096)] == [0, 0, 4096]
    assert [direct_io.ceiling(n) for n in (0, 1, 4096, 4097)] == [0, 4096, 4096, 8192]
