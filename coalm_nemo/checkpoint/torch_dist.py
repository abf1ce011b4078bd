"""Megatron's distributed checkpoint (`torch_dist`) as byte ranges: no torch, no Megatron, no process group.

The format is the one of torch.distributed.checkpoint as megatron-core 0.16.1 uses it: `.metadata` lists keys, global
shapes, and for every chunk its place in a `.distcp` file; each chunk is a zip of its own (torch_zip.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from coalm_nemo.checkpoint import torch_pickle, torch_zip
from coalm_nemo.checkpoint.planned_files import Item, PlannedFile
from coalm_nemo.checkpoint.rows import DTYPE_BYTES, RowBlock
from coalm_nemo.checkpoint.torch_pickle import Call, Name, Record
from coalm_nemo.errors import UserError

METADATA_FILE = ".metadata"
COMMON_FILE = "common.pt"
BACKEND_FILE = "metadata.json"
BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
MAX_CHUNK_BYTES = 256 << 20
"""A loading rank reads whole chunks, whatever part it needs; under 4 GiB no zip64 is needed either."""
MAX_FILE_BYTES = 4 << 30
"""Files are written side by side, so there should be several."""
EMPTY_STATE = [None]
"""What megatron-core stores for a module whose extra state is None."""


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and the item of a file that holds it. Offsets and sizes in elements, one for each axis."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    item_offset: int
    item_bytes: int


@dataclass(frozen=True)
class StoredKey:
    """A tensor of the checkpoint: its global shape and the chunks that tile it."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


def read_metadata(directory: Path) -> dict[str, StoredKey]:
    """The checkpoint's tensors by key, optimizer and other entries included.

    Raises UserError if this is no torch_dist checkpoint or its metadata is damaged, untrusted, or points outside.
    """
    path = directory / METADATA_FILE
    _check_backend(directory)
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} cannot be read (it is not a regular file)")  # a pipe would be waited for
        raw = torch_pickle.loads(path.read_bytes(), str(path))
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}); {directory} is not a complete checkpoint") from e
    try:
        places = _places(raw.storage_data)
        return {
            key: _stored_key(directory, key, entry, places)
            for key, entry in raw.state_dict_metadata.items()
            if entry.kind == "TensorStorageMetadata"
        }
    except (AttributeError, TypeError, KeyError, ValueError, IndexError) as e:
        raise UserError(f"{path} is damaged: it does not describe a checkpoint ({type(e).__name__}: {e})") from e


def _check_backend(directory: Path) -> None:
    path = directory / BACKEND_FILE
    try:
        if not path.is_file():
            raise FileNotFoundError(path)  # or a pipe, which would be waited for
        backend = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{directory} is not a Megatron distributed checkpoint: {BACKEND_FILE} cannot be read") from e
    kind = backend.get("sharded_backend") if isinstance(backend, dict) else None
    if kind != BACKEND["sharded_backend"]:
        raise UserError(f"{path} says the checkpoint's format is {kind!r}; only 'torch_dist' is supported")


Places = dict[tuple[str, tuple[int, ...]], Record]


def _places(storage: dict[Record, Record]) -> Places:
    """Where each chunk lies, by key and offsets; torch leaves the offset of an object at its default, unpickled."""
    offsets = {index: getattr(index, "offset", None) for index in storage}
    return {(index.fqn, offset): storage[index] for index, offset in offsets.items() if offset is not None}


def _stored_key(directory: Path, key: str, entry: Record, places: Places) -> StoredKey:
    chunks = tuple(_chunk(directory, key, box, places[key, box.offsets]) for box in entry.chunks)
    return StoredKey(entry.properties.dtype, entry.size, chunks)


def _chunk(directory: Path, key: str, box: Record, info: Record) -> Chunk:
    where, name = directory / METADATA_FILE, info.relative_path
    if not isinstance(name, str) or "/" in name or "\0" in name or name in ("", ".", ".."):
        raise UserError(f"{where} names the file {name!r}, which is outside the checkpoint")
    if getattr(info, "transform_descriptors", None):
        raise UserError(f"{where}: {key} is stored compressed or otherwise transformed, which is not supported")
    numbers = (*box.offsets, *box.sizes, info.offset, info.length)
    if not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ValueError(f"chunk of {key}")
    return Chunk(box.offsets, box.sizes, directory / name, info.offset, info.length)


