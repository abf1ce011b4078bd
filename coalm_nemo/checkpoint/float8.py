"""8-bit floats of the kind e4m3fn (1 sign bit, 4 of exponent, 3 of mantissa, no infinity), in NumPy: no torch.

Format: P. Micikevicius et al., "FP8 Formats for Deep Learning", https://arxiv.org/abs/2209.05433, table 1. Rounding is
torch's (to nearest, ties to even; c10/util/Float8_e4m3fn.h). What lies beyond the range saturates, as in torch 2.13.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LARGEST = 448.0
LARGEST_CODE = 0x7E
NAN_CODE = 0x7F
_SMALLEST_NORMAL_BITS = (127 - 6) << 23  # 2**-6 as float32
_BIAS_DIFFERENCE = (127 - 7) << 3  # of float32's exponent and e4m3's, in front of three bits of mantissa
_SUBNORMAL_SHIFT = 16384.0
"""2**14: a float32 this large has a last bit worth 2**-9, the step of e4m3's subnormals; adding it rounds to them."""


def to_e4m3(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Codes of the nearest e4m3fn values; beyond 448 saturates, NaN stays NaN."""
    import numpy as np

    bits = values.view(np.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    # Adding just under half of the last kept bit, and that bit itself, carries upwards exactly where it should.
    rounded = magnitude + np.uint32((1 << 19) - 1) + ((magnitude >> np.uint32(20)) & np.uint32(1))
    codes = np.minimum((rounded >> np.uint32(20)) - np.uint32(_BIAS_DIFFERENCE), np.uint32(LARGEST_CODE))
    small = magnitude < np.uint32(_SMALLEST_NORMAL_BITS)
    if small.any():
        shifted = magnitude[small].view(np.float32) + np.float32(_SUBNORMAL_SHIFT)
        codes[small] = shifted.view(np.uint32) - np.float32(_SUBNORMAL_SHIFT).view(np.uint32)
    codes[magnitude > np.uint32(0x7F800000)] = NAN_CODE
    return (codes | ((bits >> np.uint32(24)) & np.uint32(0x80))).astype(np.uint8)


def e4m3_values() -> NDArray[np.float32]:
    """The value of each of the 256 codes: index with codes to read them."""
    import numpy as np

    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    values = np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    values[(codes & 0x7F) == NAN_CODE] = np.nan
    return np.where(codes & 0x80, -values, values).astype(np.float32)
