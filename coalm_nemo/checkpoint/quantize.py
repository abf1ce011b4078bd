"""Hugging Face Llama directory -> the same model with FP8 weights, in the compressed-tensors layout, by streaming.

Every linear weight of the decoder layers becomes float8_e4m3fn with one scale an output channel (a row); activations
are quantised by whoever runs the model, one scale a token, which needs no calibration data. Embeddings, head and norms
stay as they are. It halves the bytes: CoALM-405B then fits one node of 8 H100. vLLM and transformers load it.

A weight's row holds all that decides its scale, so rows are read, scaled, rounded and written once, front to back. Memory
is a block of rows and a file's scales for each worker, whatever the model's size. NumPy only: no torch.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from coalm_nemo.checkpoint.fp8_weight import Fp8Weight, TensorError
from coalm_nemo.checkpoint.hf_files import MAX_SHARD_BYTES, copy_side_files, open_weights
from coalm_nemo.checkpoint.layout import atomic_directory, ensure_free_space, refuse_existing
from coalm_nemo.checkpoint.quantized_files import (
    CODES,
    Output,
    add_quantization_config,
    header_bytes,
    plan_files,
    write_index,
)
from coalm_nemo.checkpoint.report import DEFAULT_WORKERS, ROOM_FACTOR
from coalm_nemo.checkpoint.rows import FileReader, RowBlock, buffer_bytes, stream_blocks
from coalm_nemo.checkpoint.safetensors_io import CODE_OF_DTYPE, PlannedTensor
from coalm_nemo.checkpoint.streams import Progress, ProgressMeter
from coalm_nemo.errors import UserError
from coalm_nemo.models.llama import load_llama_config

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

QUANTIZED_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear weights of a layer, by their module's name."""

WIDTH_MULTIPLE = 16
"""FP8 matrix products (torch.nn.functional.scaled_mm, vLLM's CUTLASS kernels) take multiples of this in both widths."""


@dataclass(frozen=True)
class QuantizeReport:
    """What was written, and what it cost."""

    source: Path
    destination: Path
    bytes_before: int
    bytes_after: int
    seconds: float
    errors: tuple[TensorError, ...]

    @property
    def gb_per_second(self) -> float:
        """Of weights read."""
        return self.bytes_before / 1e9 / max(self.seconds, 1e-9)