class TorchDistPlan:
    """The files of a checkpoint, and the metadata that tells what lies where in them: chunks in any order."""

    def __init__(self, *, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self._max_file_bytes = max_file_bytes
        self._files: list[list[Item]] = []
        self._position = 0
        self._tensors: dict[str, tuple[str, tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...]]]]] = {}
        self._objects: list[str] = []
        self._places: list[tuple[str, tuple[int, ...] | None, str, int, int]] = []

    def add_chunk(
        self,
        key: str,
        dtype: str,
        shape: tuple[int, ...],
        offsets: tuple[int, ...],
        sizes: tuple[int, ...],
        blocks: tuple[RowBlock, ...],
    ) -> None:
        """One box of the tensor `key` of global shape `shape`, made up of `blocks`. Raises ValueError if they do not
        fill it."""
        data_bytes = prod(sizes) * DTYPE_BYTES[dtype]
        frame = torch_zip.tensor_frame(dtype, sizes, data_bytes)
        item = Item(frame.head, blocks, None, frame.tail)
        if item.data_bytes != data_bytes:
            raise ValueError(f"{key}: {item.data_bytes} bytes for a chunk of {data_bytes}")
        self._tensors.setdefault(key, (dtype, shape, []))[2].append((offsets, sizes))
        self._add(key, offsets, item)

    def add_object(self, key: str, value: object) -> None:
        """A small object, such as a module's extra state."""
        self._objects.append(key)
        self._add(key, None, Item(torch_zip.object_bytes(value)))

    def files(self) -> list[PlannedFile]:
        """What is to be written, under the names that a save by rank 0 gives; megatron-core reads any."""
        return [PlannedFile(_file_name(i), tuple(items)) for i, items in enumerate(self._files)]

    def write_metadata(self, directory: Path) -> None:
        """The small files; without them the directory is no checkpoint. Raises OSError (a full disk, say)."""
        (directory / COMMON_FILE).write_bytes(torch_zip.object_bytes({}))
        (directory / METADATA_FILE).write_bytes(torch_pickle.dumps(self._metadata()))
        (directory / BACKEND_FILE).write_text(json.dumps(BACKEND), encoding="utf-8")

    def _add(self, key: str, offsets: tuple[int, ...] | None, item: Item) -> None:
        if not self._files or self._position + item.bytes > self._max_file_bytes:
            self._files.append([])
            self._position = 0
        self._files[-1].append(item)
        self._places.append((key, offsets, _file_name(len(self._files) - 1), self._position, item.bytes))
        self._position += item.bytes

    def _metadata(self) -> Call:
        entries: dict[str, Call] = {}
        for key, (dtype, shape, boxes) in self._tensors.items():
            properties = _call("metadata", "TensorProperties", Name("torch", dtype))
            chunks = [_call("metadata", "ChunkStorageMetadata", _size(o), _size(s)) for o, s in boxes]
            entries[key] = _call("metadata", "TensorStorageMetadata", properties, _size(shape), chunks)
        entries |= {key: _call("metadata", "BytesStorageMetadata") for key in self._objects}
        storage = {
            _call("metadata", "MetadataIndex", key, None if offsets is None else _size(offsets)): _call(
                "filesystem", "_StorageInfo", file, start, length
            )
            for key, offsets, file, start, length in self._places
        }
        return _call("metadata", "Metadata", entries, None, storage, _call("metadata", "StorageMeta"), "1.0.0")


def _file_name(number: int) -> str:
    return f"__0_{number}.distcp"


def _call(module: str, name: str, *args: Any) -> Call:
    return Call(Name(f"torch.distributed.checkpoint.{module}", name), args)


def _size(shape: tuple[int, ...]) -> Call:
    return Call(Name("torch", "Size"), (shape,))
