"""Megatron checkpoint -> Hugging Face Llama directory: rows are copied from file to file, no model is built.

Memory is one buffer, whatever the model's size. Where a dtype changes, torch is imported to round the elements.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from coalm_nemo.checkpoint.export_config import write_config, write_generation_config
from coalm_nemo.checkpoint.hf_files import MAX_SHARD_BYTES, TOKENIZER_FILES, copy_side_files, side_files, write_weights
from coalm_nemo.checkpoint.layout import (
    HF_SUBDIR,
    MANIFEST_FILE,
    atomic_directory,
    check_manifest,
    ensure_free_space,
    refuse_existing,
)
from coalm_nemo.checkpoint.mapping import hf_sources, hf_tensors, megatron_slices
from coalm_nemo.checkpoint.report import DEFAULT_MEMORY_BYTES, ROOM_FACTOR, ConversionReport, common_dtype
from coalm_nemo.checkpoint.rows import FileReader, RowBlock, RowSource, buffer_bytes
from coalm_nemo.checkpoint.safetensors_io import PlannedTensor
from coalm_nemo.checkpoint.stored_slices import open_slice, refuse_unexpected
from coalm_nemo.checkpoint.streams import Progress, ProgressMeter
from coalm_nemo.checkpoint.torch_dist import read_metadata
from coalm_nemo.errors import UserError
from coalm_nemo.models.llama import LlamaConfig, load_llama_config

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def export_checkpoint(
    ckpt: Path,
    out: Path,
    *,
    hf_base: Path | None = None,
    dtype: str | None = None,
    max_memory_bytes: int = DEFAULT_MEMORY_BYTES,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> ConversionReport:
    """Make a Hugging Face Llama directory from a Megatron checkpoint that was saved on any parallel layout.

    `hf_base` gives config.json, tokenizer and chat template where the checkpoint has none of its own (or instead of
    them); `dtype` is "bf16", "fp16", "fp32", or None for the dtypes as stored. Raises UserError, with nothing at `out`.
    """
    started = time.monotonic()
    ckpt, out = Path(ckpt), Path(out)
    target_dtype = _dtype_by_option(dtype)
    side = _side_directory(ckpt, hf_base)
    cfg = load_llama_config(side)
    buffer_size = buffer_bytes(max_memory_bytes)
    refuse_existing(out)
    if (ckpt / MANIFEST_FILE).exists():
        check_manifest(ckpt, full=False)
    with FileReader() as reader:
        tensors = _planned_tensors(cfg, _megatron_blocks(cfg, ckpt, reader), target_dtype)
        total = sum(planned.bytes for planned, _ in tensors.values())
        ensure_free_space(out, int(total * ROOM_FACTOR))
        written_dtype = common_dtype(planned.dtype for planned, _ in tensors.values())
        with atomic_directory(out) as partial:
            write_weights(
                partial,
                tensors,
                ProgressMeter(total, progress),
                buffer_size=buffer_size,
                max_shard_bytes=max_shard_bytes,
            )
            copy_side_files(side, partial)
            write_config(side, partial, cfg, written_dtype)
            write_generation_config(side, partial)
    return ConversionReport(ckpt, out, len(tensors), total, written_dtype, time.monotonic() - started)


def _dtype_by_option(dtype: str | None) -> str | None:
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not known; use {', '.join(DTYPES)}")
    return dtype and DTYPES[dtype]


def _side_directory(ckpt: Path, hf_base: Path | None) -> Path:
    """Where config.json, tokenizer and chat template come from. Raises UserError if there is no such place."""
    if not ckpt.is_dir():
        raise UserError(f"{ckpt} is not a directory; give a Megatron checkpoint")
    if hf_base is None and not (ckpt / HF_SUBDIR / "config.json").is_file():
        raise UserError(
            f"{ckpt} has no {HF_SUBDIR}/config.json; name the Hugging Face directory of the model with --hf-base"
        )
    side = Path(hf_base) if hf_base is not None else ckpt / HF_SUBDIR
    if side.is_dir() and not any(path.name in TOKENIZER_FILES for path in side_files(side)):
        raise UserError(f"{side} has no tokenizer ({', '.join(TOKENIZER_FILES)}); name one that has with --hf-base")
    return side


def _megatron_blocks(cfg: LlamaConfig, ckpt: Path, reader: FileReader) -> dict[str, list[RowBlock]]:
    """For every Hugging Face tensor, the rows of the checkpoint that make it up."""
    keys, pieces = read_metadata(ckpt), megatron_slices(cfg)
    sources: dict[tuple[str, int | None], RowSource] = {
        (piece.key, piece.layer): open_slice(reader, ckpt, keys, piece) for piece in pieces
    }
    refuse_unexpected(ckpt, keys, pieces)
    return {
        name: [RowBlock(sources[b.key, b.layer], b.row, b.rows) for b in blocks]
        for name, blocks in hf_sources(cfg).items()
    }


def _planned_tensors(
    cfg: LlamaConfig, blocks: Mapping[str, list[RowBlock]], dtype: str | None
) -> dict[str, tuple[PlannedTensor, list[RowBlock]]]:
    return {
        t.name: (PlannedTensor(t.name, dtype or blocks[t.name][0].source.dtype, t.shape), blocks[t.name])
        for t in hf_tensors(cfg)
    }
