"""The files of an FP8 export: which tensors go where, their headers, their index, and quantization_config.

Layout: compressed-tensors' `float-quantized` (github.com/vllm-project/compressed-tensors, quantization/quant_config.py
and compressors/naive_quantized/base.py): `NAME.weight` as F8_E4M3 and `NAME.weight_scale` [rows, 1].
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coalm_nemo.checkpoint.hf_files import INDEX_FILE, SINGLE_FILE, write_json
from coalm_nemo.errors import UserError

CODES = "F8_E4M3"
_HEADER_ALIGNMENT_BYTES = 8
_ELEMENT_BYTES = {"F32": 4, "BF16": 2, "F16": 2, CODES: 1}


@dataclass(frozen=True)
class Output:
    """A tensor to write. `scale_of` names the weight whose scales it is, which must be read before they are known."""

    name: str
    code: str
    """Dtype in safetensors' terms."""
    shape: tuple[int, ...]
    bytes: int
    scale_of: str = ""

    @property
    def place(self) -> tuple[bool, int]:
        """Within a file scales come last, and wider elements before: each tensor stays aligned to its elements."""
        return bool(self.scale_of), -_ELEMENT_BYTES[self.code]


def plan_files(groups: Sequence[Sequence[Output]], max_shard_bytes: int) -> dict[str, list[Output]]:
    """Files by name, filled in order up to `max_shard_bytes` each; the tensors of a group share a file."""
    shards: list[list[Output]] = []
    room = 0
    for group in groups:
        size = sum(output.bytes for output in group)
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1] += group
        room -= size
    for shard in shards:
        shard.sort(key=lambda output: output.place)
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def header_bytes(outputs: Sequence[Output]) -> bytes:
    """The file's first bytes, for `outputs` one after another in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for output in outputs:
        offsets = [at, at + output.bytes]
        header[output.name] = {"dtype": output.code, "shape": output.shape, "data_offsets": offsets}
        at += output.bytes
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % _HEADER_ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text


def write_index(directory: Path, files: dict[str, list[Output]]) -> None:
    """The index of several files; one file needs none."""
    if len(files) > 1:
        total = sum(output.bytes for outputs in files.values() for output in outputs)
        weight_map = {output.name: file for file, outputs in files.items() for output in outputs}
        write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def quantization_config() -> dict[str, Any]:
    """What a loader has to know: FP8 weights with a scale a channel, activations with a scale a token, made on the way.

    `ignore` takes the head out of `targets`; embeddings and norms are no Linear modules.
    """
    common = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None}
    group = {
        "targets": ["Linear"],
        "weights": common | {"strategy": "channel", "dynamic": False},
        "input_activations": common | {"strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def add_quantization_config(directory: Path) -> None:
    """Say in `directory`'s config.json that the weights are quantised."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e})") from e
    write_json(path, config | {"quantization_config": quantization_config()})
