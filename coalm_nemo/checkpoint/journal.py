"""What an interrupted conversion left to go on with: a directory beside the result, with a journal of what is in it.

    .OUT.partial/  journal.jsonl   first line: what is being made, of what; then a line for each digest taken
                   files/          what becomes OUT by renaming

The journal is only appended to. It need not be ahead of the data nor behind: what it says is checked before it is used.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from coalm_nemo.checkpoint.layout import fsync_path, fsync_tree, refuse_existing, write_errors_told
from coalm_nemo.errors import UserError

Notice = Callable[[str], None]
"""Told in one sentence what the user should know: that a run goes on, or that it starts over and why."""

_JOURNAL_FILE = "journal.jsonl"
_FILES = "files"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""A network file system without locks: two at once are then the user's to avoid."""
_SYNC_SECONDS = 15.0
_SILENT_SECONDS = 3600.0


@dataclass(frozen=True)
class Identity:
    """What a conversion makes of what: only the same can go on with another's files."""

    options: Mapping[str, Any]
    plan: str
    """Digest of the planned files."""
    sources: Mapping[str, list[int]]
    """Size and time of change of each file that is read, by absolute path."""


def source_stamps(paths: Sequence[Path]) -> dict[str, list[int]]:
    """Size and time of change (ns) of files by absolute path. Raises UserError for one that cannot be asked."""
    stamps = {}
    for path in sorted(set(paths)):
        try:
            status = path.stat()
        except OSError as e:
            raise UserError(f"{path} cannot be read ({e.strerror})") from e
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} cannot be read (it is not a regular file)")
        stamps[os.path.abspath(path)] = [status.st_size, status.st_mtime_ns]
    return stamps


def refuse_changed(sources: Mapping[str, list[int]]) -> None:
    """Raises UserError if a file was changed since its stamp was taken: the result would be a mixture."""
    for path, stamp in source_stamps([Path(p) for p in sources]).items():
        if stamp != sources[path]:
            raise UserError(f"{path} was changed while it was read; run the command again")


class Journal:
    """The open journal of one conversion; `mark` may be called from several threads."""

    def __init__(self, fd: int, created: str, marks: dict[str, dict[int, str]]) -> None:
        self.created = created
        """When the conversion began (ISO 8601, UTC): a resumed one says what an uninterrupted one would."""
        self._fd, self._marks = fd, marks
        self._lock = threading.Lock()
        self._synced = time.monotonic()

    def marks(self, file: str) -> Mapping[int, str]:
        """Digests that an earlier run took of the file's first so many bytes."""
        return self._marks.get(file, {})

    def mark(self, file: str, position: int, sha256: str) -> None:
        """Record the digest of a file's first bytes."""
        line = json.dumps({"file": file, "bytes": position, "sha256": sha256}) + "\n"
        with self._lock:
            _append(self._fd, line)
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fdatasync(self._fd)
                self._synced = time.monotonic()


@dataclass(frozen=True)
class Partial:
    """A result in the making."""

    files: Path
    """The directory that becomes the result."""
    journal: Journal
    done: bool
    """The result is in its place already: an earlier run was killed while it tidied up."""


