"""megatron-core's column- and row-parallel linear layers of a block, and another product put into them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


def replace_product(linear: Any, product: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype | None = None) -> None:
    """Let `linear` compute its output as product(x, weight); what crosses ranks stays as it was.

    `dtype`: what the input is in before it crosses ranks, so that its gradient is summed over them in it; None: as it comes.
    Both kinds of layers call `_forward_impl` for their product (tensor_parallel/layers.py).
    """

    def forward_impl(
        input: Tensor, weight: Tensor, bias: Tensor | None, allreduce_dgrad: bool, sequence_parallel: bool, **_: Any
    ) -> Tensor:
        x = input if dtype is None else input.to(dtype)
        if sequence_parallel:  # and back: reduce-scatter
            x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=linear.tp_group)
        elif allreduce_dgrad:
            x = copy_to_tensor_model_parallel_region(x, group=linear.tp_group)
        y = product(x, weight)
        return y if bias is None else y + bias

    linear._forward_impl = forward_impl
