"""How context parallelism cuts rows, in one place for the data and for the attention.

Every row is cut into 2*CP equal chunks; rank r holds chunks r and 2*CP-1-r, so that all ranks have the same causal
work ("zigzag", as Transformer Engine and megatron-core's `get_batch_on_this_cp_rank` cut them).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def row_bounds(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    """Cumulative row lengths [n+1] -> (start, end) of each non-empty row."""
    edges = cu_seqlens.tolist()
    return [(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True) if b > a]


def zigzag_order(bounds: list[tuple[int, int]], cp_size: int) -> list[Tensor]:
    """Positions that each rank holds, in the order in which it holds them: CP tensors of shape [t / CP].

    Every row length has to be a multiple of 2*CP.
    """
    return [torch.cat([_zigzag_row(a, b, cp_size, rank) for a, b in bounds]) for rank in range(cp_size)]


def _zigzag_row(start: int, end: int, cp_size: int, rank: int) -> Tensor:
    chunk, rest = divmod(end - start, 2 * cp_size)
    if rest:
        raise ValueError(f"a row of {end - start} tokens cannot be cut into {2 * cp_size} equal chunks")
    first = start + rank * chunk
    second = start + (2 * cp_size - 1 - rank) * chunk
    return torch.cat([torch.arange(first, first + chunk), torch.arange(second, second + chunk)])


def gather_sequence(x: Tensor, group: Any) -> Tensor:
    """[t/CP, ...] of every rank -> [t, ...] in rank order; the gradient is summed back to the rank it came from."""
    return _GatherSequence.apply(x, group)


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        out = x.new_empty((x.size(0) * group.size(), *x.shape[1:]))
        torch.distributed.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        out = grad.new_empty((grad.size(0) // ctx.group.size(), *grad.shape[1:]))
        torch.distributed.reduce_scatter_tensor(out, grad.contiguous(), group=ctx.group)
        return out, None
