"""The few constants that are fitted, each with its meaning and the range it must lie in to be believed.

`constants.json` holds their values, when and on what they were fitted, and the errors left; `fit.py` writes it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

CONSTANTS_FILE = Path(__file__).with_name("constants.json")


@dataclass(frozen=True)
class Constants:
    """What physics leaves open."""

    gemm_bf16: float = 0.68
    """Share of the BF16 peak that large matrix products reach, clocks under load included."""
    gemm_fp8: float = 0.60
    """The same for FP8."""
    attention: float = 0.50
    """Share of the BF16 peak that flash attention reaches (it stays in BF16 in FP8 runs)."""
    hbm: float = 0.70
    """Share of the memory bandwidth that element-wise kernels, casts and the optimizer reach."""
    tensor_exposed: float = 0.30
    """Part of tensor-parallel communication that matrix products do not hide."""
    pipeline_exposed: float = 0.50
    """Part of the hand-overs between stages that chunks of other micro-batches do not hide."""
    data_exposed: float = 0.50
    """Part of gradient reduction and parameter gathering that neither pass hides."""
    pass_overhead_s: float = 0.0005
    """Fixed cost of a chunk's forward or backward pass: launches, the hand-over to the next stage."""


PRIOR = Constants()
"""Where each constant is expected before any row is seen; the fit is drawn towards it."""

RANGES: dict[str, tuple[float, float]] = {
    "gemm_bf16": (0.55, 0.80),
    "gemm_fp8": (0.45, 0.75),
    "attention": (0.30, 0.70),
    "hbm": (0.40, 0.95),
    "tensor_exposed": (0.05, 1.0),
    "pipeline_exposed": (0.0, 1.0),
    "data_exposed": (0.05, 1.0),
    "pass_overhead_s": (0.0, 0.002),
}

WIDTHS: dict[str, float] = {
    "gemm_bf16": 0.05,
    "gemm_fp8": 0.05,
    "attention": 0.08,
    "hbm": 0.10,
    "tensor_exposed": 0.15,
    "pipeline_exposed": 0.25,
    "data_exposed": 0.25,
    "pass_overhead_s": 0.0003,
}
"""How far from its prior a constant may lie before that counts as an error of the size of a row's."""


@cache
def fitted() -> Constants:
    """The constants in `constants.json`."""
    values = json.loads(CONSTANTS_FILE.read_text(encoding="utf-8"))["values"]
    return Constants(**{f.name: float(values[f.name]) for f in fields(Constants)})
