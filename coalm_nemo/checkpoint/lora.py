"""A LoRA run's checkpoint: its adapters as PEFT keeps them, or merged into the base's weights. No model is built.

The checkpoint holds the adapters alone, with `adapter.json` saying to what they belong. Matrices are read layer by layer;
merging adds (alpha / rank) B A to the base's rows as they stream past, in fp32, and rounds once.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coalm_nemo.checkpoint.chunked_rows import ChunkedRows
from coalm_nemo.checkpoint.rows import DTYPE_BYTES, FileReader, RowBlock, RowSource
from coalm_nemo.checkpoint.safetensors_io import PlannedTensor, header_bytes
from coalm_nemo.checkpoint.torch_dist import StoredKey, read_metadata
from coalm_nemo.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_FILE = "adapter.json"
PAIRS_KEPT = 8
"""Some 30 MB at rank 16 and Llama 405B's widths."""
MODULES = {
    "q": ("self_attention.linear_qkv", "self_attn.q_proj"),
    "k": ("self_attention.linear_qkv", "self_attn.k_proj"),
    "v": ("self_attention.linear_qkv", "self_attn.v_proj"),
    "o": ("self_attention.linear_proj", "self_attn.o_proj"),
    "gate": ("mlp.linear_fc1", "mlp.gate_proj"),
    "up": ("mlp.linear_fc1", "mlp.up_proj"),
    "down": ("mlp.linear_fc2", "mlp.down_proj"),
}
"""Projection -> (Megatron module that holds it, Hugging Face module)."""


@dataclass(frozen=True)
class AdapterInfo:
    """What `adapter.json` says."""

    rank: int
    alpha: float
    targets: list[str]
    base: str
    """Megatron checkpoint that the adapters were trained on."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def is_adapter(ckpt: Path) -> bool:
    """Whether a checkpoint holds adapters and not a whole model."""
    return (Path(ckpt) / ADAPTER_FILE).is_file()


def write_adapter_info(directory: Path, info: AdapterInfo) -> None:
    """Write `adapter.json`."""
    (directory / ADAPTER_FILE).write_text(json.dumps(vars(info), indent=1) + "\n", encoding="utf-8")


def read_adapter_info(ckpt: Path) -> AdapterInfo:
    """Read `adapter.json`. Raises UserError where it is missing or not complete."""
    path = Path(ckpt) / ADAPTER_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        info = AdapterInfo(**{k: raw[k] for k in AdapterInfo.__dataclass_fields__})
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is missing or not complete; {ckpt} is not a checkpoint of a LoRA run") from e
    if not (isinstance(info.rank, int) and info.rank > 0 and set(info.targets) <= set(MODULES)):
        raise UserError(f"{path} names a rank or projections that there cannot be")
    return info


class AdapterCheckpoint:
    """The matrices of an adapter checkpoint, read on demand."""

    def __init__(self, ckpt: Path, reader: FileReader) -> None:
        """Raises UserError where `ckpt` is not a LoRA run's or a matrix is missing or of another shape."""
        self.directory = Path(ckpt)
        self.info = read_adapter_info(ckpt)
        self.keys = read_metadata(self.directory)
        self.reader = reader
        self.layers = self._stored(self.info.targets[0], "a").shape[0]
        self.pairs: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self.lock = threading.Lock()
        for target in self.info.targets:
            self._check(target)

    def _key(self, target: str, side: str) -> str:
        return f"decoder.layers.{MODULES[target][0]}.adapter.{target}.{side}"

    def _stored(self, target: str, side: str) -> StoredKey:
        key = self._key(target, side)
        if key not in self.keys:
            raise UserError(f"{self.directory} lacks {key}, which its {ADAPTER_FILE} speaks of")
        return self.keys[key]

    def _check(self, target: str) -> None:
        a, b = self._stored(target, "a"), self._stored(target, "b")
        ranks = (a.shape[1], b.shape[2]) if len(a.shape) == len(b.shape) == 3 else ()
        if ranks != (self.info.rank, self.info.rank) or {a.shape[0], b.shape[0]} != {self.layers}:
            raise UserError(f"{self.directory}: the adapter of {target} has shapes {list(a.shape)} and {list(b.shape)}")
        if a.dtype not in DTYPE_BYTES or a.dtype != b.dtype:
            raise UserError(f"{self.directory}: the adapter of {target} is of dtype {a.dtype} and {b.dtype}")

    def shape(self, target: str, side: str) -> tuple[int, int]:
        """[r, i] of A, [o, r] of B."""
        _, rows, columns = self._stored(target, side).shape
        return rows, columns

    def dtype(self, target: str) -> str:
        return self._stored(target, "a").dtype

    def data(self, target: str, side: str, layer: int) -> bytes:
        """One matrix's bytes, row by row."""
        stored, where = self._stored(target, side), f"{self.directory}: {self._key(target, side)}"
        rows, columns = self.shape(target, side)
        out = bytearray(rows * columns * DTYPE_BYTES[stored.dtype])
        ChunkedRows(self.reader, where, stored, (rows, columns), layer).read_rows(0, memoryview(out))
        return bytes(out)

    def scaled_pair(self, target: str, layer: int) -> tuple[Tensor, Tensor]:
        """A [r, i] and (alpha / rank) B [o, r] in fp32; the last few are kept, for rows are asked for in order."""
        with self.lock:
            if (target, layer) not in self.pairs:
                while len(self.pairs) >= PAIRS_KEPT:
                    self.pairs.pop(next(iter(self.pairs)))
                self.pairs[target, layer] = (
                    self._matrix(target, "a", layer),
                    self._matrix(target, "b", layer) * self.info.scale,
                )
            return self.pairs[target, layer]

    def _matrix(self, target: str, side: str, layer: int) -> Tensor:
        import torch

        raw = bytearray(self.data(target, side, layer))
        values = torch.frombuffer(raw, dtype=getattr(torch, self._stored(target, side).dtype))
        return values.float().view(self.shape(target, side))


