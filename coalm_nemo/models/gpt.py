"""LlamaConfig and RunConfig -> megatron-core's GPTModel, one a pipeline chunk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from coalm_nemo.config import RunConfig
from coalm_nemo.models.llama import LlamaConfig
from coalm_nemo.models.rope import rope_inv_freq
from coalm_nemo.platform import Platform
from coalm_nemo.speed import defers_embedding, overlaps_tensor

FP8_RECIPES = {"current": "tensorwise", "blockwise": "blockwise", "delayed": "delayed"}
"""Our name of a scaling recipe -> megatron-core's."""


class LlamaModel(GPTModel):
    """GPTModel whose padded vocabulary entries take no part in the softmax.

    The vocabulary is padded up to a multiple of the tensor-parallel size. megatron-core lets the padding compete for
    probability; a loss that is the same on every layout must not.
    """

    def __init__(self, *args: Any, true_vocab_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        per_rank = self.vocab_size // self.pg_collection.tp.size()
        self.first_padding = max(0, true_vocab_size - per_rank * self.pg_collection.tp.rank())
        self.has_padding = self.first_padding < per_rank

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [b, s], logits [s, b, vocab/TP] -> loss a token, fp32 [b, s]."""
        if self.has_padding:
            logits[..., self.first_padding :] = float("-inf")
        return super().compute_language_model_loss(labels, logits)


def transformer_config(llama: LlamaConfig, run: RunConfig, platform: Platform) -> TransformerConfig:
    """megatron-core's TransformerConfig for this model, layout and platform."""
    dtype = getattr(torch, run.precision.weights)
    return TransformerConfig(
        num_layers=llama.num_layers,
        hidden_size=llama.hidden_size,
        ffn_hidden_size=llama.ffn_size,
        num_attention_heads=llama.num_heads,
        num_query_groups=llama.num_kv_heads,
        kv_channels=llama.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=llama.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=llama.init_std,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        calculate_per_token_loss=True,
        **_parallel_arguments(run),
        **_fp8_arguments(run),
        **_recompute_arguments(run.train.recompute),
        **_platform_arguments(run, platform),
        **speed_arguments(run),
    )


def _parallel_arguments(run: RunConfig) -> dict[str, Any]:
    parallel = run.parallel
    counted = parallel.count_embedding_and_loss
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        "context_parallel_size": parallel.context,
        "sequence_parallel": parallel.sequence and parallel.tensor > 1,
        "account_for_embedding_in_pipeline_split": counted,
        "account_for_loss_in_pipeline_split": counted,
    }


def _fp8_arguments(run: RunConfig) -> dict[str, Any]:
    """Transformer Engine's FP8 through megatron-core, which without Transformer Engine ignores all of it silently."""
    precision = run.precision
    if not precision.fp8:
        return {}
    start, end = precision.bf16_layers_at_start, precision.bf16_layers_at_end
    return {
        "fp8": "hybrid",
        "fp8_recipe": FP8_RECIPES[precision.fp8],
        "fp8_param": precision.fp8_params,
        "fp8_wgrad": precision.fp8_weight_gradients,
        "fp8_amax_history_len": precision.amax_history_len if precision.fp8 == "delayed" else 1,
        "fp8_amax_compute_algo": "max" if precision.fp8 == "delayed" else "most_recent",
        "first_last_layers_bf16": bool(start or end),
        "num_layers_at_start_in_bf16": start,
        "num_layers_at_end_in_bf16": end,
    }


def _recompute_arguments(recompute: str) -> dict[str, Any]:
    if recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}


def _platform_arguments(run: RunConfig, platform: Platform) -> dict[str, Any]:
    """Fused kernels and communication: what CUDA has, and what gloo gets right."""
    interleaved = run.parallel.virtual_pipeline > 1
    if platform.is_cuda:
        return {
            "bias_activation_fusion": True,  # SwiGLU and the residual's addition, by torch's compiler
            "bias_dropout_fusion": True,
            "apply_rope_fusion": platform.transformer_engine,
            "deallocate_pipeline_outputs": True,
            "overlap_p2p_comm": interleaved,
            "batch_p2p_comm": not interleaved,
        }
    # On gloo, batched point-to-point under the interleaved schedule gives wrong gradients without an error, and so
    # does freeing the outputs early. Both stay off.
    return {
        "use_cpu_initialization": True,
        "persist_layer_norm": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "deallocate_pipeline_outputs": False,
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
    }


