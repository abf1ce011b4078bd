"""Plain-torch layers for machines without Transformer Engine: RMSNorm under sequence parallelism, attention over
packed rows, attention under context parallelism. They have the constructors that megatron-core's specs expect.

Shape letters: s sequence, b batch, t packed tokens (s*b), h heads, g key/value groups, d head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from coalm_nemo.models.context_parallel import gather_sequence, row_bounds, zigzag_order


class TorchRMSNorm(torch.nn.Module):
    """RMSNorm (Zhang & Sennrich 2019, eq. 4) in fp32, as transformers' LlamaRMSNorm.

    Under sequence parallelism each rank sees a part of the tokens: the mark on the weight makes megatron-core sum its
    gradient over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class TorchAttention(MegatronModule):
    """Causal core attention on torch's scaled_dot_product_attention.

    Unpacked: query [s, b, h, d], key and value [s, b, g, d] -> [s, b, h*d]. Rows are padded at their end only, so the
    causal mask already keeps padding out of every real token's sight.
    Packed (`thd`): query [t, h, d] -> [t, h*d], block-diagonal over `cu_seqlens`.
    Under context parallelism a rank holds two chunks of every row (zigzag, as Transformer Engine cuts them); keys and
    values of the other ranks are gathered.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.cp_group = pg_collection.cp if pg_collection is not None else parallel_state.get_context_parallel_group()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        packed = packed_seq_params is not None
        if packed:  # one batch entry: [t, h, d] -> [t, 1, h, d]
            query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        tokens = query.size(0) * self.cp_group.size()
        bounds = row_bounds(packed_seq_params.cu_seqlens_q) if packed_seq_params is not None else [(0, tokens)]
        if self.cp_group.size() > 1:
            out = self._context_parallel(query, key, value, bounds)
        else:
            parts = [self._attend(query[a:b], key[a:b], value[a:b], None) for a, b in bounds]
            out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out.flatten(1) if packed else out.flatten(2)

    def _context_parallel(self, query: Tensor, key: Tensor, value: Tensor, bounds: list[tuple[int, int]]) -> Tensor:
        size, rank = self.cp_group.size(), self.cp_group.rank()
        # order[rank]: global positions held by that rank, in its order
        order = [part.to(query.device) for part in zigzag_order(bounds, size)]
        inverse = torch.argsort(torch.cat(order))
        key = gather_sequence(key, self.cp_group)[inverse]
        value = gather_sequence(value, self.cp_group)[inverse]
        mine, parts, start = order[rank], [], 0
        for a, b in bounds:
            length = (b - a) // size
            positions = mine[start : start + length] - a
            mask = positions[:, None] >= torch.arange(b - a, device=mine.device)[None, :]
            parts.append(self._attend(query[start : start + length], key[a:b], value[a:b], mask))
            start += length
        return torch.cat(parts)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """[s, b, h, d] each -> [s, b, h, d]; without a mask, causal."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.softmax_scale,
            enable_gqa=q.size(1) != k.size(1),
        )
        return out.permute(2, 0, 1, 3)