@contextmanager
def resumable_directory(out: Path, identity: Identity, notice: Notice | None = None) -> Iterator[Partial]:
    """Yield a directory beside `out` that becomes `out` if the block ends well; all is made durable before.

    A UserError leaves nothing behind. After any other end (Ctrl-C, a kill) the files stay, and the next call with the
    same `identity` goes on with them; with another it starts over. Raises UserError if `out` is there and not empty,
    if another process is writing it, and for a failure of the file system that is the user's to mend.
    """
    out = Path(os.path.abspath(out))
    home = _home(out)
    with write_errors_told(out):
        refuse_taken(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        fd = _open_locked(home, out)
        try:
            partial = _prepare(fd, home, out, identity, notice or (lambda _: None))
            yield partial
            if not partial.done:
                fsync_tree(partial.files)
                partial.files.rename(out)
                fsync_path(out.parent)
            shutil.rmtree(home)
        except (UserError, OSError):
            shutil.rmtree(home, ignore_errors=True)
            raise
        finally:
            os.close(fd)


def refuse_taken(out: Path) -> None:
    """Raises UserError if `out` is there and not empty, unless a run that was killed while it tidied up put it there."""
    home = _home(out)
    with suppress(OSError):
        home.rmdir()  # if it is empty: the last thing to tidy up
    renamed = (home / _JOURNAL_FILE).is_file() and not (home / _FILES).exists()
    if not (renamed and out.is_dir()):
        refuse_existing(out)


def partial_bytes(out: Path) -> int:
    """Room on the disk that an interrupted run's files take; they are gone on with, or removed."""
    return sum(p.lstat().st_blocks * 512 for p in (_home(out) / _FILES).rglob("*") if p.is_file())


def _home(out: Path) -> Path:
    out = Path(os.path.abspath(out))
    return out.parent / f".{out.name}.partial"


def _open_locked(home: Path, out: Path) -> int:
    """The journal, locked: the lock goes with the process, however it ends. Raises UserError if another has it."""
    while True:
        if home.is_symlink():
            raise UserError(f"{home} is a symbolic link; remove it")
        home.mkdir(exist_ok=True)
        path = home / _JOURNAL_FILE
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            os.close(fd)
            raise UserError(f"another process is writing {out}; wait for it, or stop it first") from e
        except OSError as e:
            if e.errno not in _NO_LOCKS:
                os.close(fd)
                raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        os.close(fd)  # the process that had the lock finished and removed the file meanwhile


def _prepare(fd: int, home: Path, out: Path, identity: Identity, notice: Notice) -> Partial:
    head, marks, whole = _read(fd)
    wanted = json.loads(json.dumps({"options": identity.options, "plan": identity.plan, "sources": identity.sources}))
    files, same = home / _FILES, head.get("identity") == wanted
    if same and not files.exists() and out.is_dir():
        return Partial(out, Journal(fd, head["created"], marks), done=True)
    refuse_existing(out)
    if same and files.is_dir():
        os.ftruncate(fd, whole)
        return Partial(files, Journal(fd, head["created"], marks), done=False)
    if head:
        notice(f"{out}: starting over, as {_what_changed(head.get('identity'), wanted)} since the interrupted run")
    shutil.rmtree(files, ignore_errors=True)
    os.ftruncate(fd, 0)
    files.mkdir()
    created = datetime.now(UTC).isoformat(timespec="seconds")
    _append(fd, json.dumps({"created": created, "identity": wanted}) + "\n")
    os.fsync(fd)
    return Partial(files, Journal(fd, created, {}), done=False)


def _what_changed(before: Any, now: Mapping[str, Any]) -> str:
    if not isinstance(before, dict) or before.get("options") != now["options"]:
        return "the options changed"
    return "the source changed" if before.get("sources") != now["sources"] else "what is to be written changed"


def _read(fd: int) -> tuple[dict[str, Any], dict[str, dict[int, str]], int]:
    """A journal's first line, the marks by file, and how many bytes of it are whole lines that can be read."""
    content = os.pread(fd, os.fstat(fd).st_size, 0)
    head: dict[str, Any] = {}
    marks: dict[str, dict[int, str]] = {}
    whole = 0
    for line in content.splitlines(keepends=True):
        try:
            entry = json.loads(line) if line.endswith(b"\n") else None
            if not head:
                head = {"identity": entry["identity"], "created": str(entry["created"])}  # type: ignore[index]
            else:
                marks.setdefault(entry["file"], {})[int(entry["bytes"])] = entry["sha256"]  # type: ignore[index]
        except (ValueError, TypeError, KeyError):
            break  # torn by a kill
        whole += len(line)
    return head, marks, whole


def _append(fd: int, line: str) -> None:
    left = line.encode()
    while left:
        left = left[os.write(fd, left) :]


def _remove_abandoned(out: Path) -> None:
    """Remove what earlier versions' killed processes left. On a shared disk such a process may run elsewhere: one that
    wrote within the hour is left alone."""
    for path in out.parent.glob(f".{out.name}.partial-*"):
        number = path.name.rpartition("-")[2]
        if number.isdecimal() and path.is_dir() and not path.is_symlink() and not _runs(int(number)):
            newest = max((p.lstat().st_mtime for p in (path, *path.rglob("*"))), default=0.0)
            if time.time() - newest > _SILENT_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
