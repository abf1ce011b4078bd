"""Hugging Face Llama directory -> Megatron checkpoint: rows are copied from file to file, no model is built."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from coalm_nemo.checkpoint.hf_files import copy_side_files, open_weights
from coalm_nemo.checkpoint.journal import (
    Identity,
    Notice,
    Partial,
    partial_bytes,
    refuse_changed,
    refuse_taken,
    resumable_directory,
    source_stamps,
)
from coalm_nemo.checkpoint.layout import HF_SUBDIR, CheckpointInfo, ensure_free_space, write_info, write_manifest
from coalm_nemo.checkpoint.mapping import MegatronSlice, extra_state_keys, megatron_slices
from coalm_nemo.checkpoint.planned_files import cut_rows, plan_digest, write_files
from coalm_nemo.checkpoint.report import (
    DEFAULT_MEMORY_BYTES,
    DEFAULT_WORKERS,
    ROOM_FACTOR,
    ConversionReport,
    common_dtype,
)
from coalm_nemo.checkpoint.rows import FileReader, RowBlock, buffer_bytes
from coalm_nemo.checkpoint.safetensors_io import StoredTensor
from coalm_nemo.checkpoint.streams import Progress, ProgressMeter
from coalm_nemo.checkpoint.torch_dist import EMPTY_STATE, MAX_CHUNK_BYTES, TorchDistPlan
from coalm_nemo.errors import UserError
from coalm_nemo.models.llama import LlamaConfig, load_llama_config


def import_checkpoint(
    hf_dir: Path,
    out: Path,
    *,
    max_memory_bytes: int = DEFAULT_MEMORY_BYTES,
    workers: int = DEFAULT_WORKERS,
    progress: Progress | None = None,
    notice: Notice | None = None,
) -> ConversionReport:
    """Make a Megatron checkpoint that any parallel layout can load from a Hugging Face Llama directory.

    The vocabulary is stored unpadded, dtypes as they are. An interrupted call is gone on with by the next. Raises
    UserError, with nothing left at `out` or beside it.
    """
    started = time.monotonic()
    hf_dir, out = Path(hf_dir), Path(out)
    cfg = load_llama_config(hf_dir)
    buffer_size = buffer_bytes(max_memory_bytes // workers)
    refuse_taken(out)
    with FileReader() as reader:
        weights = open_weights(hf_dir, cfg, reader)
        sources = source_stamps([tensor.path for tensor in weights.values()])
        dtypes = _key_dtypes(cfg, weights)
        plan = _plan(cfg, weights, dtypes, reader)
        dtype = common_dtype(dtypes.values())
        total = sum(t.bytes for t in weights.values())
        ensure_free_space(out, int(total * ROOM_FACTOR) - partial_bytes(out))
        meter = ProgressMeter(total, progress)
        identity = Identity({"verb": "import"}, plan_digest(plan.files()), sources)
        with resumable_directory(out, identity, notice) as partial:
            if partial.done:
                meter.add(total, found=True)
            else:
                digests = write_files(
                    partial.files, plan.files(), partial.journal, meter, buffer_size=buffer_size, workers=workers
                )
                refuse_changed(sources)
                _seal(hf_dir, partial, plan, dtype, digests)
    return ConversionReport(hf_dir, out, len(weights), total, dtype, time.monotonic() - started, meter.found_bytes)


def _seal(hf_dir: Path, partial: Partial, plan: TorchDistPlan, dtype: str, digests: Mapping[str, str]) -> None:
    """What makes a checkpoint of the weights' files."""
    plan.write_metadata(partial.files)
    copy_side_files(hf_dir, partial.files / HF_SUBDIR)
    write_info(partial.files, CheckpointInfo("base", 0, dtype, str(hf_dir.resolve()), created=partial.journal.created))
    write_manifest(partial.files, digests)


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


def _plan(
    cfg: LlamaConfig, weights: Mapping[str, StoredTensor], dtypes: Mapping[str, str], reader: FileReader
) -> TorchDistPlan:
    """Every slice of the model, in chunks."""
    sources = {name: tensor.open(reader) for name, tensor in weights.items()}
    plan = TorchDistPlan()
    for key in extra_state_keys(cfg):
        plan.add_object(key, EMPTY_STATE)
    for piece in megatron_slices(cfg):
        blocks = [RowBlock(sources[b.name], b.row, b.rows) for b in piece.blocks]
        for row, rows, part in cut_rows(blocks, MAX_CHUNK_BYTES):
            plan.add_chunk(piece.key, dtypes[piece.key], piece.global_shape, *_box(piece, row, rows), part)
    return plan


def _box(piece: MegatronSlice, row: int, rows: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and sizes in the key's global shape of some rows of a slice."""
    offsets, sizes = ((row, 0), (rows, piece.shape[1])) if len(piece.shape) == 2 else ((0,), piece.shape)
    return (offsets, sizes) if piece.layer is None else ((piece.layer, *offsets), (1, *sizes))
