"""JSON lines, JSON arrays and parquet, cut into blocks of whole records without ever holding a file in memory.

The main process cuts (cheap), workers parse (`records`). Where a block ends depends on the file alone, so every run
hands out the same blocks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from coalm_nemo.data.rows import parse_line
from coalm_nemo.data.sources.base import Block, Source
from coalm_nemo.errors import UserError

BLOCK_BYTES = 2 << 20
READ_CHARS = 1 << 20
MAX_RECORD_BYTES = 64 << 20
"""No row of text is this long: a longer one is a file of another kind, or a line break or bracket that is missing."""

SUFFIXES = (".jsonl", ".json", ".parquet")
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""What the datasets library and the Hub put beside the data."""

_BLANK = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class FileSource(Source):
    """A source whose rows are records of JSON lines, JSON array or parquet files, each readable by itself."""

    def files(self) -> list[Path]:
        return data_files(Path(self.path))

    def blocks(self) -> Iterator[Block]:
        for file in self.files():
            yield from iter_blocks(file)

    def row_id(self, block: Block, number: int, record: dict[str, Any]) -> str:
        """The record's own `id`, or its file (below the source's directory) and number: the same on every machine."""
        if record.get("id") is not None:
            return str(record["id"])
        root = Path(self.path)
        name = block.file.relative_to(root).as_posix() if root != block.file else block.file.name
        return f"{name}:{number}"


def data_files(path: Path) -> list[Path]:
    """The file, or a directory's data files, sorted. Raises UserError where there are none or two kinds of them."""
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(f"{path} is not a data file that can be read; its name must end in {', '.join(SUFFIXES)}")
        return [path]
    if not path.is_dir():
        raise UserError(f"data source {path} does not exist")
    found = [f for f in path.rglob("*") if f.suffix in SUFFIXES and f.is_file() and f.name not in METADATA]
    found = sorted(f for f in found if not any(p.startswith(".") for p in f.relative_to(path).parts))
    if not found:
        raise UserError(f"directory {path} holds no file ending in {', '.join(SUFFIXES)}")
    if len({f.suffix == ".parquet" for f in found}) == 2:
        raise UserError(
            f"directory {path} holds both parquet and JSON files, perhaps the same rows twice; name one file"
        )
    return found


