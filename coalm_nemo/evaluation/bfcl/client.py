"""Our end of the worker: one request, one reply."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from coalm_nemo.errors import UserError

PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "SSL_CERT_FILE")
"""The environment variables that the worker sees: it runs code that a model has a say in, so keys stay out."""


class Worker:
    """A running worker process. Its messages go to `log`."""

    def __init__(self, python: Path, log: Path) -> None:
        self.log = log
        self._root = tempfile.TemporaryDirectory(prefix="coalm-bfcl-")
        environment = {k: os.environ[k] for k in PASSED_ON if k in os.environ}
        environment |= {"BFCL_PROJECT_ROOT": self._root.name, "OPENAI_API_KEY": "unused", "PYTHONUTF8": "1"}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [str(python), "-P", str(Path(__file__).with_name("worker.py"))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=self._root.name, env=environment,
            )  # fmt: skip
        atexit.register(self.close)

    def ask(self, op: str, **request: Any) -> dict[str, Any]:
        """The worker's reply. Raises UserError where it has none: the environment is broken, or the package failed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            last = (self.log.read_text(errors="replace").strip().splitlines() or ["no message"])[-1]
            raise UserError(f"the BFCL package ended without a reply ({last}); its messages are in {self.log}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise UserError(f"the BFCL package failed: {reply['error']}; its messages are in {self.log}")
        return reply

    def close(self) -> None:
        """End the process; may be called twice."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._root.cleanup()
        atexit.unregister(self.close)
