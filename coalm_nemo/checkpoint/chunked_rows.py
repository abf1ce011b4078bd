"""Rows of a tensor that a training run stored in chunks: cut by layer, by rows, or by columns (tensor parallelism)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import prod

from coalm_nemo.checkpoint.rows import DTYPE_BYTES, FileReader
from coalm_nemo.checkpoint.torch_dist import Chunk, StoredKey
from coalm_nemo.checkpoint.torch_zip import read_tensor_item
from coalm_nemo.errors import UserError


@dataclass(frozen=True)
class _Box:
    """A chunk's part of one layer: rows and columns of that layer, and where the part starts in the chunk's bytes."""

    chunk: Chunk
    row: int
    rows: int
    column: int
    columns: int
    layer_in_chunk: int


class ChunkedRows:
    """One layer of a stored tensor (or all of a tensor without layer axis) as rows, whatever chunks it lies in."""

    def __init__(self, reader: FileReader, where: str, stored: StoredKey, shape: tuple[int, ...], layer: int | None):
        """`shape` is the layer's shape in the model; `stored` may hold more rows (a padded vocabulary)."""
        self.dtype = stored.dtype
        self._reader, self._where, self._stored = reader, where, stored
        self._columns = shape[-1]
        self._element_bytes = DTYPE_BYTES[stored.dtype]
        self.row_bytes = self._columns * self._element_bytes
        self._boxes = sorted(_boxes(stored, layer), key=lambda b: (b.row, b.column))
        self._data_offsets: dict[Chunk, int] = {}
        self._check_tiling(stored.shape[-2] if len(shape) == 2 else 1)

    def _check_tiling(self, stored_rows: int) -> None:
        covered = sum(box.rows * box.columns for box in self._boxes)
        inside = all(b.row + b.rows <= stored_rows and b.column + b.columns <= self._columns for b in self._boxes)
        apart = not any(_overlap(a, b) for a, b in combinations(self._boxes, 2))
        if covered != stored_rows * self._columns or not inside or not apart:
            raise UserError(f"{self._where}: the stored chunks do not cover the tensor exactly once")

    def read_rows(self, row: int, out: memoryview) -> None:
        """Fill `out` from row `row` on, from as many chunks as it takes."""
        end = row + len(out) // self.row_bytes
        for box in self._boxes:
            first, last = max(row, box.row), min(end, box.row + box.rows)
            if first < last:
                begin, stop = (first - row) * self.row_bytes, (last - row) * self.row_bytes
                self._copy(box, first, last - first, out[begin:stop])

    def _copy(self, box: _Box, row: int, rows: int, out: memoryview) -> None:
        width = box.columns * self._element_bytes
        in_chunk = (box.layer_in_chunk * box.rows + row - box.row) * width
        start = self._data_offset(box.chunk) + in_chunk
        if box.columns == self._columns:
            self._reader.read_into(box.chunk.path, start, out)
            return
        import numpy as np

        part = bytearray(rows * width)
        self._reader.read_into(box.chunk.path, start, memoryview(part))
        target = np.frombuffer(out, np.uint8).reshape(rows, self.row_bytes)
        left = box.column * self._element_bytes
        target[:, left : left + width] = np.frombuffer(part, np.uint8).reshape(rows, width)

    def _data_offset(self, chunk: Chunk) -> int:
        """Where the chunk's bytes start; checked once that they are what the metadata says."""
        if chunk not in self._data_offsets:
            item = read_tensor_item(self._reader, chunk.path, chunk.item_offset, chunk.item_bytes)
            record = item.record
            as_said = record.dtype == self.dtype and record.shape == chunk.sizes
            if not as_said or not _contiguous(record.shape, record.strides):
                raise UserError(
                    f"{self._where}: a chunk in {chunk.path.name} is {record.dtype} {list(record.shape)}, "
                    f"but the metadata says {self.dtype} {list(chunk.sizes)}, contiguous"
                )
            if (record.offset + prod(record.shape)) * self._element_bytes > item.data_bytes:
                raise UserError(f"{self._where}: a chunk in {chunk.path.name} is shorter than its shape")
            self._data_offsets[chunk] = item.data_offset + record.offset * self._element_bytes
        return self._data_offsets[chunk]


def _overlap(a: _Box, b: _Box) -> bool:
    rows = a.row < b.row + b.rows and b.row < a.row + a.rows
    return rows and a.column < b.column + b.columns and b.column < a.column + a.columns


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _boxes(stored: StoredKey, layer: int | None) -> list[_Box]:
    """The chunks that hold part of `layer`, each with the place of that part."""
    boxes = []
    for chunk in stored.chunks:
        offsets, sizes = chunk.offsets, chunk.sizes
        layer_in_chunk = 0
        if layer is not None:
            layer_in_chunk = layer - offsets[0]
            if not 0 <= layer_in_chunk < sizes[0]:
                continue
            offsets, sizes = offsets[1:], sizes[1:]
        row, rows = (offsets[0], sizes[0]) if len(sizes) == 2 else (0, 1)
        boxes.append(_Box(chunk, row, rows, offsets[-1], sizes[-1], layer_in_chunk))
    return boxes