def iter_blocks(file: Path, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """One file's records in blocks of about `block_bytes`, in order. Raises UserError where the file is broken."""
    try:
        if file.suffix == ".parquet":
            yield from _parquet_blocks(file, block_bytes)
        elif _first_byte(file) == b"[":
            yield from _array_blocks(file, block_bytes)
        else:
            yield from _line_blocks(file, block_bytes)
    except OSError as e:
        raise UserError(f"{file} cannot be read ({e.strerror or e})") from e


def records(block: Block) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, record) of a block: the line, or the position in an array or table. Raises UserError for a bad one."""
    if not isinstance(block.payload, bytes | tuple):
        yield from _table_records(block)
        return
    texts = block.payload.split(b"\n") if isinstance(block.payload, bytes) else block.payload
    for number, text in enumerate(texts, block.first):
        if not text or text.isspace():
            continue
        try:
            value = parse_line(text.decode())
        except UnicodeDecodeError as e:
            raise bad_record(block.file, number, "is not UTF-8 text") from e
        except (ValueError, RecursionError) as e:
            raise bad_record(block.file, number, f"is not valid JSON ({e})") from e
        if not isinstance(value, dict):
            raise bad_record(block.file, number, f"must be a JSON object, not {type(value).__name__}")
        yield number, value


def bad_record(file: Path, number: int, trouble: str) -> UserError:
    """The one form of every sentence about a record."""
    return UserError(f"{file}: record {number} {trouble}")


def nested_json(text: str) -> Any:
    """JSON inside a JSON string, as strict as a prompt needs it: no NaN, no half surrogates. Raises ValueError."""
    value = parse_line(text)
    if "NaN" in text or "Infinity" in text:
        json.dumps(value, allow_nan=False)
    return value


def _first_byte(file: Path) -> bytes:
    """The first byte that says something. Raises UserError for a file that holds nothing."""
    with file.open("rb") as stream:
        piece = stream.read(READ_CHARS).removeprefix(_BOM)
        while piece:
            if text := piece.lstrip():
                return text[:1]
            piece = stream.read(READ_CHARS)
    raise UserError(f"{file} is empty")


def _line_blocks(file: Path, block_bytes: int) -> Iterator[Block]:
    first = 1
    with file.open("rb") as stream:
        while chunk := stream.read(block_bytes):
            chunk += stream.readline(MAX_RECORD_BYTES)
            ends = chunk.count(b"\n")
            if not chunk.endswith(b"\n") and len(chunk) >= MAX_RECORD_BYTES:
                raise _too_long(file, first + ends)
            yield Block(file, first, chunk.removeprefix(_BOM) if first == 1 else chunk)
            first += ends


def _array_blocks(file: Path, block_bytes: int) -> Iterator[Block]:
    first, size, texts = 1, 0, []
    for text in _array_elements(file):
        texts.append(text)
        size += len(text)
        if size >= block_bytes:
            yield Block(file, first, tuple(texts))
            first, size, texts = first + len(texts), 0, []
    if texts:
        yield Block(file, first, tuple(texts))


def _array_elements(file: Path) -> Iterator[bytes]:
    """The text of each object of a JSON array. What is not UTF-8 passes as it is: `records` says which one it was."""
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        window = _Window(text)
        window.take("[")
        number = 0
        while window.peek() != "]":
            number += 1
            if number > 1 and not window.take(","):
                raise bad_record(file, number - 1, "is followed by neither a comma nor the array's closing bracket")
            if window.peek() != "{":
                raise bad_record(file, number, "must be a JSON object; the file is a JSON array")
            try:
                yield window.take_object().encode("utf-8", "surrogateescape")
            except (ValueError, RecursionError) as e:
                if window.held > MAX_RECORD_BYTES:
                    raise _too_long(file, number) from e
                raise bad_record(file, number, f"is not valid JSON ({e})") from e
        window.take("]")
        if window.peek():
            raise UserError(f"{file}: there is more text after the JSON array's closing bracket")


class _Window:
    """The stretch of a text file between what was taken and what was read; it grows while an object does not fit."""

    def __init__(self, text: TextIO) -> None:
        self._text = text
        self._buffer = ""
        self._at = 0

    @property
    def held(self) -> int:
        return len(self._buffer) - self._at

    def _more(self) -> bool:
        piece = self._text.read(max(READ_CHARS, self.held))
        self._buffer = self._buffer[self._at :] + piece
        self._at = 0
        return bool(piece)

    def peek(self) -> str:
        """The next character that is not blank; "" at the end of the file."""
        while True:
            self._at = _BLANK.match(self._buffer, self._at).end()  # type: ignore[union-attr]  # it matches anywhere
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._more():
                return ""

    def take(self, char: str) -> bool:
        """Step over `char` if it is next."""
        if self.peek() != char:
            return False
        self._at += 1
        return True

    def take_object(self) -> str:
        """The text of the JSON object that starts here. Raises ValueError if it is broken or longer than any row."""
        while True:
            try:
                _, end = _DECODER.raw_decode(self._buffer, self._at)
            except ValueError:
                if self.held > MAX_RECORD_BYTES or not self._more():
                    raise
                continue
            text = self._buffer[self._at : end]
            self._at = end
            return text


def _too_long(file: Path, number: int) -> UserError:
    limit = f"{MAX_RECORD_BYTES >> 20} MB"
    return bad_record(file, number, f"is not complete after {limit}; a line break or closing bracket may be missing")


def _parquet_blocks(file: Path, block_bytes: int) -> Iterator[Block]:
    """Record batches. `buffer_size` keeps pyarrow from reading a whole column chunk, which may be the whole file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file, buffer_size=READ_CHARS, pre_buffer=False) as table:
            meta = table.metadata
            size = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
            batch = max(1, min(1000, block_bytes * meta.num_rows // max(1, size)))
            first = 1
            for payload in table.iter_batches(batch_size=batch, use_threads=False):
                yield Block(file, first, payload)
                first += payload.num_rows
    except pa.ArrowException as e:
        raise UserError(f"{file} is not a readable parquet file ({str(e).splitlines()[0][:200]})") from e


def _table_records(block: Block) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        yield from enumerate(block.payload.to_pylist(), block.first)
    except UnicodeDecodeError as e:
        last = block.first + block.payload.num_rows - 1
        raise UserError(f"{block.file}: one of the records {block.first} to {last} is not UTF-8 text") from e
