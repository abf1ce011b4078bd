"""Answers of the writer and what a build has spent on them, in one SQLite file that all worker processes share."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coalm_nemo.errors import UserError

BUSY_S = 60.0
_TABLES = """
CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS builds (
    build TEXT PRIMARY KEY, requests INTEGER NOT NULL, tokens INTEGER NOT NULL, reached INTEGER NOT NULL
) WITHOUT ROWID;
"""


def default_cache_file() -> Path:
    """Below the user's cache directory, so that an answer that was paid for outlives the checkout."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coalm_nemo" / "writer.sqlite"


class WriterCache:
    """One connection a process, used by all of its threads in turn; every statement is a transaction of its own.

    The file must lie on a disk of this machine: WAL does not work over network file systems (sqlite.org/wal.html).
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._process = 0

    def answer(self, key: str) -> str | None:
        rows = self._run("SELECT answer FROM answers WHERE key = ?", (key,))
        return str(rows[0][0]) if rows else None

    def keep(self, key: str, answer: str) -> str:
        """The answer that stands: where another worker was first, its answer, or the next build would differ."""
        self._run("INSERT OR IGNORE INTO answers VALUES (?, ?)", (key, answer))
        return self.answer(key) or answer

    def reserve(self, build: str, requests: int, tokens: int) -> bool:
        """Count one more request of a build, unless its budget (0: none) is used up."""
        self._run("INSERT OR IGNORE INTO builds VALUES (?, 0, 0, 0)", (build,))
        limits = "(? = 0 OR requests < ?) AND (? = 0 OR tokens < ?)"
        sql = f"UPDATE builds SET requests = requests + 1 WHERE build = ? AND {limits} RETURNING requests"
        return bool(self._run(sql, (build, requests, requests, tokens, tokens)))

    def spend(self, build: str, tokens: int) -> None:
        """Note a proper answer and what it cost."""
        self._run("UPDATE builds SET tokens = tokens + ?, reached = 1 WHERE build = ?", (tokens, build))

    def reached(self, build: str) -> bool:
        """Whether any worker of the build has had a proper answer."""
        return bool(self._run("SELECT 1 FROM builds WHERE build = ? AND reached", (build,)))

    def _run(self, sql: str, values: Sequence[Any]) -> list[Any]:
        with self._lock:
            try:
                return self._open().execute(sql, values).fetchall()
            except sqlite3.Error as e:
                raise UserError(
                    f"the writer's cache {self.file} cannot be used ({e}); give another file as writer_cache"
                ) from e

    def _open(self) -> sqlite3.Connection:
        """A forked process must not use its parent's connection (sqlite.org/howtocorrupt.html, section 2.6)."""
        if self._connection is None or self._process != os.getpid():
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise UserError(f"the writer's cache directory {self.file.parent} cannot be made ({e.strerror})") from e
            self._connection, self._process = _connect(self.file), os.getpid()
        return self._connection


def _connect(file: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(file, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    end = time.monotonic() + BUSY_S
    while True:
        try:  # changing to WAL does not wait for others as statements do
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.executescript(_TABLES)
            return connection
        except sqlite3.OperationalError as e:
            if "locked" not in str(e) or time.monotonic() > end:
                connection.close()
                raise
            time.sleep(0.05)
