"""What a Megatron checkpoint's metadata tells of the run that wrote it: its layout, its optimizer, its counters.

Tensor parallelism shows in the width of the chunks of a weight that it cuts by columns; nothing else does that. Pipeline
parallelism shows in the file names `__{rank}_{n}.distcp`: each layer was written by the ranks of its stage. Without
torch; `common.pt` is read by the same inert unpickler as `.metadata`.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from coalm_nemo.checkpoint import torch_pickle
from coalm_nemo.checkpoint.torch_dist import COMMON_FILE, StoredKey
from coalm_nemo.errors import UserError

OPTIMIZER_PREFIXES = ("optimizer.", "chained_")
_CUT_BY_COLUMNS = re.compile(
    r"(?:.*\.)?decoder\.layers\.(?:(\d+)\.)?(?:self_attention\.linear_proj|mlp\.linear_fc2)\.weight"
)
_FILE_NAME = re.compile(r"__(\d+)_\d+\.distcp")
_LARGEST_COMMON_BYTES = 64 << 20
_LARGEST_DEPTH = 64


@dataclass(frozen=True)
class SavedLayout:
    """How the model was split when it was saved, as far as the chunks tell."""

    tensor: int
    pipeline: int
    virtual_pipeline: int


@dataclass(frozen=True)
class OptimizerState:
    """The optimizer's part of a checkpoint."""

    form: str
    """"distributed" (split over data-parallel ranks: `parallel.distributed_optimizer=true`) or "plain"."""
    sharding: str
    """megatron-core's name of the distributed form ("fully_reshardable", ...); empty for a plain one."""
    tensors: int
    bytes: int
    states: tuple[str, ...]
    """What is kept for each weight: "param" (fp32 master), "exp_avg", "exp_avg_sq"."""


def saved_layout(keys: Mapping[str, StoredKey]) -> SavedLayout | None:
    """Layout of the run that saved these keys; None where the model has no layers, or files have other names."""
    widths: set[int] = set()
    ranks: dict[int, int] = {}
    for key, stored in keys.items():
        match = _CUT_BY_COLUMNS.fullmatch(key)
        if match is None or key.startswith(OPTIMIZER_PREFIXES):
            continue
        for chunk in stored.chunks:
            name = _FILE_NAME.fullmatch(chunk.path.name)
            if name is None:
                return None
            widths.add(stored.shape[-1] // chunk.sizes[-1])
            first = int(match[1]) if match[1] else chunk.offsets[0]
            for layer in range(first, first + (1 if match[1] else chunk.sizes[0])):
                ranks[layer] = min(ranks.get(layer, int(name[1])), int(name[1]))
    if len(widths) != 1 or sorted(ranks) != list(range(len(ranks))):
        return None
    stages = [rank for rank, _ in groupby(ranks[layer] for layer in sorted(ranks))]
    pipeline = len(set(stages))
    even = len(stages) % pipeline == 0 and stages == stages[:pipeline] * (len(stages) // pipeline)
    return SavedLayout(widths.pop(), pipeline, len(stages) // pipeline) if even else None


def optimizer_state(keys: Mapping[str, StoredKey], byte_sizes: Mapping[str, int], common: Any) -> OptimizerState | None:
    """None where a checkpoint holds weights only. `byte_sizes`: bytes of each key; `common`: what `common.pt` holds."""
    mine = [key for key in keys if key.startswith(OPTIMIZER_PREFIXES)]
    if not mine:
        return None
    sharding = _find(common, "param_state_sharding_type") or ""
    distributed = bool(sharding) or any(key.startswith("optimizer.distributed.") for key in mine)
    states = {m[1] for key in mine if (m := re.match(r"optimizer\.state\.(\w+)\.", key))}
    total = sum(byte_sizes[key] for key in mine)
    return OptimizerState(
        "distributed" if distributed else "plain", str(sharding), len(mine), total, tuple(sorted(states))
    )


def read_common(directory: Path) -> Any:
    """What `common.pt` holds (optimizer settings, counters), tensors as inert records; None where it cannot be read.

    Programs other than this one may keep classes of their own there; those are not asked for, and not trusted.
    """
    try:
        with zipfile.ZipFile(directory / COMMON_FILE) as archive:
            record = next(info for info in archive.infolist() if info.filename.endswith("data.pkl"))
            if record.file_size > _LARGEST_COMMON_BYTES:
                return None
            return torch_pickle.loads(archive.read(record), str(directory / COMMON_FILE))
    except (OSError, StopIteration, zipfile.BadZipFile, RuntimeError, UserError):
        return None


def common_step(common: Any) -> int | None:
    """The step that other Megatron programs keep in `common.pt`."""
    step = common.get("iteration") if isinstance(common, dict) else None
    return step if isinstance(step, int) else None


def _find(value: Any, name: str, depth: int = 0) -> Any:
    """The first entry called `name` in nested dictionaries and lists."""
    if depth > _LARGEST_DEPTH:
        return None
    if isinstance(value, dict) and name in value:
        return value[name]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return next((found for item in inside if (found := _find(item, name, depth + 1)) is not None), None)
