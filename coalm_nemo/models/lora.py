"""LoRA (Hu et al. 2021) on megatron-core's parallel linear layers, each Llama projection with an adapter of its own.

W x becomes W x + (alpha / rank) B A x with W frozen. megatron-core fuses q, k, v and gate, up into one layer; their
adapters stay apart, so that training is that of PEFT on the Hugging Face model and an adapter exports without loss.

Under tensor parallelism the wide side of an adapter is split as its layer is, and only the rank-wide activation crosses
ranks. Shape letters: s sequence, b batch, i input, o output, r rank, /TP this rank's share.
"""

from __future__ import annotations

import hashlib
import math
import re
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from coalm_nemo.config import LoraSection
from coalm_nemo.models.llama import LlamaConfig

ADAPTER = "adapter"
"""Name of the submodule, and so part of every key that an adapter has in a checkpoint."""

FUSED = {
    "self_attention.linear_qkv": ("q", "k", "v"),
    "self_attention.linear_proj": ("o",),
    "mlp.linear_fc1": ("gate", "up"),
    "mlp.linear_fc2": ("down",),
}
"""megatron-core's linear layer -> Llama's projections in it."""

ROW_PARALLEL = ("o", "down")
TOKEN_BLOCK = 256
"""Dropout is drawn in blocks of so many tokens: the same ones however the sequence is split over ranks or padded."""
FEATURE_BLOCKS = 8
"""Where tensor parallelism splits the features, in as many blocks of them: the same ones on 1, 2, 4 and 8 ranks."""


def widths(llama: LlamaConfig) -> dict[str, tuple[int, int]]:
    """(input, output) features of each projection, over all ranks."""
    h, f = llama.hidden_size, llama.ffn_size
    q, kv = llama.num_heads * llama.head_dim, llama.num_kv_heads * llama.head_dim
    return {"q": (h, q), "k": (h, kv), "v": (h, kv), "o": (q, h), "gate": (h, f), "up": (h, f), "down": (f, h)}


def num_parameters(llama: LlamaConfig, lora: LoraSection) -> int:
    """Of all adapters together."""
    return llama.num_layers * lora.rank * sum(sum(widths(llama)[target]) for target in lora.targets)


_STEP_SEED = [0]


def seed_dropout(seed: int) -> None:
    """What dropout is drawn from until the next call; torch's own seed differs between tensor-parallel ranks."""
    _STEP_SEED[0] = seed


