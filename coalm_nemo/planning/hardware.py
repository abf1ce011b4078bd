"""What the GPUs and the links between them can do, as their makers publish it. Nothing here is fitted."""

from __future__ import annotations

import re
from dataclasses import dataclass

from coalm_nemo.errors import UserError

GIB = 2**30
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Gpu:
    """One GPU in its node: dense peaks (FLOP/s), bandwidths in bytes/s one way, memory in bytes."""

    name: str
    peak_bf16: float
    peak_fp8: float
    hbm: float
    memory: float
    """What torch can hand out (`total_memory`): below the number in the name, part of which is GB and part reserved."""
    nvlink: float = 450e9
    """NVLink 4: 18 links of 25 GB/s each way."""
    infiniband: float = 50e9
    """One NDR port (400 Gbit/s) a GPU."""
    link_efficiency: float = 0.8
    """Of the published link rate, what large NCCL transfers reach (nccl-tests bus bandwidth: 350 to 370 of 450 GB/s)."""
    collective_latency: float = 15e-6
    """Seconds a collective takes for no data at all."""

    def peak(self, precision: str) -> float:
        """FLOP/s of a matrix product in `bf16` or `fp8`."""
        return self.peak_fp8 if precision == "fp8" else self.peak_bf16


GPUS = {
    "h100-80gb": Gpu("h100-80gb", 989.4e12, 1978.9e12, 3.35e12, 79.1 * GIB),
    "h200-141gb": Gpu("h200-141gb", 989.4e12, 1978.9e12, 4.8e12, 139.7 * GIB),
}
"""NVIDIA H100 and H200 data sheets (SXM), without sparsity."""


DEVICE_NAMES = {
    "h100-80gb": re.compile(r"\bH100 80GB HBM3\b"),
    "h200-141gb": re.compile(r"\bH200\b(?!.*NVL)"),
}
"""The SXM modules, as torch names them; PCIe and NVL cards of the same names are slower."""


def gpu_of_device(name: str) -> Gpu | None:
    """The GPU that a driver's device name means ("NVIDIA H100 80GB HBM3"); None if it is none of `GPUS`."""
    return next((GPUS[key] for key, pattern in DEVICE_NAMES.items() if pattern.search(name)), None)


def find_gpu(name: str) -> Gpu:
    """A GPU by name. Raises UserError for one that is not known."""
    if name not in GPUS:
        raise UserError(f"--gpu {name} is not known; use one of {', '.join(GPUS)}")
    return GPUS[name]
