"""Lets megatron-core 0.16 run where there is no CUDA. Installed by `Platform.activate` on CPU; item 8 and `fuse_adam` are for
torch's AdamW on a GPU too.

megatron-core names CUDA literally in a few dozen places. What a CPU process must see instead:

1. `torch.cuda.current_device()`: the device of new tensors (rotary embedding, buffers, p2p) -> `cpu`
2. `device="cuda"` and `pin_memory=True` in factory calls (schedules, optimizer, clipping) -> `cpu`, unpinned
3. the CUDA random state (tensor-parallel RNG tracker, activation checkpointing) -> the CPU generator's
4. `Tensor.type()` compared with `torch.cuda.*Tensor` (distributed optimizer) -> the names it looks for
5. `torch.cuda.synchronize()` (pipeline p2p) -> nothing
6. `Tensor.cuda()` (context parallelism) -> the tensor itself
7. the process that collects a save's results, spawned because CUDA does not survive a fork (seconds a rank, and it
   outlives a killed rank) -> a temporary file
8. the distributed optimizer's load, which expects the state of a fused Adam -> torch AdamW's, which has a `step` too
9. reducing gradients and gathering parameters over a single data-parallel rank, where gloo copies whole buffers onto
   themselves -> nothing; and AdamW in one fused pass (`fuse_adam`)

The factories are wrapped rather than intercepted by a `TorchFunctionMode`, which would cost every operation.
"""

from __future__ import annotations

import functools
import os
import pickle
import queue
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

from coalm_nemo.errors import UserError

_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "zeros_like", "empty_like")
_installed = False


def install() -> None:
    """Patch torch and megatron-core in this process; doing it twice changes nothing."""
    global _installed
    import torch

    if torch.cuda.is_available():
        raise UserError(
            "the CPU layer is not installed where CUDA can be used; hide the GPUs with CUDA_VISIBLE_DEVICES="
        )
    if _installed:
        return
    _patch_torch()
    _patch_rng_tracker()
    _patch_checkpoint_writer()
    load_into_torch_adam()
    _patch_lone_data_parallel_rank()
    _installed = True


def _patch_torch() -> None:
    import torch
    from torch.utils._device import _device_constructors

    # `with torch.device(...)` knows the factories by identity: let it remember the real ones, which the wrappers call.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda device=None: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.type = _cuda_type_names(torch.Tensor.type)  # type: ignore[method-assign]


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return create


def _cuda_type_names(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def type_(self: Any, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return "torch.cuda." + original(self).rpartition(".")[2]  # of the meta device too, for dry runs
        return original(self, dtype, *args, **kwargs)

    return type_


def _patch_rng_tracker() -> None:
    import torch
    from megatron.core.tensor_parallel import random as mcore_random

    def get_state(device: Any = "cpu", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    mcore_random._get_cuda_rng_state = get_state
    mcore_random._set_cuda_rng_state = set_state
    torch.cuda.get_rng_state = get_state
    torch.cuda.manual_seed = torch.default_generator.manual_seed  # type: ignore[assignment]


def _patch_checkpoint_writer() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._get_write_results_queue = functools.cache(FileQueue)


def load_into_torch_adam() -> None:
    """Item 8, wherever megatron-core's optimizer is torch's: on a GPU without Transformer Engine and Apex too."""
    from megatron.core import optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return

    def set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group]["params"][order]
        targets = {"param": main_param, **self.optimizer.state[main_param]}
        for name, tensor in tensors.items():
            targets[name].detach().copy_(tensor)

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states


def _patch_lone_data_parallel_rank() -> None:
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

    def unless_alone(sync: Callable[..., None], overlapped: str) -> Callable[..., None]:
        @functools.wraps(sync)
        def start(self: Any, *args: Any, **kwargs: Any) -> None:
            distributed = self.ddp_config.use_distributed_optimizer
            size = self.intra_distributed_optimizer_instance_size if distributed else self.data_parallel_group.size()
            scaled = any(b.gradient_scaling_factor != 1.0 for b in self.buckets)
            if size > 1 or scaled or getattr(self.ddp_config, overlapped):
                sync(self, *args, **kwargs)

        return start

    group = _ParamAndGradBucketGroup
    group.start_grad_sync = unless_alone(group.start_grad_sync, "overlap_grad_reduce")
    group.start_param_sync = unless_alone(group.start_param_sync, "overlap_param_gather")


def fuse_adam(optimizers: Iterable[Any]) -> None:
    """Let torch's AdamW update each tensor in one pass; megatron-core builds it with the slow loop. Others are left alone."""
    import torch

    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.AdamW):
            continue
        for group in optimizer.param_groups:
            group["fused"] = True


class FileQueue:
    """Hands pickled results of this rank's own forked writers back to it, in order, without a server process."""

    def __init__(self) -> None:
        # Shared with forked children; gone with the last of them.
        self.file = tempfile.TemporaryFile()  # noqa: SIM115
        self.read_from = 0

    def put(self, item: Any) -> None:
        self.file.seek(0, os.SEEK_END)
        pickle.dump(item, self.file)
        self.file.flush()

    def get_nowait(self) -> Any:
        self.file.seek(self.read_from)
        try:
            item = pickle.load(self.file)
        except EOFError as e:
            raise queue.Empty from e
        self.read_from = self.file.tell()
        return item
