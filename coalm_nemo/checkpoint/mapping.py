"""Which rows of which Hugging Face tensor make up which rows of which Megatron tensor. Pure Python: no torch.

Both formats store a weight as consecutive rows, and Megatron's fused weights only put blocks of whole rows in another
order. So the whole conversion is a list of row blocks, and its inverse is the same list read the other way.
A vector (a norm's weight) counts as one row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from coalm_nemo.models.llama import LlamaConfig

EMBEDDING_KEY = "embedding.word_embeddings.weight"
OUTPUT_KEY = "output_layer.weight"
HF_EMBEDDING = "model.embed_tokens.weight"
HF_HEAD = "lm_head.weight"
VOCAB_KEYS = (EMBEDDING_KEY, OUTPUT_KEY)
"""Keys whose rows a training checkpoint may hold more of than the vocabulary has (padding up to the TP size)."""

EXTRA_STATE_MODULES = (
    "self_attention.core_attention",  # asked for by Transformer Engine's attention, in other versions than 0.16
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


@dataclass(frozen=True)
class HfTensor:
    """A tensor as Hugging Face names and shapes it."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class HfBlock:
    """`rows` consecutive rows of the Hugging Face tensor `name`, from `row` on."""

    name: str
    row: int
    rows: int


@dataclass(frozen=True)
class MegatronBlock:
    """`rows` consecutive rows of layer `layer` (None: no layer axis) of the Megatron tensor `key`, from `row` on."""

    key: str
    layer: int | None
    row: int
    rows: int


@dataclass(frozen=True)
class MegatronSlice:
    """One layer of a Megatron tensor, or all of a tensor that has no layer axis, as Hugging Face rows in order."""

    key: str
    layer: int | None
    shape: tuple[int, ...]
    """Shape of this slice, without the layer axis: [rows, columns], or [columns] for a vector."""
    global_shape: tuple[int, ...]
    """Shape under which the checkpoint lists the key: the layer axis first, where there is one."""
    blocks: tuple[HfBlock, ...]

    @property
    def rows(self) -> int:
        return self.shape[0] if len(self.shape) == 2 else 1


def megatron_slices(cfg: LlamaConfig) -> list[MegatronSlice]:
    """Every Megatron weight of the model, cut by layer, in the order in which it is written."""
    hidden = cfg.hidden_size
    vocab_shape = (cfg.vocab_size, hidden)
    slices = [_whole(EMBEDDING_KEY, vocab_shape, HF_EMBEDDING)]
    for layer in range(cfg.num_layers):
        slices += _layer_slices(cfg, layer)
    slices.append(_whole("decoder.final_layernorm.weight", (hidden,), "model.norm.weight"))
    if not cfg.tied_embeddings:
        slices.append(_whole(OUTPUT_KEY, vocab_shape, HF_HEAD))
    return slices


def _whole(key: str, shape: tuple[int, ...], name: str) -> MegatronSlice:
    rows = shape[0] if len(shape) == 2 else 1
    return MegatronSlice(key, None, shape, shape, (HfBlock(name, 0, rows),))


def _layer_slices(cfg: LlamaConfig, layer: int) -> Iterator[MegatronSlice]:
    """Key names: megatron-core 0.16 under Transformer Engine; the local layer spec maps its own names onto these."""
    h, f, q_rows = cfg.hidden_size, cfg.ffn_size, cfg.num_heads * cfg.head_dim
    hf = f"model.layers.{layer}"
    gate_up = (HfBlock(f"{hf}.mlp.gate_proj.weight", 0, f), HfBlock(f"{hf}.mlp.up_proj.weight", 0, f))
    parts: list[tuple[str, tuple[int, ...], tuple[HfBlock, ...]]] = [
        ("self_attention.linear_qkv.layer_norm_weight", (h,), (HfBlock(f"{hf}.input_layernorm.weight", 0, 1),)),
        ("self_attention.linear_qkv.weight", (cfg.qkv_rows, h), _qkv_blocks(cfg, f"{hf}.self_attn")),
        ("self_attention.linear_proj.weight", (h, q_rows), (HfBlock(f"{hf}.self_attn.o_proj.weight", 0, h),)),
        ("mlp.linear_fc1.layer_norm_weight", (h,), (HfBlock(f"{hf}.post_attention_layernorm.weight", 0, 1),)),
        ("mlp.linear_fc1.weight", (2 * f, h), gate_up),
        ("mlp.linear_fc2.weight", (h, f), (HfBlock(f"{hf}.mlp.down_proj.weight", 0, h),)),
    ]
    for name, shape, blocks in parts:
        yield MegatronSlice(f"decoder.layers.{name}", layer, shape, (cfg.num_layers, *shape), blocks)


