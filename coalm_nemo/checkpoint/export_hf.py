"""Megatron checkpoint -> Hugging Face Llama directory: rows are copied from file to file, no model is built.

Memory is one buffer, whatever the model's size. Where a dtype changes, torch is imported to round the elements.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from coalm_nemo.checkpoint.export_config import write_config, write_generation_config
from coalm_nemo.checkpoint.hf_files import (
    INDEX_FILE,
    MAX_SHARD_BYTES,
    TOKENIZER_FILES,
    copy_side_files,
    side_files,
    write_json,
)
from coalm_nemo.checkpoint.journal import (
    Identity,
    Notice,
    partial_bytes,
    refuse_changed,
    refuse_taken,
    resumable_directory,
    source_stamps,
)
from coalm_nemo.checkpoint.layout import (
    HF_MANIFEST_FILE,
    HF_SUBDIR,
    MANIFEST_FILE,
    check_manifest,
    ensure_free_space,
    write_manifest,
)
from coalm_nemo.checkpoint.lora import ADAPTER_FILE, AdapterCheckpoint, is_adapter, merged_blocks, read_adapter_info
from coalm_nemo.checkpoint.mapping import hf_sources, hf_tensors, megatron_slices
from coalm_nemo.checkpoint.planned_files import Item, PlannedFile, cut_rows, plan_digest, write_files
from coalm_nemo.checkpoint.report import (
    DEFAULT_MEMORY_BYTES,
    DEFAULT_WORKERS,
    ROOM_FACTOR,
    ConversionReport,
    common_dtype,
)
from coalm_nemo.checkpoint.rows import FileReader, RowBlock, RowSource, buffer_bytes
from coalm_nemo.checkpoint.safetensors_io import PlannedTensor, header_bytes, plan_shards
from coalm_nemo.checkpoint.stored_slices import open_slice, refuse_unexpected
from coalm_nemo.checkpoint.streams import Progress, ProgressMeter
from coalm_nemo.checkpoint.torch_dist import METADATA_FILE, StoredKey, read_metadata
from coalm_nemo.errors import UserError
from coalm_nemo.models.llama import LlamaConfig, load_llama_config

_ITEM_BYTES = 256 << 20
"""Tensors are read, and after an interruption gone on with, in pieces of this size."""
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def export_checkpoint(
    ckpt: Path,
    out: Path,
    *,
    hf_base: Path | None = None,
    dtype: str | None = None,
    merge_lora: bool = False,
    quantize: str | None = None,
    max_memory_bytes: int = DEFAULT_MEMORY_BYTES,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    workers: int = DEFAULT_WORKERS,
    progress: Progress | None = None,
    notice: Notice | None = None,
) -> ConversionReport:
    """Make a Hugging Face Llama directory from a Megatron checkpoint that was saved on any parallel layout.

    `hf_base` gives config.json, tokenizer and chat template where the checkpoint has none of its own (or instead of
    them); `dtype` is "bf16", "fp16", "fp32", or None for the dtypes as stored. `merge_lora` takes a LoRA run's checkpoint
    and adds its adapters to its base's weights. `quantize` "fp8" writes FP8 weights (quantize.py). An interrupted call is
    gone on with by the next. Raises UserError, with nothing left at `out` or beside it.
    """
    started = time.monotonic()
    ckpt, out = Path(ckpt), Path(out)
    target_dtype = _dtype_by_option(dtype)
    if quantize not in (None, "fp8"):
        raise UserError(f"--quantize {quantize} is not known; use fp8")
    side = _side_directory(ckpt, hf_base)
    weights = base_of(ckpt, merge_lora)
    cfg = load_llama_config(side)
    buffer_size = buffer_bytes(max_memory_bytes // workers)
    refuse_taken(out)
    for directory in {ckpt, weights}:
        if (directory / MANIFEST_FILE).exists():
            check_manifest(directory, full=False)
    with FileReader() as reader:
        blocks, read = _blocks_and_files(cfg, weights, ckpt if merge_lora else None, reader)
        sources = source_stamps(read)
        tensors = _planned_tensors(cfg, blocks, target_dtype)
        shards = plan_shards([planned for planned, _ in tensors.values()], max_shard_bytes)
        files = [_planned_file(name, members, tensors) for name, members in shards.items()]
        total = sum(planned.bytes for planned, _ in tensors.values())
        ensure_free_space(out, int(total * ROOM_FACTOR) - partial_bytes(out))
        written_dtype = common_dtype(planned.dtype for planned, _ in tensors.values())
        meter = ProgressMeter(total, progress)
        asked = {"verb": "export", "dtype": dtype, "merge_lora": merge_lora, "quantize": quantize}
        identity = Identity(asked, plan_digest(files), sources)
        with resumable_directory(out, identity, notice) as partial:
            if partial.done:
                meter.add(total, found=True)
            elif quantize:
                _write_fp8(partial.files, tensors, meter, buffer_size, max_shard_bytes, workers, notice)
                refuse_changed(sources)
                _seal(side, partial.files, cfg, written_dtype, {}, ckpt, out.name, quantized=True)
            else:
                digests = write_files(
                    partial.files, files, partial.journal, meter, buffer_size=buffer_size, workers=workers
                )
                refuse_changed(sources)
                _write_index(partial.files, shards)
                _seal(side, partial.files, cfg, written_dtype, digests, ckpt, out.name)
    if quantize:
        total, written_dtype = sum(p.stat().st_size for p in out.glob("*.safetensors")), "float8_e4m3fn"
    seconds = time.monotonic() - started
    return ConversionReport(ckpt, out, len(tensors), total, written_dtype, seconds, meter.found_bytes)


def _blocks_and_files(
    cfg: LlamaConfig, weights: Path, adapters: Path | None, reader: FileReader
) -> tuple[dict[str, list[RowBlock]], list[Path]]:
    """The rows of every Hugging Face tensor, adapters added, and the files that they are read from."""
    keys = read_metadata(weights)
    files = [weights / METADATA_FILE, *_data_files(keys)]
    blocks = _megatron_blocks(cfg, weights, keys, reader)
    if adapters is None:
        return blocks, files
    adapter = AdapterCheckpoint(adapters, reader)
    files += [adapters / ADAPTER_FILE, adapters / METADATA_FILE, *_data_files(adapter.keys)]
    return merged_blocks(blocks, adapter), files


def base_of(ckpt: Path, merge_lora: bool) -> Path:
    """The checkpoint that holds the weights: `ckpt`, or with `merge_lora` what its adapters were trained on.

    Raises UserError where adapters are there and are not to be merged, or the other way round, or the base is gone.
    """
    if not merge_lora:
        if is_adapter(ckpt):
            raise UserError(f"{ckpt} holds LoRA adapters alone; merge them into their base with --merge-lora")
        return ckpt
    base = Path(read_adapter_info(ckpt).base)
    if not base.is_dir():
        raise UserError(f"the base of {ckpt} is not at {base} any more; put it back, or change its {ADAPTER_FILE}")
    return base


def _write_fp8(
    directory: Path,
    tensors: Mapping[str, tuple[PlannedTensor, list[RowBlock]]],
    meter: ProgressMeter,
    buffer_size: int,
    max_shard_bytes: int,
    workers: int,
    notice: Notice | None,
) -> None:
    """FP8 weights; an interrupted one starts over. What was lost is told by kind of layer."""
    from coalm_nemo.checkpoint.quantize import error_table, write_quantized

    for torn in directory.glob("*.safetensors*"):
        torn.unlink()
    sizes = {"buffer_size": buffer_size, "max_shard_bytes": max_shard_bytes, "workers": workers}
    errors = write_quantized(directory, tensors, meter, **sizes)
    if notice is not None:
        notice("what FP8 loses:\n" + "\n".join(error_table(tuple(errors))))


def _seal(
    side: Path,
    directory: Path,
    cfg: LlamaConfig,
    dtype: str,
    digests: Mapping[str, str],
    ckpt: Path,
    name: str,
    quantized: bool = False,
) -> None:
    """What makes a model of the weights' files; the checksums last."""
    from coalm_nemo.checkpoint.card_sources import collect_card_info
    from coalm_nemo.checkpoint.model_card import write_model_card
    from coalm_nemo.checkpoint.quantized_files import add_quantization_config

    copy_side_files(side, directory)
    write_config(side, directory, cfg, dtype)
    write_generation_config(side, directory)
    if quantized:
        add_quantization_config(directory)
    write_model_card(directory, collect_card_info(directory, ckpt, name=name))
    write_manifest(directory, digests, file=HF_MANIFEST_FILE)


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


