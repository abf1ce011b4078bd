"""Are a Hugging Face directory and a Megatron checkpoint the same weights, bit for bit? Streamed, in bounded memory."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from math import isnan
from pathlib import Path

from coalm_nemo.checkpoint.hf_files import open_weights
from coalm_nemo.checkpoint.layout import MANIFEST_FILE, check_manifest
from coalm_nemo.checkpoint.mapping import hf_sources, megatron_slices
from coalm_nemo.checkpoint.rows import DTYPE_BYTES, FileReader, RowBlock, RowSource, buffer_bytes, stream_blocks
from coalm_nemo.checkpoint.stored_slices import open_slice
from coalm_nemo.checkpoint.streams import Progress, ProgressMeter
from coalm_nemo.checkpoint.torch_dist import read_metadata
from coalm_nemo.errors import UserError
from coalm_nemo.models.llama import LlamaConfig, load_llama_config

_RUN_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Difference:
    """A tensor that is not the same on both sides."""

    name: str
    reason: str
    max_abs_difference: float
    """Over the elements as float64; not a number where the values include one."""


@dataclass(frozen=True)
class VerifyReport:
    """Hugging Face names of the tensors by outcome."""

    equal: tuple[str, ...]
    different: tuple[Difference, ...]
    missing: tuple[str, ...]
    """Tensors that the checkpoint lacks, or holds in another shape or damaged."""

    @property
    def ok(self) -> bool:
        return not self.different and not self.missing


def verify_checkpoint(
    hf_dir: Path, ckpt: Path, *, max_memory_bytes: int = 1 << 30, progress: Progress | None = None
) -> VerifyReport:
    """Compare every tensor of `hf_dir` with `ckpt`. Raises UserError if either side cannot be read at all."""
    hf_dir, ckpt = Path(hf_dir), Path(ckpt)
    cfg = load_llama_config(hf_dir)
    buffer_size = buffer_bytes(max_memory_bytes)
    if (ckpt / MANIFEST_FILE).exists():
        check_manifest(ckpt, full=False)
    equal: list[str] = []
    different: list[Difference] = []
    missing: list[str] = []
    with FileReader() as reader:
        weights = open_weights(hf_dir, cfg, reader)
        meter = ProgressMeter(sum(t.bytes for t in weights.values()), progress)
        slices = _open_slices(cfg, ckpt, reader)
        for name, blocks in hf_sources(cfg).items():
            theirs = [RowBlock(slices[b.key, b.layer], b.row, b.rows) for b in blocks if (b.key, b.layer) in slices]
            if len(theirs) < len(blocks):
                missing.append(name)
                continue
            ours = [RowBlock(weights[name].open(reader), 0, weights[name].rows)]
            difference = _compare(name, ours, theirs, buffer_size)
            meter.add(weights[name].bytes)
            if difference is None:
                equal.append(name)
            else:
                different.append(difference)
    return VerifyReport(tuple(equal), tuple(different), tuple(missing))


def _open_slices(cfg: LlamaConfig, ckpt: Path, reader: FileReader) -> dict[tuple[str, int | None], RowSource]:
    """The checkpoint's slices that are there in the right shape."""
    keys, found = read_metadata(ckpt), {}
    for piece in megatron_slices(cfg):
        with suppress(UserError):
            found[piece.key, piece.layer] = open_slice(reader, ckpt, keys, piece)
    return found


def _compare(name: str, ours: list[RowBlock], theirs: list[RowBlock], buffer_size: int) -> Difference | None:
    """None where every bit is the same."""
    one, other = ours[0].source.dtype, theirs[0].source.dtype
    width = max(DTYPE_BYTES[one], DTYPE_BYTES[other])
    sizes = [buffer_size * DTYPE_BYTES[dtype] // width for dtype in (one, other)]
    streams = [stream_blocks(blocks, size) for blocks, size in zip((ours, theirs), sizes, strict=True)]
    differs, largest = one != other, 0.0
    for a, b in zip(*streams, strict=True):
        if one != other or a != b:
            differs = True
            largest = max(largest, _max_abs_difference(a, one, b, other), key=_nan_first)
    reason = f"{one} here, {other} there" if one != other else "the bits differ"
    return Difference(name, reason, largest) if differs else None


def _nan_first(value: float) -> float:
    return float("inf") if isnan(value) else value


def _max_abs_difference(a: memoryview, a_dtype: str, b: memoryview, b_dtype: str) -> float:
    """Element by element, in float64, a bounded run of elements at a time."""
    import torch

    one = torch.frombuffer(a, dtype=getattr(torch, a_dtype))
    other = torch.frombuffer(b, dtype=getattr(torch, b_dtype))
    runs = zip(one.split(_RUN_ELEMENTS), other.split(_RUN_ELEMENTS), strict=True)
    return max((float((x.double() - y.double()).abs().max()) for x, y in runs), key=_nan_first)