def _qkv_blocks(cfg: LlamaConfig, attention: str) -> tuple[HfBlock, ...]:
    """Megatron's fused QKV rows: group by group, the group's query heads, then its key head, then its value head."""
    d = cfg.head_dim
    q_rows = cfg.num_heads // cfg.num_kv_heads * d
    blocks = []
    for group in range(cfg.num_kv_heads):
        blocks.append(HfBlock(f"{attention}.q_proj.weight", group * q_rows, q_rows))
        blocks.append(HfBlock(f"{attention}.k_proj.weight", group * d, d))
        blocks.append(HfBlock(f"{attention}.v_proj.weight", group * d, d))
    return tuple(blocks)


def hf_tensors(cfg: LlamaConfig) -> list[HfTensor]:
    """Every tensor of the model as Hugging Face stores it, in the order of its layers."""
    h, f, d = cfg.hidden_size, cfg.ffn_size, cfg.head_dim
    layer_shapes = {
        "input_layernorm": (h,),
        "self_attn.q_proj": (cfg.num_heads * d, h),
        "self_attn.k_proj": (cfg.num_kv_heads * d, h),
        "self_attn.v_proj": (cfg.num_kv_heads * d, h),
        "self_attn.o_proj": (h, cfg.num_heads * d),
        "post_attention_layernorm": (h,),
        "mlp.gate_proj": (f, h),
        "mlp.up_proj": (f, h),
        "mlp.down_proj": (h, f),
    }
    tensors = [HfTensor(HF_EMBEDDING, (cfg.vocab_size, h))]
    for layer in range(cfg.num_layers):
        tensors += [HfTensor(f"model.layers.{layer}.{name}.weight", shape) for name, shape in layer_shapes.items()]
    tensors.append(HfTensor("model.norm.weight", (h,)))
    if not cfg.tied_embeddings:
        tensors.append(HfTensor(HF_HEAD, (cfg.vocab_size, h)))
    return tensors


def hf_sources(cfg: LlamaConfig) -> dict[str, tuple[MegatronBlock, ...]]:
    """The inverse: for every Hugging Face tensor, the Megatron blocks that make it up, in its own row order."""
    found: dict[str, list[tuple[int, MegatronBlock]]] = {t.name: [] for t in hf_tensors(cfg)}
    for piece in megatron_slices(cfg):
        row = 0
        for block in piece.blocks:
            found[block.name].append((block.row, MegatronBlock(piece.key, piece.layer, row, block.rows)))
            row += block.rows
    return {name: tuple(b for _, b in sorted(blocks, key=lambda item: item[0])) for name, blocks in found.items()}


def extra_state_keys(cfg: LlamaConfig) -> list[str]:
    """Keys of the module states that a Megatron model may ask for on load: all of them have to be there.

    They are written empty: one local shard, None. Transformer Engine takes that for "no FP8 history" (2.20:
    pytorch/module/base.py, line 1423, and pytorch/ops/op.py, line 713, return at once) and starts with scales of one and
    an empty amax history, as a fresh model does; only the recipe "delayed" has such a history. Its RMSNorm is one of its
    operations and keeps a state too, so the final norm's is asked for beside those of the layers.
    """
    layers = [
        f"decoder.layers.{module}._extra_state/shard_{layer}_{cfg.num_layers}"
        for layer in range(cfg.num_layers)
        for module in EXTRA_STATE_MODULES
    ]
    return [*layers, "decoder.final_layernorm._extra_state/shard_0_1"]
