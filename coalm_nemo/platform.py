"""cuda or cpu: chosen once, before any process group exists. Everything else asks the Platform."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coalm_nemo.errors import UserError

if TYPE_CHECKING:
    import torch


FP8_CAPABILITY = (8, 9)
"""Ada, Hopper and later."""


@dataclass(frozen=True)
class Platform:
    """What differs between a laptop and a cluster."""

    name: str
    """cuda | cpu"""
    backend: str
    """Process-group backend: nccl | gloo."""
    transformer_engine: bool
    """Layers and attention from Transformer Engine; else the torch layers of `models/torch_layers.py`, on a GPU only where
    `run.layers=torch` asks for them."""

    @property
    def is_cuda(self) -> bool:
        return self.name == "cuda"

    def refuse(self, dtype: str, moments: str = "fp32") -> None:
        """Raises UserError for what this platform has not: without it megatron-core trains on in bf16 and says nothing."""
        if dtype == "fp8_scaled_mm":
            self._refuse_without_fp8()
        if self.transformer_engine:
            return
        if dtype.startswith("fp8") and dtype != "fp8_scaled_mm" and not dtype.startswith("fp8_emulated"):
            raise UserError(
                f"precision.dtype={dtype} needs Transformer Engine on an FP8 GPU (H100 or later), and this run is on "
                f"{self.name} without it; use bf16 or fp32, fp8_scaled_mm for torch's own FP8 product, or "
                f"{dtype.replace('fp8_', 'fp8_emulated_')} to study its numerics"
            )
        if moments != "fp32":
            raise UserError(f"optimizer.moments={moments} needs Transformer Engine, and this run is on {self.name}")

    def _refuse_without_fp8(self) -> None:
        import torch

        if self.is_cuda and (found := torch.cuda.get_device_capability()) < FP8_CAPABILITY:
            raise UserError(
                f"precision.dtype=fp8_scaled_mm needs a GPU with FP8 (compute capability 8.9), and this one's is "
                f"{found[0]}.{found[1]}; use bf16, or fp8_emulated_current to study its numerics"
            )

    def device(self, local_rank: int) -> torch.device:
        """The device of this process. A launcher may show each rank all GPUs of the node, or its own one alone."""
        import torch

        return torch.device("cuda", local_rank % torch.cuda.device_count()) if self.is_cuda else torch.device("cpu")

    def activate(self, local_rank: int) -> None:
        """Make this process ready for Megatron: bind the GPU, or install the CPU layer. Before megatron builds anything."""
        import torch

        if self.is_cuda:
            torch.cuda.set_device(self.device(local_rank))
            from coalm_nemo.cpu_compat import load_into_torch_adam

            load_into_torch_adam()  # without Transformer Engine and Apex the optimizer is torch's here too
            return
        from coalm_nemo.cpu_compat import install

        install()


def choose_platform(asked: str, layers: str = "auto") -> Platform:
    """`run.platform` and `run.layers` -> Platform. Raises UserError where what was asked for cannot be had."""
    import torch

    if asked not in ("auto", "cpu", "cuda"):
        raise UserError(f"run.platform is '{asked}'; use auto, cpu or cuda")
    if layers not in ("auto", "transformer_engine", "torch"):
        raise UserError(f"run.layers is '{layers}'; use auto, transformer_engine or torch")
    has_cuda = torch.cuda.is_available()
    if asked == "cuda" and not has_cuda:
        raise UserError("run.platform=cuda, but torch sees no GPU; use run.platform=cpu, or see `coalm doctor`")
    if asked == "cpu" or not has_cuda:
        if layers == "transformer_engine":
            raise UserError(
                "run.layers=transformer_engine needs a GPU, and this run is on the CPU; use run.layers=auto"
            )
        return Platform("cpu", "gloo", transformer_engine=False)
    if layers == "torch":
        return Platform("cuda", "nccl", transformer_engine=False)
    if importlib.util.find_spec("transformer_engine") is None:
        raise UserError(
            "a GPU is there but Transformer Engine is not: pip install 'coalm_nemo[te]' or use the NGC container; "
            "run.layers=torch trains on the GPU with plain torch layers (slower; FP8 with "
            "precision.dtype=fp8_scaled_mm), run.platform=cpu without the GPU"
        )
    return Platform("cuda", "nccl", transformer_engine=True)
