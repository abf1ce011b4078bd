"""What an import would do, without a weight on disk: `coalm convert import --dry-run`.

Llama's `config.json` fixes every tensor, and the index says which of them are to be had: both together are a few hundred
kilobytes even for 405B. So a plan can be checked before 812 GB are downloaded, and before 812 GB more are found missing
on the target disk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

from coalm_nemo.checkpoint.hf_files import IGNORED_SUFFIX, INDEX_FILE
from coalm_nemo.checkpoint.mapping import (
    HF_HEAD,
    MegatronBlock,
    extra_state_keys,
    hf_sources,
    hf_tensors,
    megatron_slices,
)
from coalm_nemo.checkpoint.report import ROOM_FACTOR
from coalm_nemo.checkpoint.rows import DTYPE_BYTES
from coalm_nemo.checkpoint.safetensors_io import unique_keys
from coalm_nemo.errors import UserError
from coalm_nemo.models.llama import LlamaConfig, load_llama_config


@dataclass(frozen=True)
class PlannedCopy:
    """One Hugging Face tensor, and where its rows go."""

    name: str
    shape: tuple[int, ...]
    bytes: int
    blocks: tuple[MegatronBlock, ...]
    """In the tensor's row order; a vector counts as one row."""
    file: str
    """The shard that holds it; empty without an index."""

    @property
    def key(self) -> str:
        """Every Hugging Face tensor of a Llama ends up in one Megatron key."""
        return self.blocks[0].key


@dataclass(frozen=True)
class PlannedKey:
    """One tensor of the Megatron checkpoint."""

    key: str
    shape: tuple[int, ...]
    bytes: int
    sources: int
    """How many Hugging Face tensors make it up."""


@dataclass(frozen=True)
class ConversionPlan:
    """An import, tensor by tensor."""

    model: LlamaConfig
    dtype: str
    copies: tuple[PlannedCopy, ...]
    keys: tuple[PlannedKey, ...]
    objects: int
    """Module states that megatron-core asks for; a few hundred bytes each."""
    files: int
    """Shards to read; 0 without an index."""
    notes: tuple[str, ...]

    @property
    def parameters(self) -> int:
        return sum(prod(copy.shape) for copy in self.copies)

    @property
    def weight_bytes(self) -> int:
        return sum(copy.bytes for copy in self.copies)

    @property
    def needed_bytes(self) -> int:
        """Disk space to have: weights, and a hundredth for everything else."""
        return int(self.weight_bytes * ROOM_FACTOR)

    def seconds(self, gb_per_second: float) -> float:
        """Time to copy the weights at this speed."""
        return self.weight_bytes / 1e9 / gb_per_second


def plan_import(cfg: LlamaConfig, index: Mapping[str, Any] | None = None) -> ConversionPlan:
    """Map every tensor of `cfg`; `index` is what model.safetensors.index.json holds.

    Raises UserError where the index lacks a tensor that config.json asks for, or holds one more.
    """
    weight_map = _weight_map(cfg, index) if index is not None else {}
    width = DTYPE_BYTES[cfg.dtype]
    shapes = {tensor.name: tensor.shape for tensor in hf_tensors(cfg)}
    copies = tuple(
        PlannedCopy(name, shapes[name], prod(shapes[name]) * width, blocks, weight_map.get(name, ""))
        for name, blocks in hf_sources(cfg).items()
    )
    sources: dict[str, set[str]] = {}
    for piece in megatron_slices(cfg):
        sources.setdefault(piece.key, set()).update(block.name for block in piece.blocks)
    global_shapes = {piece.key: piece.global_shape for piece in megatron_slices(cfg)}
    keys = tuple(PlannedKey(k, s, prod(s) * width, len(sources[k])) for k, s in global_shapes.items())
    plan = ConversionPlan(cfg, cfg.dtype, copies, keys, len(extra_state_keys(cfg)), len(set(weight_map.values())), ())
    return _with_size_note(plan, index)


def read_plan(hf_dir: Path) -> ConversionPlan:
    """The plan of `hf_dir`, from its config.json and, where it is there, its index. Raises UserError."""
    cfg = load_llama_config(hf_dir)
    path = Path(hf_dir) / INDEX_FILE
    if not path.is_file():
        return plan_import(cfg)
    try:
        index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read as an index ({e})") from e
    return plan_import(cfg, index)


def _weight_map(cfg: LlamaConfig, index: Mapping[str, Any]) -> dict[str, str]:
    found = index.get("weight_map") if isinstance(index, Mapping) else None
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise UserError(f"{INDEX_FILE} has no valid 'weight_map'")
    if outside := next((file for file in found.values() if _is_outside(file)), None):
        raise UserError(f"{INDEX_FILE} names {outside!r}, which is outside its directory")
    wanted = {tensor.name for tensor in hf_tensors(cfg)}
    spare = {HF_HEAD} if cfg.tied_embeddings else set()
    given = {name for name in found if not name.endswith(IGNORED_SUFFIX)}
    if missing := sorted(wanted - given):
        raise UserError(f"{INDEX_FILE} lacks {_and_more(missing)}, which config.json asks for")
    if extra := sorted(given - wanted - spare):
        raise UserError(f"{INDEX_FILE} holds {_and_more(extra)}, which config.json does not account for")
    return {name: found[name] for name in wanted}


def _is_outside(file: str) -> bool:
    parts = PurePosixPath(file)
    return not file or parts.is_absolute() or ".." in parts.parts or "\\" in file


def _and_more(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more tensors"


def _with_size_note(plan: ConversionPlan, index: Mapping[str, Any] | None) -> ConversionPlan:
    """The index may state a total; where it is another, the weights are of another dtype than config.json says."""
    metadata = index.get("metadata") if index is not None else None
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    if not isinstance(stated, int | float) or int(stated) == plan.weight_bytes:
        return plan
    note = (
        f"the index states {int(stated):,} bytes, but config.json's shapes in {plan.dtype} are {plan.weight_bytes:,}; "
        "the weights may be of another dtype"
    )
    return replace(plan, notes=(note,))
