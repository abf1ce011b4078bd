"""Transformer Engine's communication buffers, through which tensor parallelism's transfers run beside its products.

As Megatron-LM's `_initialize_tp_communicators` sets them up, for Transformer Engine 2.7 and later. Needs process groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from coalm_nemo.config import RunConfig
from coalm_nemo.errors import UserError
from coalm_nemo.models.llama import LlamaConfig
from coalm_nemo.speed import overlaps_tensor


@contextmanager
def userbuffers(run: RunConfig, llama: LlamaConfig) -> Iterator[None]:
    """Buffers inside `with` where `speed.tensor_overlap` asks for them; else nothing. Collective."""
    if not overlaps_tensor(run):
        yield
        return
    from transformer_engine.pytorch.module import base

    if not hasattr(base, "UserBufferQuantizationMode"):
        raise UserError(
            "speed.tensor_overlap needs Transformer Engine 2.7 or later; without it: speed.tensor_overlap=false"
        )
    modes = base.UserBufferQuantizationMode
    base.initialize_ub(
        **buffer_arguments(run, llama), quantization_modes=[getattr(modes, name) for name in buffer_kinds(run)]
    )
    try:
        yield
    finally:
        base.destroy_ub()


def buffer_arguments(run: RunConfig, llama: LlamaConfig) -> dict[str, Any]:
    """Shape [tokens of a pass on a context-parallel rank, hidden], before sequence parallelism cuts it."""
    tokens = run.train.seq_len_tokens * run.batch.micro_size // run.parallel.context
    return {"shape": [tokens, llama.hidden_size], "tp_size": run.parallel.tensor, "bootstrap_backend": "nccl"}


def buffer_kinds(run: RunConfig) -> list[str]:
    """Kinds of layers that use them: layers kept in bf16 beside FP8 ones need buffers of their own."""
    precision = run.precision
    if not precision.fp8:
        return ["NONE"]
    return ["FP8", "NONE"] if precision.bf16_layers_at_start or precision.bf16_layers_at_end else ["FP8"]
