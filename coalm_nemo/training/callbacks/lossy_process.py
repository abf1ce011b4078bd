"""A child process that is told things and can never hold up its parent.

Lines go down a pipe that is never waited for. What the pipe does not take is kept, up to a bound, and beyond it the
oldest is dropped. The child may hang, die or leave its machine's disk full: the parent learns of it by asking.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

KEPT_LINES = 50_000
_PIPE_BYTES = 1 << 20


class LossyProcess:
    """Tell it with `tell`, hear it with `heard`. One JSON object a line, both ways."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        """Raises OSError where the child cannot be started or `log`, which takes its standard error, be opened."""
        with log.open("ab") as errors:
            # A session of its own: Ctrl-C and a group's signals are the parent's business.
            self.process = subprocess.Popen(
                command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        self.waiting: deque[bytes] = deque()
        self.half_sent = b""
        self.dropped = 0
        self._half_heard = b""
        for pipe in (self.process.stdin, self.process.stdout):
            os.set_blocking(_number(pipe), False)
        with contextlib.suppress(OSError, AttributeError):  # Linux has it; a user may have used up the allowance
            fcntl.fcntl(_number(self.process.stdin), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    def tell(self, message: dict[str, Any]) -> None:
        """Hand over one message, now or later; never waits."""
        self.waiting.append(json.dumps(message, default=str).encode() + b"\n")
        if len(self.waiting) > KEPT_LINES:
            self.waiting.popleft()
            self.dropped += 1
        self.push()

    def push(self) -> bool:
        """Write what the pipe takes; True when nothing is left to write. A dead child takes everything."""
        pipe = _number(self.process.stdin)
        while self.half_sent or self.waiting:
            line = self.half_sent or self.waiting.popleft()
            try:
                self.half_sent = line[os.write(pipe, line) :]
            except BlockingIOError:
                self.half_sent = line
                return False
            except OSError:
                self.half_sent = b""
                self.waiting.clear()
        return True

    def heard(self) -> list[dict[str, Any]]:
        """What the child has said since."""
        with contextlib.suppress(BlockingIOError, OSError):
            while chunk := os.read(_number(self.process.stdout), 1 << 16):
                self._half_heard += chunk
        *lines, self._half_heard = self._half_heard.split(b"\n")
        return [_parse(line) for line in lines if line.startswith(b"{")]

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self, timeout_s: float) -> bool:
        """Write the rest, let the child end, and end it after `timeout_s`. True if it ended by itself, in order."""
        until = time.monotonic() + timeout_s
        while not self.push() and self.alive and time.monotonic() < until:
            time.sleep(0.02)
        if self.process.stdin is not None:
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(max(0.0, until - time.monotonic())) == 0
        self.kill()
        return False

    def kill(self) -> None:
        """End the child and what it started."""
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5.0)


def _number(pipe: IO[bytes] | None) -> int:
    assert pipe is not None
    return pipe.fileno()


def _parse(line: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        message = json.loads(line)
        if isinstance(message, dict):
            return message
    return {}
