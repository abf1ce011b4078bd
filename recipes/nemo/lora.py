"""LoRA with an adapter a projection, as ours and PEFT's. Imported only where NeMo is.

NeMo 2.7's CanonicalLoRA lays all queries, then all keys, then all values over a fused layer whose rows stand by group
(its query heads, its key, its value), so that with grouped queries a query's adapter reaches keys and values; and it
fails where a projection of a fused layer has no adapter. Both are put right here.
"""

# No `from __future__ import annotations` here: nemo_run's command reads the arguments' types, not their names.

from dataclasses import dataclass
from typing import Any

import torch
from nemo.collections.llm.peft.canonical_lora import (
    CanonicalLoRA,
    LoRALinearSplitFC1UpGate,
    LoRALinearSplitQKV,
    ModuleDict,
)
from torch import Tensor, nn

TARGETS = {
    "q": "linear_q",
    "k": "linear_k",
    "v": "linear_v",
    "o": "linear_proj",
    "gate": "linear_fc1_gate",
    "up": "linear_fc1_up",
    "down": "linear_fc2",
}
"""Our name of a projection -> NeMo's."""


class GroupedQKV(LoRALinearSplitQKV):  # type: ignore[misc]
    """Adapters of q, k and v, or some of them, on the fused layer."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, i] -> ([s, b, o/TP], bias)."""
        output, bias, normed = self.base_linear_forward(x)
        config = self.to_wrap.config
        size, heads = config.kv_channels, config.num_attention_heads // config.num_query_groups
        groups = output.shape[-1] // (size * (heads + 2))
        widths = {"adapter_q": heads * size, "adapter_k": size, "adapter_v": size}
        shape = (*output.shape[:-1], groups)
        laid = [
            self.adapter[name](normed).reshape(*shape, width)
            if name in self.adapter
            else output.new_zeros(*shape, width)
            for name, width in widths.items()
        ]
        return output + torch.cat(laid, dim=-1).flatten(-2), bias


class SplitFC1(LoRALinearSplitFC1UpGate):  # type: ignore[misc]
    """Adapters of gate and up, or one of them, on the fused layer."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, i] -> ([s, b, o/TP], bias)."""
        output, bias, normed = self.base_linear_forward(x)
        half = (*output.shape[:-1], output.shape[-1] // 2)
        laid = [
            self.adapter[name](normed).reshape(half) if name in self.adapter else output.new_zeros(half)
            for name in ("adapter_gate", "adapter_up")
        ]
        return output + torch.cat(laid, dim=-1), bias


@dataclass
class LlamaLoRA(CanonicalLoRA):  # type: ignore[misc]
    """CanonicalLoRA for Llama. A starts uniform within 1/sqrt(i) (PEFT's Kaiming), drawn by NeMo; B starts at zero."""

    alpha: float = 32.0
    lora_A_init_method: str = "kaiming"

    def transform(self, m: nn.Module, name: str | None = None, prefix: str | None = None) -> Any:
        """The module with its adapters, or the module itself where it is none of the targets."""
        wrapped = super().transform(m, name, prefix)
        for theirs, ours in ((LoRALinearSplitQKV, GroupedQKV), (LoRALinearSplitFC1UpGate, SplitFC1)):
            if type(wrapped) is theirs:
                kept = ModuleDict({key: part for key, part in wrapped.adapter.items() if part is not None})
                return ours(wrapped.to_wrap, kept)
        return wrapped