class LowRank(torch.nn.Module):
    """One projection's adapter: `a` [r, i] and `b` [o, r], the wide side this rank's share."""

    def __init__(
        self, name: str, width: tuple[int, int], rank: int, config: Any, seed_name: str, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout, self.seed_name = dropout, seed_name
        self.row_parallel = name in ROW_PARALLEL
        self.sequence_parallel = config.sequence_parallel
        self.tp = parallel_state.get_tensor_model_parallel_group()
        a, b = draw_a(seed_name, rank, width[0]), torch.zeros(width[1], rank)
        size, index = self.tp.size(), self.tp.rank()
        a = a.chunk(size, dim=1)[index] if self.row_parallel else a
        b = b if self.row_parallel else b.chunk(size, dim=0)[index]
        device = torch.cuda.current_device()
        self.a, self.b = (torch.nn.Parameter(t.to(config.params_dtype).contiguous().to(device)) for t in (a, b))
        split, whole = (self.a, self.b) if self.row_parallel else (self.b, self.a)
        set_tensor_model_parallel_attributes(split, True, 1 if self.row_parallel else 0, 1)
        whole.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]  # it sees a part of the tokens

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, i] as the layer's input is laid out -> [s, b, o] as its output is."""
        if self.dropout and self.training:
            x = x * self._kept(x)
        narrow = F.linear(x, self.a)
        if self.row_parallel:
            reduce = reduce_scatter_to_sequence_parallel_region if self.sequence_parallel else _reduce
            return F.linear(reduce(narrow), self.b)
        spread = (
            gather_from_sequence_parallel_region if self.sequence_parallel else copy_to_tensor_model_parallel_region
        )
        return F.linear(spread(narrow), self.b)

    def _kept(self, x: Tensor) -> Tensor:
        """Inverted dropout's factor of each element, the same in a recomputed pass, and on every tensor-parallel layout.

        A pure function of the step's seed, layer, projection and place; so the micro-batches of a step drop alike.
        Context parallelism has places of its own.
        """
        axis = 2 if self.row_parallel else 0
        index = self.tp.rank() if self.row_parallel or self.sequence_parallel else 0
        own = x.size(axis)
        size = max(1, own * self.tp.size() // FEATURE_BLOCKS) if self.row_parallel else TOKEN_BLOCK
        first, last = index * own // size, -(-(index + 1) * own // size)
        shape = list(x.shape)
        shape[axis] = size
        drawn = [torch.rand(shape, generator=self._generator(b, x.device), device=x.device) for b in range(first, last)]
        mine = torch.cat(drawn, axis).narrow(axis, index * own - first * size, own)
        return (mine >= self.dropout).to(x.dtype) / (1 - self.dropout)

    def _generator(self, block: int, device: torch.device) -> torch.Generator:
        name = f"{_STEP_SEED[0]}:{self.seed_name}:{block}:{parallel_state.get_context_parallel_rank()}"
        return torch.Generator(device).manual_seed(_seed_of(name))


def _reduce(x: Tensor) -> Tensor:
    return reduce_from_tensor_model_parallel_region(x)


def _seed_of(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


def draw_a(name: str, rank: int, width: int) -> Tensor:
    """PEFT's start of A, uniform within 1/sqrt(i) (Kaiming with a = sqrt(5)), from the name: the same on every layout."""
    generator = torch.Generator().manual_seed(_seed_of(name))
    return (torch.rand(rank, width, generator=generator) * 2 - 1) / math.sqrt(width)


class Adapter(torch.nn.Module):
    """The adapters of one (fused) linear layer, added to its output."""

    def __init__(self, parts: dict[str, LowRank], scale: float, groups: int, names: tuple[str, ...]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.parts = tuple(parts)
        self.scale = scale
        self.groups = groups
        self.names = names

    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        """[s, b, i] -> [s, b, o/TP], in the fused layer's order of features; `like` is the layer's own output."""
        outputs = {name: getattr(self, name)(x) for name in self.parts}
        if self.names == ("q", "k", "v"):
            return self.scale * self._by_group(outputs, like)
        if self.names == ("gate", "up"):
            half = like.new_zeros((*like.shape[:-1], like.shape[-1] // 2))
            return self.scale * torch.cat([outputs.get(name, half) for name in self.names], dim=-1)
        return self.scale * outputs[self.names[0]]

    def _by_group(self, outputs: dict[str, Tensor], like: Tensor) -> Tensor:
        """Rows of the fused layer stand by group: its query heads, its key, its value."""
        lead, a_group = like.shape[:-1], like.shape[-1] // self.groups
        one = a_group // (self.heads_a_group + 2)
        width = {"q": one * self.heads_a_group, "k": one, "v": one}
        parts = [
            outputs[n].unflatten(-1, (self.groups, width[n]))
            if n in outputs
            else like.new_zeros((*lead, self.groups, width[n]))
            for n in ("q", "k", "v")
        ]
        return torch.cat(parts, dim=-1).flatten(-2)

    heads_a_group: int = 1

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Each matrix split as its layer is."""
        axes = {}
        for name in self.parts:
            row = getattr(self, name).row_parallel
            axes[f"{name}.a" if row else f"{name}.b"] = 1 if row else 0
        group = parallel_state.get_tensor_model_parallel_group()
        dp_cp = parallel_state.get_data_parallel_group(with_context_parallel=True)
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(
            state, prefix, axes, sharded_offsets, tp_group=group, dp_cp_group=dp_cp
        )


def add_adapters(model: Any, llama: LlamaConfig, lora: LoraSection, seed: int) -> None:
    """Freeze `model` (a pipeline chunk) and put adapters on the linear layers that `lora.targets` name."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in model.decoder.layers:
        for path, names in FUSED.items():
            wanted = [n for n in names if n in lora.targets]
            if wanted:
                _adapt(layer, path, names, wanted, llama, lora, seed)
    if model.pre_process:
        # Recomputation runs a layer's backward pass only where an input wants a gradient.
        model.embedding.register_forward_hook(lambda module, args, output: output.requires_grad_(True))


def _adapt(
    layer: Any, path: str, names: tuple[str, ...], wanted: list[str], llama: LlamaConfig, lora: LoraSection, seed: int
) -> None:
    linear = layer.get_submodule(path)
    parts = {
        name: LowRank(
            name, widths(llama)[name], lora.rank, layer.config, f"{seed}:{layer.layer_number}:{name}", lora.dropout
        )
        for name in wanted
    }
    groups = llama.num_kv_heads // parallel_state.get_tensor_model_parallel_world_size()
    adapter = Adapter(parts, lora.alpha / lora.rank, groups, names)
    adapter.heads_a_group = llama.num_heads // llama.num_kv_heads
    own_state = linear.sharded_state_dict
    linear.add_module(ADAPTER, adapter)
    linear.register_forward_hook(_add_to_output)

    def sharded_state_dict(
        prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> ShardedStateDict:
        """The layer takes its adapter's matrices for tensors of its own that are not split: they are put right here."""
        state = own_state(prefix, sharded_offsets, metadata)
        state = {k: v for k, v in state.items() if not k.startswith(f"{prefix}{ADAPTER}.")}
        return {**state, **adapter.sharded_state_dict(f"{prefix}{ADAPTER}.", sharded_offsets, metadata)}

    linear.sharded_state_dict = sharded_state_dict


def _add_to_output(linear: Any, args: tuple[Any, ...], output: Any) -> Any:
    result, bias = output
    return result + linear.adapter(input_of_matrix(linear, args[0]), result), bias


def input_of_matrix(linear: Any, x: Tensor) -> Tensor:
    """What the matrix sees. Transformer Engine fuses the norm into some layers; it is done once more for the adapter."""
    weight = getattr(linear, "layer_norm_weight", None)
    if weight is None:
        return x
    return F.rms_norm(x, (x.shape[-1],), weight, linear.eps)


def is_adapter_key(key: str) -> bool:
    """Whether a key of a state dict is an adapter's."""
    return re.search(rf"\.{ADAPTER}\.", key) is not None
