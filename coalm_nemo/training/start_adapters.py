"""Training from PEFT's files: the adapters of `lora.start_from`, each rank its share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coalm_nemo.checkpoint.lora import MODULES
from coalm_nemo.checkpoint.peft_files import WEIGHTS_FILE
from coalm_nemo.errors import UserError
from coalm_nemo.models.gpt import LlamaModel
from coalm_nemo.models.lora import ADAPTER, FUSED, LowRank


def start_adapters(models: list[LlamaModel], directory: Path) -> None:
    """Copy every matrix of these chunks from the file. Raises UserError where one is missing or of another shape."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(directory / WEIGHTS_FILE), "pt") as stored:
            for model in models:
                for layer in model.decoder.layers:
                    for path in FUSED:
                        _start_linear(layer, path, stored, directory)
    except (SafetensorError, OSError) as e:
        raise UserError(f"{directory / WEIGHTS_FILE} cannot be read: {e}") from e


def _start_linear(layer: Any, path: str, stored: Any, directory: Path) -> None:
    adapter = getattr(layer.get_submodule(path), ADAPTER, None)
    for target in adapter.parts if adapter is not None else ():
        part: LowRank = getattr(adapter, target)
        prefix = f"base_model.model.model.layers.{layer.layer_number - 1}.{MODULES[target][1]}"
        size, index = part.tp.size(), part.tp.rank()
        for parameter, name, axis in ((part.a, "lora_A", 1), (part.b, "lora_B", 0)):
            split = part.row_parallel == (axis == 1)
            _copy(parameter, stored, f"{prefix}.{name}.weight", axis, (size, index) if split else (1, 0), directory)


def _copy(parameter: Tensor, stored: Any, key: str, axis: int, share: tuple[int, int], directory: Path) -> None:
    if key not in stored.keys():  # noqa: SIM118  (a safetensors file, not a dict)
        raise UserError(f"{directory / WEIGHTS_FILE} lacks {key}")
    whole = stored.get_slice(key)
    shape, own = list(whole.get_shape()), list(parameter.shape)
    own[axis] *= share[0]
    if shape != own:
        raise UserError(f"{directory / WEIGHTS_FILE}: {key} has shape {shape}, and this model's adapter {own}")
    width = parameter.shape[axis]
    part = slice(share[1] * width, (share[1] + 1) * width)
    with torch.no_grad():
        parameter.copy_(whole[:, part] if axis == 1 else whole[part])