def peft_config(info: AdapterInfo, base_name: str) -> dict[str, Any]:
    """adapter_config.json, the fields that PEFT's LoraConfig needs to load."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": info.rank,
        "lora_alpha": info.alpha,
        "lora_dropout": 0.0,
        "target_modules": [MODULES[t][1].rpartition(".")[2] for t in info.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
    }


def peft_tensors(adapter: AdapterCheckpoint) -> dict[str, tuple[str, tuple[int, int], str, str, int]]:
    """PEFT's tensor name -> (dtype, shape, projection, side, layer)."""
    found = {}
    for layer in range(adapter.layers):
        for target in adapter.info.targets:
            for side, name in (("a", "lora_A"), ("b", "lora_B")):
                key = f"base_model.model.model.layers.{layer}.{MODULES[target][1]}.{name}.weight"
                found[key] = (adapter.dtype(target), adapter.shape(target, side), target, side, layer)
    return found


@dataclass(frozen=True)
class MergedRows:
    """A base weight's rows with its adapter's product added."""

    base: RowSource
    adapter: AdapterCheckpoint
    target: str
    layer: int
    shift: int
    """Hugging Face row of the source's row 0; negative where the source's rows stand further down in it."""

    @property
    def dtype(self) -> str:
        return self.base.dtype

    @property
    def row_bytes(self) -> int:
        return self.base.row_bytes

    def read_rows(self, row: int, out: memoryview) -> None:
        import torch

        self.base.read_rows(row, out)
        a, b = self.adapter.scaled_pair(self.target, self.layer)
        values = torch.frombuffer(out, dtype=getattr(torch, self.dtype)).view(-1, a.shape[1])
        first = row + self.shift
        values.copy_(values.float() + b[first : first + len(values)] @ a)


def merged_blocks(blocks: Mapping[str, Sequence[RowBlock]], adapter: AdapterCheckpoint) -> dict[str, list[RowBlock]]:
    """The rows of every Hugging Face tensor, an adapter's product added where there is one.

    Raises UserError where the base has no such tensor, or one of another width.
    """
    result = {name: list(parts) for name, parts in blocks.items()}
    for layer in range(adapter.layers):
        for target in adapter.info.targets:
            name = f"model.layers.{layer}.{MODULES[target][1]}.weight"
            parts = result.get(name, [])
            wide = bool(parts) and parts[0].source.row_bytes // DTYPE_BYTES[parts[0].source.dtype]
            if (sum(p.rows for p in parts), wide) != (adapter.shape(target, "b")[0], adapter.shape(target, "a")[1]):
                raise UserError(f"{adapter.directory} adapts {name}, which the base does not have, or in another shape")
            result[name] = _merged(parts, adapter, target, layer)
    return result


def _merged(parts: list[RowBlock], adapter: AdapterCheckpoint, target: str, layer: int) -> list[RowBlock]:
    merged, start = [], 0
    for part in parts:
        source = MergedRows(part.source, adapter, target, layer, start - part.row)
        merged.append(RowBlock(source, part.row, part.rows))
        start += part.rows
    return merged


def export_adapter(ckpt: Path, out: Path, base_name: str = "") -> int:
    """Write PEFT's adapter directory beside the tokenizer of training; gives the number of tensors.

    `base_name` is what PEFT loads the base from; empty: the base's config says, or its path. Raises UserError.
    """
    from coalm_nemo.checkpoint.hf_files import copy_side_files, write_json
    from coalm_nemo.checkpoint.layout import HF_SUBDIR, atomic_directory

    with FileReader() as reader, atomic_directory(Path(out)) as partial:
        adapter = AdapterCheckpoint(ckpt, reader)
        tensors = peft_tensors(adapter)
        planned = [PlannedTensor(name, dtype, shape) for name, (dtype, shape, *_) in tensors.items()]
        with (partial / "adapter_model.safetensors").open("wb") as file:
            file.write(header_bytes(planned))
            for _, _, target, side, layer in tensors.values():
                file.write(adapter.data(target, side, layer))
        copy_side_files(Path(ckpt) / HF_SUBDIR, partial)
        for name in ("config.json", "generation_config.json"):  # PEFT takes the base's
            (partial / name).unlink(missing_ok=True)
        write_json(partial / "adapter_config.json", peft_config(adapter.info, base_name or adapter.info.base))
    return len(tensors)
