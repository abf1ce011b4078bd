"""What a directory of weights holds, Hugging Face or Megatron, read from its headers alone: no weight is touched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import gcd, prod
from pathlib import Path
from typing import Any

from coalm_nemo.checkpoint.hf_files import INDEX_FILE, SINGLE_FILE
from coalm_nemo.checkpoint.layout import HF_SUBDIR, INFO_FILE, read_info
from coalm_nemo.checkpoint.rows import FileReader
from coalm_nemo.checkpoint.safetensors_io import read_header
from coalm_nemo.checkpoint.saved_layout import (
    OPTIMIZER_PREFIXES,
    OptimizerState,
    SavedLayout,
    common_step,
    optimizer_state,
    read_common,
    saved_layout,
)
from coalm_nemo.checkpoint.torch_dist import METADATA_FILE, read_metadata
from coalm_nemo.errors import UserError
from coalm_nemo.models.llama import LlamaConfig, parse_llama_config

_DTYPE_OF_CODE = {
    **{"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16", "F8_E4M3": "float8_e4m3fn"},
    **{"F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I8": "int8", "U8": "uint8", "BOOL": "bool"},
}
_BYTES = {
    **{"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1},
    **{"int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1},
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as stored."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    chunks: int = 1
    """Megatron: in how many pieces it lies."""

    @property
    def is_weight(self) -> bool:
        """Part of the model itself: no optimizer state, and no scale of a quantised weight."""
        return not self.is_optimizer and not self.name.endswith("_scale")

    @property
    def is_optimizer(self) -> bool:
        return self.name.startswith(OPTIMIZER_PREFIXES)


@dataclass(frozen=True)
class Layouts:
    """What layouts a model can be trained on; context and data parallelism are free."""

    tensor: tuple[int, ...]
    """Sizes that divide heads, key/value groups and the feed-forward width."""
    pipeline_times_virtual: tuple[int, ...]
    """Sizes that divide the layers."""
    distributed_optimizer: bool | None
    """What `parallel.distributed_optimizer` has to stay; None: either."""


@dataclass(frozen=True)
class Inspection:
    """Everything that `coalm convert inspect` says."""

    path: Path
    format: str
    """"hugging face" or "megatron"."""
    kind: str
    """"base" or "training" where coalm.json says so; else "weights"."""
    model: LlamaConfig | None
    parameters: int
    """Elements of the model's weights as stored (a vocabulary padded for tensor parallelism counts in full)."""
    dtypes: tuple[str, ...]
    quantization: str
    """The method where the weights are quantised; else empty."""
    weight_bytes: int
    total_bytes: int
    step: int | None
    consumed_items: int | None
    created: str
    source: str
    saved_from: SavedLayout | None
    optimizer: OptimizerState | None
    resume: Layouts | None
    tensors: tuple[TensorInfo, ...]


def inspect_directory(path: Path) -> Inspection:
    """Read what `path` holds. Raises UserError where it is neither kind of directory, or is damaged."""
    path = Path(path)
    if (path / METADATA_FILE).is_file():
        return _inspect_megatron(path)
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return _inspect_hf(path)
    raise UserError(
        f"{path} is neither a Hugging Face model (config.json and *.safetensors) nor a Megatron checkpoint "
        f"({METADATA_FILE} and *.distcp)"
    )


def _inspect_hf(path: Path) -> Inspection:
    raw = _read_json(path / "config.json")
    quantization = raw.pop("quantization_config", None) or {}
    model = parse_llama_config(raw, str(path / "config.json"))
    with FileReader() as reader:
        found = [t for file in _weight_files(path) for t in read_header(file, reader).values()]
    tensors = tuple(TensorInfo(t.name, _DTYPE_OF_CODE.get(t.code, t.code), t.shape, t.bytes) for t in found)
    method = str(quantization.get("format") or quantization.get("quant_method") or "")
    return _inspection(path, "hugging face", "weights", model, tensors, quantization=method)


def _weight_files(path: Path) -> list[Path]:
    """The files that transformers would read."""
    if (path / SINGLE_FILE).is_file() or not (path / INDEX_FILE).is_file():
        return [path / SINGLE_FILE] if (path / SINGLE_FILE).is_file() else sorted(path.glob("*.safetensors"))
    named = set((_read_json(path / INDEX_FILE).get("weight_map") or {}).values())
    here = {file.name: file for file in path.glob("*.safetensors")}
    if missing := sorted(str(name) for name in named - here.keys()):
        raise UserError(f"{path / INDEX_FILE} names {missing[0]}, which is missing")
    return [here[name] for name in sorted(named)]


def _inspect_megatron(path: Path) -> Inspection:
    keys, common = read_metadata(path), read_common(path)
    tensors = tuple(
        TensorInfo(k, s.dtype, s.shape, prod(s.shape) * _BYTES.get(s.dtype, 0), len(s.chunks)) for k, s in keys.items()
    )
    info = read_info(path) if (path / INFO_FILE).is_file() else None
    config = path / HF_SUBDIR / "config.json"
    model = parse_llama_config(_read_json(config), str(config)) if config.is_file() else None
    base = info is not None and info.kind == "base"
    return _inspection(
        path,
        "megatron",
        info.kind if info else "weights",
        model,
        tensors,
        step=info.step if info else common_step(common),
        consumed_items=info.consumed_items if info and not base else None,
        created=info.created if info else "",
        source=info.source if info else "",
        saved_from=None if base else saved_layout(keys),
        optimizer=optimizer_state(keys, {t.name: t.bytes for t in tensors}, common),
    )


def _inspection(
    path: Path,
    form: str,
    kind: str,
    model: LlamaConfig | None,
    tensors: tuple[TensorInfo, ...],
    *,
    quantization: str = "",
    step: int | None = None,
    consumed_items: int | None = None,
    created: str = "",
    source: str = "",
    saved_from: SavedLayout | None = None,
    optimizer: OptimizerState | None = None,
) -> Inspection:
    weights = [t for t in tensors if t.is_weight]
    return Inspection(
        path=path,
        format=form,
        kind=kind,
        model=model,
        parameters=sum(prod(t.shape) for t in weights),
        dtypes=tuple(sorted({t.dtype for t in weights})),
        quantization=quantization,
        weight_bytes=sum(t.bytes for t in tensors if not t.is_optimizer),
        total_bytes=sum(t.bytes for t in tensors),
        step=step,
        consumed_items=consumed_items,
        created=created,
        source=source,
        saved_from=saved_from,
        optimizer=optimizer,
        resume=layouts(model, optimizer) if model and not quantization else None,
        tensors=tensors,
    )


def layouts(model: LlamaConfig, optimizer: OptimizerState | None) -> Layouts:
    """What the model's shape, and the form of its optimizer state, leave open (see validate.py)."""
    return Layouts(
        tensor=_divisors(gcd(model.num_heads, model.num_kv_heads, model.ffn_size)),
        pipeline_times_virtual=_divisors(model.num_layers),
        distributed_optimizer=None if optimizer is None else optimizer.form == "distributed",
    )


def _divisors(number: int) -> tuple[int, ...]:
    return tuple(n for n in range(1, number + 1) if number % n == 0)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read as JSON ({e})") from e
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value


def inspection_json(inspection: Inspection) -> dict[str, Any]:
    """Everything, for programs."""
    fields: Mapping[str, Any] = asdict(inspection)
    return {**fields, "path": str(inspection.path)}
