"""One linear weight on its way to FP8: block of rows by block of rows, with its scales and what was lost. NumPy only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coalm_nemo.checkpoint.float8 import LARGEST, e4m3_values, to_e4m3
from coalm_nemo.checkpoint.rows import DTYPE_BYTES, RowBlock, stream_blocks
from coalm_nemo.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_BLOCK_ELEMENTS = 1 << 18  # stays in the cache through all passes; the fastest of 2**16 to 2**20
_SMALLEST_SCALE = 2.0**-126  # a row of zeros gets it; smaller ones are subnormal, which GPUs may take for zero


@dataclass(frozen=True)
class TensorError:
    """How far a weight's FP8 values are from what they were."""

    name: str
    relative_frobenius: float
    """Norm of the difference over the norm of the weight; 0 for a weight of zeros."""
    max_abs: float
    """Largest difference of an element."""


class Fp8Weight:
    """Rounds a weight with one scale a row, the row's largest value over 448. Goes through it once."""

    def __init__(self, name: str, columns: int, blocks: Sequence[RowBlock]) -> None:
        self._name, self._columns, self._blocks = name, columns, blocks
        self._dtype = blocks[0].source.dtype
        self._values = e4m3_values()
        self._scales: list[NDArray[np.float32]] = []
        self._squares = self._error_squares = self._max_abs = 0.0

    def codes(self) -> Iterator[memoryview]:
        """The codes of all rows, in order: a byte an element."""
        for piece in stream_blocks(self._blocks, _BLOCK_ELEMENTS * DTYPE_BYTES[self._dtype]):
            yield self._round(as_float32(piece, self._dtype).reshape(-1, self._columns)).data.cast("B")

    def _round(self, weight: NDArray[np.float32]) -> NDArray[np.uint8]:
        import numpy as np

        largest = np.abs(weight).max(axis=1, keepdims=True)
        if not np.isfinite(largest).all():
            raise UserError(f"{self._name} holds a value that is not finite; it cannot be quantised")
        scale = row_scales(largest)
        codes = to_e4m3(weight / scale)
        difference = self._values[codes] * scale - weight
        self._squares += float(np.vdot(weight, weight))
        self._error_squares += float(np.vdot(difference, difference))
        self._max_abs = max(self._max_abs, float(np.abs(difference).max()))
        self._scales.append(scale)
        return codes

    def scales(self) -> NDArray[np.float32]:
        """[rows], once all blocks are through."""
        import numpy as np

        return np.concatenate(self._scales).reshape(-1)

    def error(self) -> TensorError:
        """Over all rows, once all blocks are through."""
        relative = (self._error_squares / self._squares) ** 0.5 if self._squares else 0.0
        return TensorError(self._name, relative, self._max_abs)


def row_scales(largest: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scales that bring each row's largest value to 448, rounded to what bf16 holds.

    A loader keeps scales in bf16 (transformers, for a bf16 model) or fp32 (vLLM): rounded before use they are the same
    to both. Where one was rounded down, the row's largest value saturates by less than half a step.
    """
    import numpy as np

    bits = np.maximum(largest / np.float32(LARGEST), np.float32(_SMALLEST_SCALE)).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)


def as_float32(data: memoryview, dtype: str) -> NDArray[np.float32]:
    """Elements stored as `dtype` (torch's name). A view of `data` where that is float32 already."""
    import numpy as np

    if dtype == "bfloat16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.frombuffer(data, np.dtype(dtype)).astype(np.float32, copy=False)
