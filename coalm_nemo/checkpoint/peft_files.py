"""What PEFT's adapter directory must say before training can start from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from coalm_nemo.checkpoint.lora import MODULES
from coalm_nemo.config import LoraSection
from coalm_nemo.errors import UserError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
REFUSED = {"use_dora": False, "use_rslora": False, "bias": "none", "fan_in_fan_out": False, "modules_to_save": None}
"""Fields of PEFT's LoraConfig that change what an adapter computes, with the only value that we compute."""


def check_start(directory: Path, lora: LoraSection) -> None:
    """Raises UserError where the directory holds no LoRA, or not the one that `lora` describes."""
    path = directory / CONFIG_FILE
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        named = list(config["target_modules"])
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is missing or no configuration of a PEFT LoRA") from e
    for field, value in REFUSED.items():
        if config.get(field, value) not in (value, [] if value is None else value):
            raise UserError(f"{path} says {field}={config[field]!r}, which is not supported here")
    if any(
        config.get(field) for field in ("rank_pattern", "alpha_pattern", "layers_to_transform", "layer_replication")
    ):
        raise UserError(f"{path} gives layers ranks of their own, which is not supported here")
    short = {MODULES[target][1].rpartition(".")[2]: target for target in MODULES}
    targets = {short.get(name, name) for name in named}
    if (rank, alpha, targets) != (lora.rank, lora.alpha, set(lora.targets)):
        raise UserError(
            f"{path} has rank {rank}, alpha {alpha:g} and targets {', '.join(sorted(targets))}; set lora.rank, lora.alpha "
            "and lora.targets to the same"
        )
    if not (directory / WEIGHTS_FILE).is_file():
        raise UserError(f"{directory / WEIGHTS_FILE} does not exist; PEFT writes it with save_pretrained")