def quantize_directory(
    hf_dir: Path,
    out: Path,
    max_memory_bytes: int = 1 << 30,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    workers: int = DEFAULT_WORKERS,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Write an FP8 version of the bf16, fp16 or fp32 model `hf_dir` to `out`.

    Raises UserError, with nothing at `out`, for weights that are damaged, not finite, quantised already, or of widths
    that FP8 kernels do not take.
    """
    started = time.monotonic()
    hf_dir, out = Path(hf_dir), Path(out)
    cfg = load_llama_config(hf_dir)
    buffer_size = buffer_bytes(max_memory_bytes // workers)
    refuse_existing(out)
    with FileReader() as reader:
        tensors = {
            name: (PlannedTensor(name, t.dtype, t.shape), [RowBlock(t.open(reader), 0, t.rows)])
            for name, t in open_weights(hf_dir, cfg, reader).items()
        }
        before, after = (sum(sizes) for sizes in zip(*map(_sizes, tensors.values()), strict=True))
        ensure_free_space(out, int(after * ROOM_FACTOR))
        with atomic_directory(out) as partial:
            meter = ProgressMeter(after, progress)
            sizes = {"buffer_size": buffer_size, "max_shard_bytes": max_shard_bytes, "workers": workers}
            errors = write_quantized(partial, tensors, meter, **sizes)
            copy_side_files(hf_dir, partial)
            add_quantization_config(partial)
    return QuantizeReport(hf_dir, out, before, after, time.monotonic() - started, tuple(errors))


Tensors = Mapping[str, tuple[PlannedTensor, list[RowBlock]]]
"""What to write, by Hugging Face name, and the rows that it is made of: of a Hugging Face or a Megatron directory."""


def write_quantized(
    directory: Path,
    tensors: Tensors,
    meter: ProgressMeter,
    *,
    buffer_size: int,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    workers: int = DEFAULT_WORKERS,
) -> list[TensorError]:
    """Write the safetensors files and their index; the caller adds config.json and what else belongs to a model.

    A linear weight is rounded from its source's dtype; the others are cast to the dtype planned for them, which also
    says how scales are stored. Raises UserError, and OSError (a full disk, say).
    """
    files = plan_files([_outputs(planned) for planned, _ in tensors.values()], max_shard_bytes)
    with ThreadPoolExecutor(workers) as pool:  # NumPy releases the interpreter: files are rounded side by side
        futures = [pool.submit(_write_file, directory / f, files[f], tensors, meter, buffer_size) for f in files]
        try:
            errors = [error for future in futures for error in future.result()]
        except BaseException:
            for future in futures:
                future.cancel()
            raise
    write_index(directory, files)
    return errors


def _sizes(tensor: tuple[PlannedTensor, list[RowBlock]]) -> tuple[int, int]:
    """Bytes read and written."""
    read = sum(block.rows * block.source.row_bytes for block in tensor[1])
    return read, sum(output.bytes for output in _outputs(tensor[0]))


def kind_of(name: str) -> str | None:
    """`model.layers.3.mlp.up_proj.weight` -> `up_proj`; None for a tensor that is left as it is."""
    parts = name.split(".")
    return parts[-2] if name.startswith("model.layers.") and parts[-2] in QUANTIZED_KINDS else None


def _outputs(planned: PlannedTensor) -> list[Output]:
    """What becomes of a tensor: itself, or its codes and their scales."""
    if kind_of(planned.name) is None:
        return [Output(planned.name, CODE_OF_DTYPE[planned.dtype], planned.shape, planned.bytes)]
    rows, columns = planned.shape
    if rows % WIDTH_MULTIPLE or columns % WIDTH_MULTIPLE:
        raise UserError(
            f"{planned.name} is {list(planned.shape)}, but FP8 matrix products take multiples of {WIDTH_MULTIPLE}; "
            "keep this model in bf16"
        )
    code, width = ("BF16", 2) if planned.dtype == "bfloat16" else ("F32", 4)
    return [
        Output(planned.name, CODES, planned.shape, rows * columns),
        Output(f"{planned.name}_scale", code, (rows, 1), rows * width, scale_of=planned.name),
    ]


def _write_file(
    path: Path, outputs: list[Output], tensors: Tensors, meter: ProgressMeter, buffer_size: int
) -> list[TensorError]:
    """One safetensors file, front to back; the scales of its weights are known by the time that they are due."""
    errors: list[TensorError] = []
    scales: dict[str, NDArray[np.float32]] = {}
    with path.open("xb") as out:
        out.write(header_bytes(outputs))
        for output in outputs:
            planned, blocks = tensors[output.scale_of or output.name]
            if output.scale_of:
                pieces: Iterable[memoryview] = [_stored_scales(scales.pop(output.scale_of), output.code)]
            elif output.code == CODES:
                weight = Fp8Weight(output.name, output.shape[1], blocks)
                pieces = weight.codes()
            else:
                pieces = stream_blocks(blocks, buffer_size, planned.dtype)
            for piece in pieces:
                out.write(piece)
                meter.add(len(piece))
            if output.code == CODES:
                scales[output.name] = weight.scales()
                errors.append(weight.error())
    return errors


def _stored_scales(scales: NDArray[np.float32], code: str) -> memoryview:
    """As fp32, or as bf16, which they were rounded to."""
    import numpy as np

    if code == "BF16":
        return (scales.view(np.uint32) >> np.uint32(16)).astype("<u2").data.cast("B")
    return scales.data.cast("B")


def error_table(errors: tuple[TensorError, ...]) -> Iterator[str]:
    """A Markdown table with a line a kind of layer: relative Frobenius error on average and at worst, largest error."""
    yield "| weight | tensors | relative error | worst | in layer | largest error of an element |"
    yield "|---|---:|---:|---:|---:|---:|"
    for kind in QUANTIZED_KINDS:
        of_kind = [e for e in errors if kind_of(e.name) == kind]
        if of_kind:
            worst = max(of_kind, key=lambda e: e.relative_frobenius)
            mean = sum(e.relative_frobenius for e in of_kind) / len(of_kind)
            layer, largest = worst.name.split(".")[2], max(e.max_abs for e in of_kind)
            worst_percent = f"{worst.relative_frobenius:.3%}"
            yield f"| {kind} | {len(of_kind)} | {mean:.3%} | {worst_percent} | {layer} | {largest:.2e} |"
