"""One item of a `.distcp` file: a stored (uncompressed) zip as `torch.save` writes it, framed around bytes that stream.

The bytes of the weights lie in the record `archive/data/0`, aligned to 64 bytes as torch aligns them. Its CRC is
written as zero: torch does not check it (its reader is built with the check off), and `manifest.json` has a SHA-256.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from coalm_nemo.checkpoint import torch_pickle
from coalm_nemo.checkpoint.rows import FileReader
from coalm_nemo.checkpoint.torch_pickle import Call, Name, PersistentId, TensorRecord
from coalm_nemo.errors import UserError

_ALIGNMENT_BYTES = 64
_STORAGES = {"float32": "FloatStorage", "bfloat16": "BFloat16Storage", "float16": "HalfStorage"}
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_ZIP_VERSION = 20
_LARGEST_PICKLE_BYTES = 1 << 20
_DOS_DATE = 33  # 1980-01-01, the earliest: the same weights give the same bytes


@dataclass(frozen=True)
class Frame:
    """What goes before and after the weights' bytes."""

    head: bytes
    tail: bytes


def tensor_frame(dtype: str, shape: tuple[int, ...], data_bytes: int) -> Frame:
    """The zip around one contiguous tensor of `data_bytes` bytes (under 4 GiB: no zip64)."""
    elements = 1
    strides: list[int] = []
    for size in reversed(shape):
        strides.insert(0, elements)
        elements *= size
    storage = PersistentId(("storage", Name("torch", _STORAGES[dtype]), "0", "cpu", elements))
    hooks = Call(Name("collections", "OrderedDict"))
    tensor = Call(Name("torch._utils", "_rebuild_tensor_v2"), (storage, 0, shape, tuple(strides), False, hooks))
    return _frame(torch_pickle.dumps(tensor), data_bytes)


def object_bytes(value: object) -> bytes:
    """The whole zip of a small object without tensors."""
    frame = _frame(torch_pickle.dumps(value), None)
    return frame.head + frame.tail


def _frame(pickled: bytes, data_bytes: int | None) -> Frame:
    head, central, count = b"", b"", 0
    for name, content in (("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n")):
        local, entry = _record(f"archive/{name}", len(head), len(content), zlib.crc32(content))
        head, central, count = head + local + content, central + entry, count + 1
    if data_bytes is not None:
        local, entry = _record("archive/data/0", len(head), data_bytes, 0, align=True)
        head, central, count = head + local, central + entry, count + 1
    start = len(head) + (data_bytes or 0)
    return Frame(head, central + _END.pack(b"PK\5\6", 0, 0, count, count, len(central), start, 0))


def _record(name: str, offset: int, size: int, crc: int, align: bool = False) -> tuple[bytes, bytes]:
    """A record's local header and central directory entry."""
    encoded = name.encode("ascii")
    padding = b""
    if align:
        bare = offset + _LOCAL.size + len(encoded) + 4
        fill = -bare % _ALIGNMENT_BYTES
        padding = b"FB" + struct.pack("<H", fill) + b"Z" * fill  # the field that torch itself pads with
    common = (_ZIP_VERSION, 0, 0, 0, _DOS_DATE, crc, size, size, len(encoded))
    local = _LOCAL.pack(b"PK\3\4", *common, len(padding)) + encoded + padding
    entry = _CENTRAL.pack(b"PK\1\2", _ZIP_VERSION, *common, 0, 0, 0, 0, 0, offset) + encoded
    return local, entry


@dataclass(frozen=True)
class StoredTensor:
    """A tensor found in a file: where its bytes start, and how they are laid out."""

    path: Path
    data_offset: int
    data_bytes: int
    record: TensorRecord


def read_tensor_item(reader: FileReader, path: Path, offset: int, length: int) -> StoredTensor:
    """Find the tensor's bytes in the item of `length` bytes at `offset`. Raises UserError if there is none."""
    where = f"{path} (item at byte {offset})"
    try:
        with zipfile.ZipFile(_RangeFile(reader, path, offset, length)) as archive:
            names = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
            if names["data.pkl"].file_size > _LARGEST_PICKLE_BYTES:
                raise UserError(f"{where} is damaged: its description is too long")
            pickled = archive.read(names["data.pkl"])
            data = names["data/0"]
            if "byteorder" in names and archive.read(names["byteorder"]) != b"little":
                raise UserError(f"{where} is big-endian; only little-endian checkpoints are supported")
    except (zipfile.BadZipFile, zlib.error, struct.error, KeyError, RuntimeError, ValueError, EOFError) as e:
        raise UserError(f"{where} is damaged: no tensor can be read from it ({e})") from e
    record = torch_pickle.loads(pickled, where)
    if not isinstance(record, TensorRecord) or data.compress_type != zipfile.ZIP_STORED:
        raise UserError(f"{where} does not hold a plain tensor")
    start = data.header_offset
    name_bytes, extra_bytes = struct.unpack("<HH", reader.read(path, offset + start + 26, 4))
    begin = start + _LOCAL.size + name_bytes + extra_bytes
    if begin + data.file_size > length:
        raise UserError(f"{where} is damaged: its data goes beyond its end")
    return StoredTensor(path, offset + begin, data.file_size, record)


class _RangeFile(io.RawIOBase):
    """A byte range of a file, as a file."""

    def __init__(self, reader: FileReader, path: Path, offset: int, length: int) -> None:
        self._reader, self._path, self._offset, self._length = reader, path, offset, length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence])
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        count = left if size < 0 else min(size, left)
        data = self._reader.read(self._path, self._offset + self._at, count)
        self._at += count
        return data
