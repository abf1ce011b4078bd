"""Where a checkpoint keeps a slice of the model: megatron-core names the same weight in more than one way.

Usual: one key for all layers, the layer axis first. With `non_homogeneous_layers` (which `singleton_local_shards` turns
on) the layer's number stands in the key and there is no layer axis; with `singleton_local_shards` the gate and up
projections are two keys as well (megatron/core/transformer/mlp.py, apply_swiglu_sharded_factory).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coalm_nemo.checkpoint.chunked_rows import ChunkedRows
from coalm_nemo.checkpoint.mapping import EMBEDDING_KEY, VOCAB_KEYS, MegatronSlice
from coalm_nemo.checkpoint.rows import DTYPE_BYTES, FileReader, RowSource
from coalm_nemo.checkpoint.torch_dist import StoredKey
from coalm_nemo.errors import UserError

_PREFIXES = ("", "model.", "module.")
_LAYERS = "decoder.layers."
_MODEL_PARTS = ("embedding.", "decoder.", "output_layer.")


@dataclass(frozen=True)
class StackedRows:
    """Two sources of equally many rows, one on top of the other."""

    top: RowSource
    bottom: RowSource
    rows_each: int
    dtype: str
    row_bytes: int

    def read_rows(self, row: int, out: memoryview) -> None:
        above = max(0, min(len(out), (self.rows_each - row) * self.row_bytes))
        if above:
            self.top.read_rows(row, out[:above])
        if above < len(out):
            self.bottom.read_rows(max(0, row - self.rows_each), out[above:])


def open_slice(reader: FileReader, directory: Path, keys: Mapping[str, StoredKey], piece: MegatronSlice) -> RowSource:
    """Find a slice among a checkpoint's keys. Raises UserError if it is missing or of another shape or dtype."""
    whole, numbered, gate, up = _names(keys, piece)
    if whole in keys:
        return _open(reader, directory, keys, whole, piece.global_shape, piece.layer)
    if numbered in keys:
        return _open(reader, directory, keys, numbered, piece.shape, None)
    if gate not in keys or up not in keys:
        raise UserError(f"{directory} lacks {piece.key}, which the model of its config.json has")
    half = (piece.shape[0] // 2, *piece.shape[1:])
    top, bottom = (_open(reader, directory, keys, key, half, None) for key in (gate, up))
    if top.dtype != bottom.dtype:
        raise UserError(f"{directory}: {gate} is {top.dtype}, but {up} is {bottom.dtype}")
    return StackedRows(top, bottom, half[0], top.dtype, top.row_bytes)


def refuse_unexpected(directory: Path, keys: Mapping[str, StoredKey], pieces: Sequence[MegatronSlice]) -> None:
    """Raises UserError if the checkpoint holds model weights that no slice accounts for: they would be lost silently.

    Optimizer and other entries are no model weights.
    """
    expected = {name for piece in pieces for name in _names(keys, piece)}
    parts = tuple(prefix + part for prefix in _PREFIXES for part in _MODEL_PARTS)
    for key in keys:
        if key.startswith(parts) and key not in expected and not key.endswith("_extra_state"):
            raise UserError(f"{directory} holds {key}, which its config.json does not account for")


def _names(keys: Mapping[str, StoredKey], piece: MegatronSlice) -> tuple[str, str, str, str]:
    """The slice's possible keys: all layers, layer by number, and that again in a gate and an up half."""
    prefix = next((p for p in _PREFIXES if p + EMBEDDING_KEY in keys), "")
    whole = prefix + piece.key
    numbered = whole if piece.layer is None else whole.replace(_LAYERS, f"{_LAYERS}{piece.layer}.", 1)
    return whole, numbered, numbered + "_w", numbered + "_v"


def _open(
    reader: FileReader,
    directory: Path,
    keys: Mapping[str, StoredKey],
    key: str,
    global_shape: tuple[int, ...],
    layer: int | None,
) -> ChunkedRows:
    where, stored = f"{directory}: {key}", keys[key]
    if stored.dtype not in DTYPE_BYTES:
        raise UserError(f"{where} is of dtype {stored.dtype}; only float32, bfloat16 and float16 are supported")
    found = stored.shape
    padded = key.endswith(VOCAB_KEYS) and len(found) == 2 and found[0] >= global_shape[0]
    if found != global_shape and not (padded and found[1] == global_shape[1]):
        raise UserError(f"{where} has shape {list(found)}, but config.json asks for {list(global_shape)}")
    return ChunkedRows(reader, where, stored, global_shape if layer is None else global_shape[1:], layer)
