"""Reading and writing large files past the page cache, where the file system can: a conversion touches each byte once.

Copying through the page cache costs a core more than the hashing does, and pushes out what others use of it.
"""

from __future__ import annotations

import fcntl
import mmap
import os

ALIGNMENT_BYTES = 4096
"""Of offsets, lengths and memory; what every common disk and file system is content with."""

_DIRECT = getattr(os, "O_DIRECT", 0)
_NO_WAIT = getattr(os, "RWF_NOWAIT", 0)


def aligned_buffer(size: int) -> memoryview:
    """Memory that starts at a page."""
    return memoryview(mmap.mmap(-1, size))


def floor(position: int) -> int:
    return position // ALIGNMENT_BYTES * ALIGNMENT_BYTES


def ceiling(position: int) -> int:
    return floor(position + ALIGNMENT_BYTES - 1)


def set_direct(fd: int, on: bool) -> bool:
    """Have what is read and written by `fd` pass by the page cache, or not; gives whether it now does."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | _DIRECT if on else flags & ~_DIRECT)
    except OSError:
        return False
    return on and bool(_DIRECT)


def is_cached(fd: int) -> bool:
    """Whether a file seems to be in the page cache (two bytes of it are); True where the system cannot tell.

    Asking makes the kernel read ahead there, so it is asked once a file.
    """
    size = os.fstat(fd).st_size
    try:
        return all(os.preadv(fd, [bytearray(1)], size * part // 4, _NO_WAIT) for part in (1, 3)) if _NO_WAIT else True
    except BlockingIOError:
        return False
    except OSError:
        return True


def read_direct(fd: int, offset: int, out: memoryview, stage: memoryview) -> bool:
    """Fill `out` from byte `offset` on through `stage`, aligned memory of `out`'s length and two alignments more.

    False where that is not possible, be it the file system or the file's end; the ordinary way tells which.
    """
    begin, needed = floor(offset), offset + len(out)
    end, at = ceiling(needed), begin
    while at < needed:
        try:
            count = os.preadv(fd, [stage[at - begin : end - begin]], at)
        except OSError:
            return False
        at += count
        if count == 0 or (count % ALIGNMENT_BYTES and at < needed):
            return False
    out[:] = stage[offset - begin : needed - begin]
    return True
