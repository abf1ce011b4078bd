"""The safetensors format: an 8-byte length, a JSON header, then the tensors' bytes. No torch.

Format: https://github.com/huggingface/safetensors#format. Headers are checked here rather than by the library so that
each fault gets its own sentence, and so that only byte ranges are read afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from coalm_nemo.checkpoint.rows import DTYPE_BYTES, FileReader, FileRows
from coalm_nemo.errors import UserError

DTYPE_OF_CODE = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}
_LARGEST_HEADER_BYTES = 100 << 20  # the safetensors library's own limit
_HEADER_ALIGNMENT_BYTES = 8


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file."""

    path: Path
    name: str
    code: str
    """Dtype in safetensors' terms."""
    shape: tuple[int, ...]
    offset: int
    bytes: int

    @property
    def dtype(self) -> str:
        """Dtype by torch's name. Raises UserError for a dtype that is not converted."""
        if self.code not in DTYPE_OF_CODE:
            raise UserError(
                f"{self.path}: {self.name} is of dtype {self.code}; only F32, BF16 and F16 weights are supported"
            )
        return DTYPE_OF_CODE[self.code]

    @property
    def rows(self) -> int:
        return self.shape[0] if len(self.shape) == 2 else 1

    def open(self, reader: FileReader) -> FileRows:
        """The tensor as rows; a vector is one row."""
        return FileRows(reader, self.path, self.offset, self.dtype, self.bytes // self.rows)


def read_header(path: Path, reader: FileReader) -> dict[str, StoredTensor]:
    """Tensors of a safetensors file by name.

    Raises UserError if the header is not valid, names a tensor twice, or does not fit the size of the file.
    """
    size = path.stat().st_size
    length = int.from_bytes(reader.read(path, 0, 8), "little") if size >= 8 else -1
    if not 2 <= length <= min(size - 8, _LARGEST_HEADER_BYTES):
        raise UserError(f"{path} is not a safetensors file, or is cut off within its header ({size} bytes)")
    try:
        pairs = json.loads(reader.read(path, 8, length), object_pairs_hook=unique_keys)
    except ValueError as e:
        raise UserError(f"{path}: the safetensors header is not valid ({e})") from e
    if not isinstance(pairs, dict):
        raise UserError(f"{path}: the safetensors header is not a JSON object")
    start = 8 + length
    found = {n: _stored(path, n, entry, start, size) for n, entry in pairs.items() if n != "__metadata__"}
    if (end := max((t.offset + t.bytes for t in found.values()), default=start)) != size:
        raise UserError(f"{path} has {size} bytes, but its header describes {end}; it is damaged")
    return found


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} occurs twice")
    return result


def _stored(path: Path, name: str, entry: Any, start: int, file_bytes: int) -> StoredTensor:
    try:
        code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        valid = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)) and begin <= end
    except (TypeError, KeyError, ValueError):
        valid = False
    if not valid:
        raise UserError(f"{path}: the safetensors header's entry of {name} is not valid")
    if start + end > file_bytes:
        raise UserError(f"{path} is cut off: {name} should end at byte {start + end}, but the file has {file_bytes}")
    if code in DTYPE_OF_CODE and end - begin != prod(shape) * DTYPE_BYTES[DTYPE_OF_CODE[code]]:
        raise UserError(f"{path}: {name} has {end - begin} bytes, which does not fit its shape {list(shape)} in {code}")
    return StoredTensor(path, name, code, shape, start + begin, end - begin)


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that is to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


def header_bytes(tensors: Sequence[PlannedTensor]) -> bytes:
    """The file's first bytes, for `tensors` one after another in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        offsets = [at, at + tensor.bytes]
        header[tensor.name] = {"dtype": CODE_OF_DTYPE[tensor.dtype], "shape": tensor.shape, "data_offsets": offsets}
        at += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % _HEADER_ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text


def plan_shards(tensors: Sequence[PlannedTensor], max_shard_bytes: int) -> dict[str, list[PlannedTensor]]:
    """Files by name, filled in order up to `max_shard_bytes` each; a larger tensor has a file to itself.

    Within a file wider elements come first, which keeps every tensor aligned to its element size.
    """
    shards: list[list[PlannedTensor]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.bytes
    for shard in shards:
        shard.sort(key=lambda t: -DTYPE_BYTES[t.dtype])
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}
