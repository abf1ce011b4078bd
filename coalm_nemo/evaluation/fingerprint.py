"""What tells one Hugging Face directory from another: a hash of everything that its answers depend on.

All bytes are hashed, not headers and samples: two checkpoints of one run agree in every header and may differ in a single
tensor, and a kept answer of the wrong checkpoint would be a wrong score that nobody notices. BLAKE2b reads about 1 GB/s a
core, several files side by side, from pages that loading the model needs anyway; a file's hash is kept by path, size,
modification and change time, so that it is paid once.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from coalm_nemo.errors import UserError

PATTERNS = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.json", "config.json",
    "generation_config.json", "tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template*", "additional_chat_templates/*",
)  # fmt: skip
CHUNK_BYTES = 8 << 20


def cache_directory() -> Path:
    """The project's place below the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coalm_nemo"


def default_hash_file() -> Path:
    """Where hashes of files are kept."""
    return cache_directory() / "file_hashes.json"


def model_files(hf_dir: Path) -> list[Path]:
    """The files that decide what the model answers, by name."""
    return sorted({f for pattern in PATTERNS for f in Path(hf_dir).glob(pattern) if f.is_file()})


def directory_fingerprint(hf_dir: Path, kept: Path | None = None) -> str:
    """32 hexadecimal digits. Raises UserError where the directory holds no model files or one cannot be read."""
    files = model_files(hf_dir)
    if not files:
        raise UserError(f"{hf_dir} holds no model files; --model is a Hugging Face directory")
    kept = kept or default_hash_file()
    known = _read(kept)
    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            hashes = list(pool.map(lambda f: _hash_of(f, known), files))
    except OSError as e:
        raise UserError(f"{e.filename} cannot be read ({e.strerror})") from e
    _write(kept, known)
    together = hashlib.blake2b(digest_size=16)
    for file, digest in zip(files, hashes, strict=True):
        together.update(f"{file.relative_to(hf_dir).as_posix()}\0{digest}\n".encode())
    return together.hexdigest()


def _hash_of(file: Path, known: dict[str, str]) -> str:
    status = file.stat()
    key = f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}"
    if key not in known:
        known[key] = _hash(file)
    return known[key]


def _hash(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb", buffering=0) as content:
        while chunk := content.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _read(kept: Path) -> dict[str, str]:
    """An unreadable file of hashes costs time, never a wrong hash."""
    try:
        known = json.loads(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(k): str(v) for k, v in known.items()} if isinstance(known, dict) else {}


def _write(kept: Path, known: dict[str, str]) -> None:
    """Kept as far as it can be: a read-only home directory must not stop an evaluation."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_name(f"{kept.name}.partial{os.getpid()}")
        partial.write_text(json.dumps(known, indent=0), encoding="utf-8")
        partial.replace(kept)
    except OSError:
        return
