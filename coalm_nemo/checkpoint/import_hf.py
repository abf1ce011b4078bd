"""Hugging Face Llama directory -> Megatron checkpoint: rows are copied from file to file, no model is built."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from coalm_nemo.checkpoint.hf_files import copy_side_files, open_weights
from coalm_nemo.checkpoint.layout import (
    HF_SUBDIR,
    CheckpointInfo,
    atomic_directory,
    ensure_free_space,
    refuse_existing,
    write_info,
    write_manifest,
)
from coalm_nemo.checkpoint.mapping import MegatronSlice, extra_state_keys, megatron_slices
from coalm_nemo.checkpoint.report import DEFAULT_MEMORY_BYTES, ROOM_FACTOR, ConversionReport, common_dtype
from coalm_nemo.checkpoint.rows import FileReader, RowBlock, buffer_bytes, stream_blocks
from coalm_nemo.checkpoint.safetensors_io import StoredTensor
from coalm_nemo.checkpoint.streams import Progress, ProgressMeter
from coalm_nemo.checkpoint.torch_dist import EMPTY_STATE, MAX_CHUNK_BYTES, TorchDistWriter
from coalm_nemo.errors import UserError
from coalm_nemo.models.llama import LlamaConfig, load_llama_config


def import_checkpoint(
    hf_dir: Path,
    out: Path,
    *,
    max_memory_bytes: int = DEFAULT_MEMORY_BYTES,
    progress: Progress | None = None,
) -> ConversionReport:
    """Make a Megatron checkpoint that any parallel layout can load from a Hugging Face Llama directory.

    The vocabulary is stored unpadded, dtypes as they are. Raises UserError, with nothing left at `out`.
    """
    started = time.monotonic()
    hf_dir, out = Path(hf_dir), Path(out)
    cfg = load_llama_config(hf_dir)
    buffer_size = buffer_bytes(max_memory_bytes)
    refuse_existing(out)
    with FileReader() as reader:
        weights = open_weights(hf_dir, cfg, reader)
        dtypes = _key_dtypes(cfg, weights)
        total = sum(t.bytes for t in weights.values())
        ensure_free_space(out, int(total * ROOM_FACTOR))
        with atomic_directory(out) as partial:
            meter = ProgressMeter(total, progress)
            digests = _write_megatron(cfg, partial, weights, dtypes, meter, reader, buffer_size)
            copy_side_files(hf_dir, partial / HF_SUBDIR)
            dtype = common_dtype(dtypes.values())
            write_info(partial, CheckpointInfo("base", 0, dtype, str(hf_dir.resolve())))
            write_manifest(partial, digests)
    return ConversionReport(hf_dir, out, len(weights), total, dtype, time.monotonic() - started)


def _key_dtypes(cfg: LlamaConfig, weights: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Dtype of each Megatron key. Raises UserError where tensors that share a key differ: it has one dtype only."""
    sources: dict[str, list[StoredTensor]] = defaultdict(list)
    for piece in megatron_slices(cfg):
        sources[piece.key] += [weights[block.name] for block in piece.blocks]
    for key, tensors in sources.items():
        first = tensors[0]
        for tensor in tensors:
            if tensor.dtype != first.dtype:
                raise UserError(
                    f"{first.name} is {first.dtype} and {tensor.name} is {tensor.dtype}, but Megatron stores both "
                    f"in {key}; convert them to one dtype first"
                )
    return {key: tensors[0].dtype for key, tensors in sources.items()}


def _write_megatron(
    cfg: LlamaConfig,
    directory: Path,
    weights: Mapping[str, StoredTensor],
    dtypes: Mapping[str, str],
    meter: ProgressMeter,
    reader: FileReader,
    buffer_size: int,
) -> dict[str, str]:
    """Stream every slice into `directory`; gives the digests of the files."""
    sources = {name: tensor.open(reader) for name, tensor in weights.items()}
    with TorchDistWriter(directory) as writer:
        for key in extra_state_keys(cfg):
            writer.add_object(key, EMPTY_STATE)
        for piece in megatron_slices(cfg):
            blocks = [RowBlock(sources[b.name], b.row, b.rows) for b in piece.blocks]
            for row, rows, part in _chunks(blocks, piece.rows):
                offsets, sizes = _box(piece, row, rows)
                chunk = writer.begin_chunk(piece.key, dtypes[piece.key], piece.global_shape, offsets, sizes)
                for data in stream_blocks(part, buffer_size):
                    chunk.write(data)
                    meter.add(len(data))
                chunk.close()
        writer.finish()
        return writer.sha256


def _box(piece: MegatronSlice, row: int, rows: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and sizes in the key's global shape of some rows of a slice."""
    offsets, sizes = ((row, 0), (rows, piece.shape[1])) if len(piece.shape) == 2 else ((0,), piece.shape)
    return (offsets, sizes) if piece.layer is None else ((piece.layer, *offsets), (1, *sizes))


def _chunks(blocks: list[RowBlock], rows: int) -> Iterator[tuple[int, int, list[RowBlock]]]:
    """Cut a slice into runs of rows of at most MAX_CHUNK_BYTES: (first row, rows, their blocks)."""
    limit = max(1, MAX_CHUNK_BYTES // blocks[0].source.row_bytes)
    for first in range(0, rows, limit):
        last = min(rows, first + limit)
        yield first, last - first, _cut(blocks, first, last)


def _cut(blocks: list[RowBlock], first: int, last: int) -> list[RowBlock]:
    """The part of `blocks`, laid end to end, between two rows."""
    part, at = [], 0
    for block in blocks:
        begin, end = max(first, at), min(last, at + block.rows)
        if begin < end:
            part.append(RowBlock(block.source, block.row + begin - at, end - begin))
        at += block.rows
    return part
