"""A checkpoint directory: how it is laid out, sealed with checksums, and made whole or not at all.

    CKPT/  .metadata common.pt metadata.json __*.distcp   the weights, as megatron-core reads them
           hf/             config.json, tokenizer, chat template: what an export needs besides weights
           coalm.json      what this checkpoint is
           manifest.json   bytes and SHA-256 of every other file, written last

Knows nothing of torch, Megatron or Llama.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from coalm_nemo.errors import UserError

HF_SUBDIR = "hf"
INFO_FILE = "coalm.json"
MANIFEST_FILE = "manifest.json"
HF_MANIFEST_FILE = "coalm_manifest.json"
"""The same for a Hugging Face directory, under a name that no loader asks for."""
FORMAT = 1
_HASH_BUFFER_BYTES = 8 << 20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_USERS_TO_MEND = (*_NO_ROOM, errno.EIO, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)


@dataclass(frozen=True)
class CheckpointInfo:
    """What `coalm.json` says."""

    kind: str
    """"base" (imported weights) or "training" (with optimizer state)."""
    step: int
    dtype: str
    """Dtype of the model weights: "float32", "bfloat16" or "float16"; "mixed" where tensors differ."""
    source: str
    coalm_version: str = ""
    created: str = ""
    """ISO 8601, UTC."""
    consumed_items: int = 0
    """Training only: rows (packs) seen since the start of the run."""
    data_fingerprint: str = ""
    """Training only: which data they were."""
    format: int = FORMAT


def write_info(directory: Path, info: CheckpointInfo) -> None:
    """Write `coalm.json`; the version and the time are filled in where empty."""
    from coalm_nemo import __version__

    fields = asdict(info)
    fields["coalm_version"] = info.coalm_version or __version__
    fields["created"] = info.created or datetime.now(UTC).isoformat(timespec="seconds")
    (directory / INFO_FILE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def read_info(directory: Path) -> CheckpointInfo:
    """Read `coalm.json`. Raises UserError if it is missing, is not valid, or is of a later format."""
    raw = _read_json_object(directory / INFO_FILE)
    if raw.get("format") != FORMAT:
        raise UserError(f"{directory / INFO_FILE} is of format {raw.get('format')!r}; this version reads {FORMAT}")
    try:
        return CheckpointInfo(**{k: raw[k] for k in CheckpointInfo.__dataclass_fields__ if k in raw})
    except TypeError as e:
        raise UserError(f"{directory / INFO_FILE} is not complete ({e})") from e


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} cannot be read (it is not a regular file)")  # a pipe would be waited for
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UserError(f"{path} is missing; {path.parent} is not a complete coalm checkpoint") from e
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e})") from e
    if not isinstance(raw, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return raw


def write_manifest(
    directory: Path, known_sha256: Mapping[str, str] | None = None, *, file: str = MANIFEST_FILE
) -> None:
    """Write the manifest `file` over all other files of `directory`, and make it durable.

    `known_sha256` maps relative paths to digests that the writer took while writing; other files are read once more.
    """
    partial = directory / f".{file}.partial"
    partial.unlink(missing_ok=True)  # of a process that was killed
    paths = [p for p in sorted(directory.rglob("*")) if p.is_file() and p != directory / file]
    names = [p.relative_to(directory).as_posix() for p in paths]
    known = known_sha256 or {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(lambda pair: known.get(pair[1]) or sha256_of(pair[0]), zip(paths, names, strict=True)))
    files = {n: {"bytes": p.stat().st_size, "sha256": d} for n, p, d in zip(names, paths, digests, strict=True)}
    partial.write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")
    fsync_path(partial)
    partial.rename(directory / file)
    fsync_path(directory)


def check_manifest(directory: Path, *, full: bool, share: tuple[int, int] = (0, 1), file: str = MANIFEST_FILE) -> None:
    """Compare the files with the manifest `file`: existence and size, and with `full` the SHA-256 too.

    `share` (i, n) hashes every n-th file from the i-th: n ranks together check them all.
    Raises UserError naming the first file that is missing, torn or corrupt. Files that it does not list are ignored.
    """
    entries = read_manifest(directory, file)
    for name in entries:
        if problem := _wrong_size(directory, name, entries[name], file):
            raise UserError(problem)
    mine = list(entries)[share[0] :: share[1]] if full else []
    for problem in _wrong_digests(directory, {name: entries[name] for name in mine}, file):
        raise UserError(problem)


def manifest_problems(
    directory: Path, *, file: str = MANIFEST_FILE, progress: Callable[[int, int], None] | None = None
) -> list[str]:
    """A sentence on every file that is missing, torn or corrupt against the manifest `file`, checksums included."""
    entries = read_manifest(directory, file)
    wrong = {name: _wrong_size(directory, name, entry, file) for name, entry in entries.items()}
    sound = {name: entries[name] for name, problem in wrong.items() if problem is None}
    return [p for p in wrong.values() if p] + list(_wrong_digests(directory, sound, file, progress))


def _wrong_size(directory: Path, name: str, entry: Mapping[str, Any], manifest: str) -> str | None:
    path = directory / name
    if not path.is_file():
        return f"{path} is missing, though {manifest} lists it; the checkpoint is not complete"
    if path.stat().st_size != entry["bytes"]:
        return f"{path} has {path.stat().st_size} bytes instead of {entry['bytes']}; the file is torn"
    return None


def _wrong_digests(
    directory: Path,
    entries: Mapping[str, Mapping[str, Any]],
    manifest: str,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[str]:
    """Sentences on the files whose SHA-256 is another; several are hashed side by side, in bounded memory."""
    total, done = sum(entry["bytes"] for entry in entries.values()), 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        problems = pool.map(lambda n: _wrong_digest(directory / n, entries[n]["sha256"], manifest), entries)
        for name, problem in zip(entries, problems, strict=True):
            done += entries[name]["bytes"]
            if progress:
                progress(done, total)
            if problem:
                yield problem


def _wrong_digest(path: Path, sha256: str, manifest: str) -> str | None:
    try:
        if sha256_of(path) == sha256:
            return None
    except OSError as e:
        return f"{path} cannot be read ({e.strerror})"
    return f"{path} is corrupt: its SHA-256 is not the one in {manifest}"


def read_manifest(directory: Path, file: str = MANIFEST_FILE) -> dict[str, dict[str, Any]]:
    """The manifest's entries by relative path. Raises UserError where it is missing, malformed or points outside."""
    path = directory / file
    files = _read_json_object(path).get("files")
    if not isinstance(files, dict):
        raise UserError(f"{path} lists no files")
    for name, entry in files.items():
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts:
            raise UserError(f"{path} names {name!r}, which is outside the checkpoint")
        if not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int) or "sha256" not in entry:
            raise UserError(f"{path}: the entry of {name!r} needs 'bytes' and 'sha256'")
    return files


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in bounded pieces."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(_HASH_BUFFER_BYTES, max(1, path.stat().st_size))))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


