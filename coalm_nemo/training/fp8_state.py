"""Delayed scaling's histories and scales in a checkpoint: without them a resumed run scales by other numbers.

They are the same on all ranks that hold a layer (the largest values are taken over tensor-, context- and data-parallel
ranks), so a checkpoint keeps each once, by layer and matrix, and a run on another layout finds its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coalm_nemo.models.gpt import LlamaModel
from coalm_nemo.models.parallel_linears import LINEARS

FILE = "fp8_state.safetensors"
EMULATED = ("fp8_amax_history", "fp8_scale")


def collect(models: list[LlamaModel]) -> dict[str, Tensor]:
    """This rank's, on the CPU; keys `layer:matrix:what`. Empty without delayed scaling."""
    return {key: tensor.detach().cpu().clone() for key, tensor in _tensors(models).items()}


def gather(models: list[LlamaModel]) -> dict[str, Tensor]:
    """Everybody's, the same on every rank. All ranks call it together."""
    shares: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(shares, collect(models))
    return {key: tensor for share in shares for key, tensor in share.items()}


def write(directory: Path, state: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(state, str(directory / FILE))


def restore(models: list[LlamaModel], checkpoint: Path) -> bool:
    """Take over what the checkpoint has; False where it has none, or not of this kind and length: calibrate then."""
    own = _tensors(models)
    if not (checkpoint / FILE).is_file():
        return False
    from safetensors import safe_open

    with safe_open(str(checkpoint / FILE), "pt") as stored:
        names = set(stored.keys())
        if any(k not in names or stored.get_slice(k).get_shape() != list(t.shape) for k, t in own.items()):
            return False
        with torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(stored.get_tensor(key))
    return True


def _tensors(models: list[LlamaModel]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for model in models:
        for layer in model.decoder.layers:
            for path in LINEARS:
                for what, tensor in _of(layer.get_submodule(path)).items():
                    found[f"{layer.layer_number}:{path}:{what}"] = tensor
    return found


def _of(linear: Any) -> dict[str, Tensor]:
    """Of the emulation (fp8_emulation.DelayedScaling), or of Transformer Engine's module (`fp8_meta`)."""
    if hasattr(linear, EMULATED[0]):
        return {name: getattr(linear, name) for name in EMULATED}
    meta = getattr(linear, "fp8_meta", {})
    return {
        f"{side}.{name}": getattr(meta[side], name)
        for side in ("scaling_fwd", "scaling_bwd")
        for name in ("amax_history", "scale")
        if isinstance(getattr(meta.get(side), name, None), Tensor)
    }
