"""`coalm convert inspect`: an inspection as a page, or as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from coalm_nemo.checkpoint.inspect import Inspection, TensorInfo, inspect_directory, inspection_json
from coalm_nemo.models.llama import LlamaConfig

_LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")
_OPTIMIZER_STATE = re.compile(r"optimizer\.state\.\w+\.")


@dataclass(frozen=True)
class Group:
    """Tensors that differ in their layer only."""

    name: str
    count: int
    dtype: str
    shape: tuple[int, ...]
    """Empty where the shapes differ."""
    bytes: int


def inspect_command(path: Path, as_json: bool) -> None:
    """Print what `path` holds."""
    found = inspect_directory(path)
    print(json.dumps(inspection_json(found), indent=2) if as_json else "\n".join(page(found)))


def page(found: Inspection) -> Iterator[str]:
    """The inspection as lines: a line a fact, then a table of the tensors by kind."""
    yield from (f"{name + ':':<15} {value}" for name, value in facts(found) if value)
    yield ""
    groups = group_tensors(found.tensors)
    width = max(len(g.name) for g in groups)
    yield f"{'tensors':<{width}}  {'count':>5}  {'dtype':<13}  {'shape':<20}  {'bytes':>15}"
    for g in groups:
        shape = "x".join(map(str, g.shape))
        yield f"{g.name:<{width}}  {g.count:>5}  {g.dtype:<13}  {shape:<20}  {g.bytes:>15,}"
    count = sum(g.count for g in groups)
    yield f"{'all':<{width}}  {count:>5}  {'':<13}  {'':<20}  {found.total_bytes:>15,}"


def facts(found: Inspection) -> Iterator[tuple[str, str]]:
    """Name and value of every fact; the value is empty where the directory does not tell."""
    yield str(found.path), found.format + (f", {found.kind}" if found.kind != "weights" else "")
    yield "model", model_line(found.model) if found.model else ""
    form = " ".join((*found.dtypes, f"({found.quantization})" if found.quantization else "")).strip()
    yield "parameters", f"{found.parameters:,} of {form}, {found.weight_bytes:,} bytes"
    yield "step", f"{found.step:,}" if found.step is not None and found.kind != "base" else ""
    yield "consumed items", f"{found.consumed_items:,}" if found.consumed_items is not None else ""
    yield "created", found.created
    yield "made from", found.source
    if saved := found.saved_from:
        yield (
            "saved from",
            f"tensor {saved.tensor}, pipeline {saved.pipeline}, virtual pipeline {saved.virtual_pipeline}",
        )
    yield "optimizer", optimizer_line(found)
    yield from layout_facts(found)


def model_line(model: LlamaConfig) -> str:
    tied = "tied" if model.tied_embeddings else "untied"
    return (
        f"{model.num_layers} layers, hidden {model.hidden_size}, {model.num_heads} heads of {model.head_dim}, "
        f"{model.num_kv_heads} key/value groups, ffn {model.ffn_size}, vocabulary {model.vocab_size} ({tied}), "
        f"{model.max_positions} positions"
    )


def optimizer_line(found: Inspection) -> str:
    state = found.optimizer
    if state is None:
        return "none: weights only" if found.format == "megatron" else ""
    form = f"{state.form} ({state.sharding})" if state.sharding else state.form
    return f"{form}: {', '.join(state.states)}; {state.tensors} tensors, {state.bytes:,} bytes"


def layout_facts(found: Inspection) -> Iterator[tuple[str, str]]:
    """What it can be trained on. A plain optimizer's state does not load into a distributed one, nor the reverse."""
    if found.resume is None:
        return
    open_to = found.resume
    verb = "resume as" if found.optimizer else "train as" if found.format == "megatron" else "import, train"
    tensor, pipeline = (", ".join(map(str, sizes)) for sizes in (open_to.tensor, open_to.pipeline_times_virtual))
    yield verb, f"tensor {tensor}; pipeline x virtual pipeline {pipeline}; any context and data parallelism"
    if open_to.distributed_optimizer is not None:
        value = str(open_to.distributed_optimizer).lower()
        yield "must stay", f"parallel.distributed_optimizer={value}"


def group_tensors(tensors: tuple[TensorInfo, ...]) -> list[Group]:
    """The model's tensors without their layer's number, then the optimizer's by what they are for their weight."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[TensorInfo]] = {}
    for tensor in sorted(tensors, key=lambda t: t.is_optimizer):
        state = _OPTIMIZER_STATE.match(tensor.name)
        kind = (f"{state[0]}*", ()) if state else (_LAYER.sub("*", tensor.name), tensor.shape)
        groups.setdefault((kind[0], tensor.dtype, kind[1]), []).append(tensor)
    return [Group(name, len(g), dtype, shape, sum(t.bytes for t in g)) for (name, dtype, shape), g in groups.items()]
