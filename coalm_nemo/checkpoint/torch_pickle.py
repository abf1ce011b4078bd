"""The little of Python's pickle format that torch checkpoints are made of, read and written without torch.

A pickle may name any importable function and have it called on load. Here every name must be one of those that torch's
checkpoint metadata uses, and each stands for an inert record: nothing outside this module is ever called.
Opcodes: CPython's Lib/pickletools.py.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from coalm_nemo.errors import UserError

_RECORD_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.planner",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed.checkpoint.storage",
)
"""Modules whose classes occur in `.metadata`; megatron-core also leaves its save plans there."""

_TORCH_SCALARS = {
    *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
    *("float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64", "complex64", "complex128"),
}
_STORAGE_DTYPES = {"FloatStorage": "float32", "BFloat16Storage": "bfloat16", "HalfStorage": "float16"}


_FIELDS = {
    "Metadata": ("state_dict_metadata", "planner_data", "storage_data", "storage_meta", "version"),
    "TensorStorageMetadata": ("properties", "size", "chunks"),
    "TensorProperties": ("dtype", "layout", "requires_grad", "memory_format", "pin_memory"),
    "ChunkStorageMetadata": ("offsets", "sizes"),
    "MetadataIndex": ("fqn", "offset", "index"),
    "_StorageInfo": ("relative_path", "offset", "length", "transform_descriptors"),
}
"""Fields in order, for objects that are pickled as a constructor's arguments or as a tuple of their state."""


class Record:
    """Stands for an object of any allowed class; holds its fields as attributes."""

    kind = "object"

    def __init__(self, *args: Any) -> None:
        self.__setstate__(args)

    def __setstate__(self, state: Any) -> None:
        named = state if isinstance(state, dict) else dict(zip(_FIELDS.get(self.kind, ()), state, strict=False))
        self.__dict__.update(named)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{self.kind} has no {name}")


@dataclass(frozen=True)
class TensorRecord:
    """How a pickled tensor lies in its storage; offsets, shape and strides in elements."""

    dtype: str
    storage_elements: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def loads(data: bytes, where: str) -> Any:
    """Unpickle with inert records only. Raises UserError for a name that is not allowed and for a broken pickle."""
    try:
        return _InertUnpickler(io.BytesIO(data), where).load()
    except UserError:
        raise
    except Exception as e:  # a damaged pickle can fail in any way
        raise UserError(f"{where} is damaged: it is not a readable pickle ({type(e).__name__}: {e})") from e


class _InertUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, where: str) -> None:
        super().__init__(file)
        self._where = where

    def find_class(self, module: str, name: str) -> Any:
        found = _stand_in(module, name)
        if found is None:
            raise UserError(f"{self._where} asks for {module}.{name}, which no checkpoint needs; it is not trusted")
        return found

    def persistent_load(self, pid: Any) -> tuple[str, int]:
        """A storage: ('storage', class, key, location, elements) -> (dtype, elements)."""
        return pid[1], pid[4]


def _stand_in(module: str, name: str) -> Any:
    if module in _RECORD_MODULES and name.isidentifier():
        return type(name, (Record,), {"kind": name})
    if module == "torch" and name in _TORCH_SCALARS:
        return name
    if module == "torch" and name in _STORAGE_DTYPES:
        return _STORAGE_DTYPES[name]
    return _FUNCTIONS.get((module, name))


def _rebuild_tensor(storage: tuple[str, int], offset: int, shape: Any, strides: Any, *_: Any) -> TensorRecord:
    return TensorRecord(storage[0], storage[1], offset, tuple(shape), tuple(strides))


def _enum_member(kind: Any, name: str) -> Record:
    """Python 3.11.0 to 3.11.3 (Debian 12) pickle a member as `getattr(class, name)`, the others as `class(value)`."""
    if not (isinstance(kind, type) and issubclass(kind, Record)):
        raise TypeError(f"getattr of {kind!r}")
    return kind(name)


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch", "Size"): lambda dims=(): tuple(dims),
    ("torch.serialization", "_get_layout"): lambda name: name,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("builtins", "getattr"): _enum_member,
    ("collections", "OrderedDict"): dict,
    ("pathlib", "PosixPath"): lambda *parts: "/".join(parts),
    ("pathlib", "PurePosixPath"): lambda *parts: "/".join(parts),
}


@dataclass(frozen=True)
class Name:
    """An importable name, written as such."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """A call of an importable name, made on load."""

    function: Name
    args: tuple[Any, ...] = ()


@dataclass(frozen=True)
class PersistentId:
    """A reference that the loader resolves (torch: to a storage)."""

    value: tuple[Any, ...]


def dumps(value: Any) -> bytes:
    """Pickle (protocol 2) of None, bool, int, str, tuple, list, dict, Name, Call and PersistentId.

    Only opcodes that torch's weights-only unpickler knows (torch/_weights_only_unpickler.py).
    """
    return b"\x80\x02" + _emit(value) + b"."


def _emit(value: Any) -> bytes:
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return _emit_int(value)
        case str():
            text = value.encode("utf-8")
            return b"X" + struct.pack("<I", len(text)) + text
        case tuple():
            return b"(" + b"".join(map(_emit, value)) + b"t"
        case list():
            return b"](" + b"".join(map(_emit, value)) + b"e"
        case dict():
            return b"}(" + b"".join(_emit(k) + _emit(v) for k, v in value.items()) + b"u"
        case Name(module, name):
            return f"c{module}\n{name}\n".encode()
        case Call(function, args):
            return _emit(function) + _emit(args) + b"R"
        case PersistentId(parts):
            return _emit(parts) + b"Q"
    raise TypeError(f"cannot pickle {type(value).__name__}")


def _emit_int(value: int) -> bytes:
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    size = (value.bit_length() + 8) // 8  # one bit more, for the sign
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