def speed_arguments(run: RunConfig) -> dict[str, Any]:
    """The switches of `speed`; what a machine has not is refused before (coalm_nemo/speed.py)."""
    speed = run.speed
    deferral = {"defer_embedding_wgrad_compute": True, "wgrad_deferral_limit": speed.deferral_limit}
    return {
        "tp_comm_overlap": overlaps_tensor(run),
        "gradient_accumulation_fusion": speed.gradient_fusion,
        "cross_entropy_loss_fusion": speed.fused_loss,
        "cross_entropy_fusion_impl": "native",
        **(deferral if defers_embedding(run) else {}),
        **({"cuda_graph_impl": "local"} if speed.cuda_graphs else {}),
    }


def block_spec(config: TransformerConfig, platform: Platform, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The layers of one pipeline chunk: Transformer Engine's, or ours of plain torch."""
    layer = transformer_engine_layer() if platform.transformer_engine else torch_layer()
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=_final_norm(platform))


def transformer_engine_layer() -> ModuleSpec:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    return get_gpt_layer_with_transformer_engine_spec()


def torch_layer() -> ModuleSpec:
    """megatron-core's local layer with the norm and the core attention replaced."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from coalm_nemo.models.torch_layers import TorchAttention, TorchRMSNorm

    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = TorchRMSNorm
    layer.submodules.pre_mlp_layernorm = TorchRMSNorm
    layer.submodules.self_attention.submodules.core_attention = TorchAttention
    return layer


def _final_norm(platform: Platform) -> Any:
    if platform.transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    from coalm_nemo.models.torch_layers import TorchRMSNorm

    return TorchRMSNorm


def build_chunks(llama: LlamaConfig, run: RunConfig, platform: Platform) -> list[LlamaModel]:
    """This rank's model chunks, on its device, weights not loaded yet. Needs megatron's process groups."""
    precision = run.precision
    if (
        precision.emulated_fp8 or precision.scaled_mm or run.lora.base == "nf4"
    ):  # they go into megatron-core's own linear layers
        platform = replace(platform, transformer_engine=False)
    config = transformer_config(llama, run, platform)
    if run.lora.base == "nf4":  # weights are neither drawn nor touched before they are loaded, a layer at a time
        config.use_cpu_initialization, config.perform_initialization = True, False
    virtual = config.virtual_pipeline_model_parallel_size
    stages: list[int | None] = [None] if virtual is None else list(range(virtual))
    return [_build_chunk(llama, run, platform, config, stage) for stage in stages]


def _build_chunk(
    llama: LlamaConfig, run: RunConfig, platform: Platform, config: TransformerConfig, vp_stage: int | None
) -> LlamaModel:
    model = LlamaModel(
        config=config,
        transformer_layer_spec=block_spec(config, platform, vp_stage),
        vocab_size=llama.padded_vocab_size(run.parallel.tensor),
        true_vocab_size=llama.vocab_size,
        max_sequence_length=run.train.seq_len_tokens,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
        share_embeddings_and_output_weights=llama.tied_embeddings,
        position_embedding_type="rope",
        vp_stage=vp_stage,
    )
    if run.lora.base == "nf4":
        from coalm_nemo.models.nf4 import hollow

        hollow(model)
    if platform.is_cuda:
        model._apply(lambda tensor: tensor if tensor.is_meta else tensor.cuda())
    with torch.device("cpu"):  # a dry run builds everything else on the meta device
        inv_freq = rope_inv_freq(llama)
    model.rotary_pos_emb.inv_freq = inv_freq.to(model.rotary_pos_emb.inv_freq.device)
    if run.precision.emulated_fp8:
        from coalm_nemo.models.fp8_emulation import emulate_fp8

        emulate_fp8(model, run.precision, llama.num_layers)
    if run.precision.scaled_mm:
        from coalm_nemo.models.fp8_scaled_mm import use_scaled_mm

        use_scaled_mm(model, run.precision, llama.num_layers)
    if run.lora.rank:
        from coalm_nemo.models.lora import add_adapters

        add_adapters(model, llama, run.lora, run.run.seed)
    return model