@contextmanager
def atomic_directory(out: Path) -> Iterator[Path]:
    """Yield an empty directory beside `out` that becomes `out` if the block ends well, and is removed if it does not.

    Everything in it is made durable before the rename. Raises UserError if `out` is there and not empty, and for a full
    disk or another failure of the file system that is the user's to mend.
    """
    out = Path(os.path.abspath(out))
    refuse_existing(out)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        with write_errors_told(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)  # an earlier process had this number; it is gone
            partial.mkdir()
            yield partial
            fsync_tree(partial)
            partial.rename(out)
            fsync_path(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def write_errors_told(out: Path) -> Iterator[None]:
    """Turn a failure of the file system that is the user's to mend into a UserError about `out`."""
    try:
        yield
    except OSError as e:
        if e.errno not in (None, *_USERS_TO_MEND, errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        # NumPy reports a short write without saying why.
        why = "the disk is full" if e.errno in _NO_ROOM else (e.strerror or f"a write was cut short ({e})").lower()
        raise UserError(f"{out} could not be written: {why}; nothing was left behind") from e


def refuse_existing(out: Path) -> None:
    """Raises UserError if `out` exists and is not an empty directory."""
    if out.is_dir() and not out.is_symlink():
        if any(out.iterdir()):
            raise UserError(f"{out} exists and is not empty; remove it or choose another directory")
    elif out.exists() or out.is_symlink():
        raise UserError(f"{out} exists and is not a directory; choose another path")


def ensure_free_space(directory: Path, needed_bytes: int) -> None:
    """Raises UserError if the file system of `directory` (or of its nearest existing parent) lacks room."""
    where = Path(os.path.abspath(directory))
    while not where.exists():
        where = where.parent
    free = shutil.disk_usage(where).free
    if free < needed_bytes:
        raise UserError(f"{where} has {_readable(free)} free; {_readable(needed_bytes)} are needed")


def _readable(count: int) -> str:
    """204800 -> `205 kB`."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (1000, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count} bytes"


def fsync_tree(directory: Path) -> None:
    """Make every file and directory below `directory`, and itself, durable."""
    for path in (*directory.rglob("*"), directory):
        fsync_path(path)


def fsync_path(path: Path) -> None:
    """Make one file's or directory's content durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