def _data_files(keys: Mapping[str, StoredKey]) -> list[Path]:
    """The files that hold the tensors, those of an optimizer included."""
    return [path for path in {chunk.path for stored in keys.values() for chunk in stored.chunks} if path.exists()]


def _megatron_blocks(
    cfg: LlamaConfig, ckpt: Path, keys: Mapping[str, StoredKey], reader: FileReader
) -> dict[str, list[RowBlock]]:
    """For every Hugging Face tensor, the rows of the checkpoint that make it up."""
    pieces = megatron_slices(cfg)
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


def _planned_file(
    name: str, members: Sequence[PlannedTensor], tensors: Mapping[str, tuple[PlannedTensor, list[RowBlock]]]
) -> PlannedFile:
    """A safetensors file: the header, then its tensors, large ones in pieces."""
    items = [Item(header_bytes(members))]
    for planned in members:
        items += [Item(b"", part, planned.dtype) for _, _, part in cut_rows(tensors[planned.name][1], _ITEM_BYTES)]
    return PlannedFile(name, tuple(items))


def _write_index(directory: Path, shards: Mapping[str, Sequence[PlannedTensor]]) -> None:
    """Which file holds which tensor; a single file needs none."""
    if len(shards) > 1:
        total = sum(planned.bytes for members in shards.values() for planned in members)
        weight_map = {planned.name: file for file, members in shards.items() for planned in members}
        write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
