"""Execution of calls by the tools of a user's API-Bank checkout, in a process of its own with a time limit a call.

That runs the checkout's code with the user's rights: it is done only where the user names the checkout. The process gets
no environment but path and home, so no key is in it; it is not a sandbox.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coalm_nemo.errors import UserError
from coalm_nemo.evaluation.apibank.matching import as_text
from coalm_nemo.evaluation.calls import Call

WORKER = Path(__file__).parent / "tool_worker.py"
START_S = 120.0


class ToolRunner:
    """The running tools. Raises UserError where the checkout has none or they cannot be started."""

    def __init__(self, checkout: Path, python: str = sys.executable, timeout_s: float = 20.0) -> None:
        for part in ("apis", "init_database"):
            if not (checkout / part).is_dir():
                raise UserError(
                    f"{checkout} has no {part}/; --option tools= must be an API-Bank checkout with its tools"
                )
        self.checkout, self.python, self.timeout_s = checkout.resolve(), python, timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        # A pipe that nobody reads would fill up and stop them; the file ends with this object.
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self.tools: list[str] = []
        self.broken: dict[str, str] = {}
        """Module -> why it could not be imported."""
        self._start()

    def compare(self, call: Call, gold: Call, recorded: Mapping[str, Any] | None) -> dict[str, Any]:
        """Both calls on fresh databases.

        "correct": the tool's own check of the result against the recorded one; "same": output, exception and databases
        afterwards are those of the gold call; "gold": the gold call passes the tool's check here; "error": in words.
        """
        request = {
            "name": call.name, "arguments": {k: as_text(v) for k, v in call.arguments.items()}, "gold_name": gold.name,
            "gold_arguments": {k: as_text(v) for k, v in gold.arguments.items()}, "recorded": recorded,
        }  # fmt: skip
        failed = {"correct": False, "same": False, "gold": False}
        try:
            return self._ask(json.dumps(request).encode() + b"\n", 2 * self.timeout_s)
        except TimeoutError:
            error = "execution_timeout"
        except OSError:
            error = "the tools' process ended"
        self._restart()
        return failed | {"error": error}

    def _start(self) -> None:
        environment = {k: os.environ[k] for k in ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR") if k in os.environ}
        try:
            self._process = subprocess.Popen(
                [self.python, "-I", "-B", str(WORKER), str(self.checkout)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=self._said, env=environment, cwd=self.checkout,
            )  # fmt: skip
            about = self._ask(b"", START_S)
        except TimeoutError:
            self.close()
            raise UserError(f"the tools in {self.checkout} did not start within {START_S:g} s") from None
        except OSError as e:
            why = self._last_words() or str(e)
            self.close()
            raise UserError(f"the tools in {self.checkout} cannot be started by {self.python} ({why})") from None
        self.tools, self.broken = about["tools"], about["broken"]

    def _restart(self) -> None:
        self.close()
        self._start()

    def _ask(self, line: bytes, timeout_s: float) -> dict[str, Any]:
        """One line there, one line back. Raises TimeoutError, or OSError where the process is gone."""
        assert self._process is not None and self._process.stdin is not None
        if line:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        while b"\n" not in self._buffer:
            self._buffer += self._read(timeout_s)
        reply, _, self._buffer = self._buffer.partition(b"\n")
        return dict(json.loads(reply))

    def _read(self, timeout_s: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        with selectors.DefaultSelector() as ready:
            ready.register(self._process.stdout, selectors.EVENT_READ)
            if not ready.select(timeout_s):
                raise TimeoutError
        chunk = os.read(self._process.stdout.fileno(), 1 << 16)
        if not chunk:
            raise OSError("it ended at once")
        return chunk

    def _last_words(self) -> str:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._said.seek(0)
        said = self._said.read().decode("utf-8", "replace").strip()
        return said.splitlines()[-1][:300] if said else ""

    def close(self) -> None:
        """End the process; safe to call again."""
        process, self._process, self._buffer = self._process, None, b""
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
