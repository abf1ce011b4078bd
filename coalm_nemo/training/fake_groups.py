"""Process groups of any size seen from one rank, without other ranks: their collectives do nothing.

megatron-core makes every group of the whole world on every rank, some thousands for a thousand ranks. A rank takes part in
a dozen, and the others are made here in no time; what the groups are is worked out once, not once a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

from coalm_nemo.config import RunConfig


@contextmanager
def fake_world(run: RunConfig, world_size: int, rank: int) -> Iterator[None]:
    """torch.distributed's world and megatron-core's groups over it, of `world_size` ranks, seen from `rank`."""
    import torch
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from coalm_nemo.training.setup import initialize_parallel_state

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with ExitStack() as stack:
            stack.enter_context(patch.object(parallel_state, "create_group", _own_groups(rank)))
            stack.enter_context(patch.object(parallel_state, "generate_masked_orthogonal_rank_groups", _rank_groups()))
            stack.enter_context(patch.object(torch.distributed, "all_gather_object", _all_the_same))
            initialize_parallel_state(run)
            yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _own_groups(rank: int) -> Callable[..., Any]:
    """megatron-core's `create_group`, for groups that hold the rank; of the others torch gives every rank a placeholder."""
    import torch
    from megatron.core import parallel_state

    create = parallel_state.create_group

    def create_own(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        if ranks is not None and rank not in ranks:
            return torch.distributed.GroupMember.NON_GROUP_MEMBER
        return create(ranks, *args, **kwargs)

    return create_own


_KEPT: dict[tuple[Any, ...], Any] = {}


@cache
def _rank_groups() -> Callable[..., Any]:
    """megatron-core's function that says which ranks make a group; it depends on its arguments alone."""
    from megatron.core import parallel_state

    work_out = parallel_state.generate_masked_orthogonal_rank_groups

    def remembered(world_size: int, parallel_size: list[int], mask: list[bool]) -> Any:
        key = (world_size, tuple(parallel_size), tuple(mask))
        if key not in _KEPT:
            _KEPT[key] = work_out(world_size, parallel_size, mask)
        return [list(group) for group in _KEPT[key]]

    return remembered


def _all_the_same(object_list: list[Any], obj: Any, group: Any = None) -> None:
    """What the fake group's own does, without pickling the object once a rank: every rank gives what this one does."""
    object_list[:] = [obj] * len(object_list)
