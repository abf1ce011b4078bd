"""Which layouts are legal: the divisibility rules of `coalm_nemo/validate.py`, as a reason instead of an error."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

from coalm_nemo.errors import UserError
from coalm_nemo.models.llama import LlamaConfig
from coalm_nemo.planning.hardware import GPUS_PER_NODE
from coalm_nemo.planning.job import RECOMPUTE, Job, Layout
from coalm_nemo.validate import FP8_TOKENS


def why_illegal(job: Job, layout: Layout) -> str:
    """Empty if the layout is legal, else what does not divide."""
    return _model_reason(job.model, layout) or _batch_reason(job, layout) or _form_reason(job, layout)


def _model_reason(model: LlamaConfig, layout: Layout) -> str:
    for what, count in (
        ("attention heads", model.num_heads),
        ("key/value groups", model.num_kv_heads),
        ("ffn", model.ffn_size),
    ):
        if count % layout.tensor:
            return f"{count} {what} do not divide by tensor={layout.tensor}"
    if layout.tensor > GPUS_PER_NODE:
        return f"tensor={layout.tensor} is wider than a node of {GPUS_PER_NODE} GPUs"
    if layout.virtual_pipeline > 1 and layout.pipeline == 1:
        return "virtual_pipeline above 1 needs pipeline above 1"
    slots = model.num_layers + (2 if layout.count_embedding_and_loss else 0)
    if slots % layout.chunks:
        return f"{slots} layer slots do not divide by pipeline x virtual_pipeline = {layout.chunks}"
    return ""


def _batch_reason(job: Job, layout: Layout) -> str:
    if job.gpus % layout.model_ranks:
        return f"{job.gpus} GPUs do not divide by tensor x pipeline x context = {layout.model_ranks}"
    a_pass = layout.micro_batch * layout.data_parallel(job.gpus)
    if job.global_batch % a_pass:
        return f"global batch {job.global_batch} does not divide by micro-batch x data-parallel ranks = {a_pass}"
    if layout.virtual_pipeline > 1 and layout.micro_batches(job) % layout.pipeline:
        return f"{layout.micro_batches(job)} micro-batches do not divide by pipeline={layout.pipeline} (interleaving)"
    multiple = (2 * layout.context if layout.context > 1 else 1) * (layout.sequence_split if layout.tensor > 1 else 1)
    if job.precision == "fp8":
        multiple = math.lcm(multiple, FP8_TOKENS)
    if job.seq_len_tokens % multiple:
        return (
            f"{job.seq_len_tokens} tokens do not divide by {multiple} (FP8 products, context and sequence parallelism)"
        )
    return ""


def _form_reason(job: Job, layout: Layout) -> str:
    if layout.distributed_optimizer:
        return ""
    if layout.moment_bytes == 2:
        return "BF16 moments need the distributed optimizer"
    return "FP8 parameters need the distributed optimizer" if job.precision == "fp8" and layout.fp8_params else ""


def check_legal(job: Job, layout: Layout) -> None:
    """Raises UserError if the layout is not legal."""
    if reason := why_illegal(job, layout):
        raise UserError(f"the layout {layout.short()} is not legal: {reason}")


def parse_layout(text: str, base: Layout, model: LlamaConfig) -> Layout:
    """`tensor=8,pipeline=8,...` over `base`. Where the layers alone do not divide, embedding and loss are counted.

    Raises UserError for an unknown key or a value of the wrong kind.
    """
    known = {f.name: getattr(base, f.name) for f in fields(Layout)}
    given: dict[str, Any] = {}
    for word in filter(None, (w.strip() for w in text.split(","))):
        key, _, value = word.partition("=")
        if key not in known:
            raise UserError(f"--layout has no key '{key}'; use {', '.join(known)}")
        given[key] = _value(key, value, known[key])
    layout = replace(base, **given)
    if "count_embedding_and_loss" not in given:
        layout = replace(layout, count_embedding_and_loss=counts_ends(model, layout))
    return layout


def counts_ends(model: LlamaConfig, layout: Layout) -> bool:
    """Whether the layers divide by the chunks only with the embedding and the loss counted as a layer each."""
    return bool(model.num_layers % layout.chunks) and not (model.num_layers + 2) % layout.chunks


def _value(key: str, text: str, example: object) -> object:
    if isinstance(example, bool):
        if text.lower() not in ("true", "false"):
            raise UserError(f"--layout {key}={text}: use true or false")
        return text.lower() == "true"
    if isinstance(example, str):
        if text not in RECOMPUTE:
            raise UserError(f"--layout {key}={text}: use one of {', '.join(RECOMPUTE)}")
        return text
    allowed = {"gradient_bytes": ("2", "4"), "moment_bytes": ("2", "4")}.get(key)
    least = 0 if key.startswith("bf16_layers") else 1
    if not text.isdecimal() or int(text) < least or (allowed and text not in allowed):
        number = f"a whole number {'above' if least else 'from'} 0{'' if least else ' on'}"
        raise UserError(f"--layout {key}={text}: use {' or '.join(allowed) if allowed else number}")
    return int(text)
