"""What a conversion says that it did."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

DEFAULT_MEMORY_BYTES = 4 << 30
DEFAULT_WORKERS = 2
"""Files written side by side. One keeps reading, hashing and writing apart already; two hide the waits of each."""
ROOM_FACTOR = 1.01
"""Disk space to ask for, against the weights alone: headers and side files come to far less than a hundredth."""


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did."""

    source: Path
    destination: Path
    tensors: int
    """Hugging Face tensors read or written."""
    weight_bytes: int
    """Bytes of weights written."""
    dtype: str
    """Dtype of the weights written; "mixed" where they differ."""
    seconds: float
    found_bytes: int = 0
    """Of the weights, what an interrupted run had written; it was checked."""

    @property
    def gb_per_second(self) -> float:
        """Of what this run wrote."""
        return (self.weight_bytes - self.found_bytes) / 1e9 / max(self.seconds, 1e-9)


def common_dtype(dtypes: Iterable[str]) -> str:
    """The one dtype, or "mixed"."""
    found = set(dtypes)
    return found.pop() if len(found) == 1 else "mixed"
