"""RunConfig and LlamaConfig -> NeMo's model and adapters, as `nemo_run.Config`s."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from coalm_nemo.config import RunConfig
from coalm_nemo.errors import UserError
from coalm_nemo.models.llama import LlamaConfig, RopeScaling

LLAMA31_ROPE = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)
"""Of Llama 3.1's and 3.3's config.json; the planner's shapes leave it out, because it costs nothing."""


DEFERRAL = {"defer_embedding_wgrad_compute": False, "wgrad_deferral_limit": 0}
"""Fields that want a pipeline, and what they are without one."""


def find_llama(run: RunConfig) -> LlamaConfig:
    """From `model.hf_path` where it is at hand, else Llama 3.1 of `model.shape`. Raises UserError without both."""
    from coalm_nemo.models.llama import load_llama_config
    from coalm_nemo.planning.shapes import find_shape

    if not run.model.hf_path:
        raise UserError("give model.hf_path=HF_DIR (hf= in a recipe's name), the Hugging Face directory of the model")
    if Path(run.model.hf_path).is_dir() or not run.model.shape:
        return load_llama_config(Path(run.model.hf_path))
    return replace(find_shape(run.model.shape)[1], rope_scaling=LLAMA31_ROPE)


def model(run: RunConfig, llama: LlamaConfig) -> Any:
    """NeMo's LlamaModel with its tokenizer. What the strategy and the precision plugin set is theirs."""
    import nemo_run
    from nemo.collections.common.tokenizers import AutoTokenizer
    from nemo.collections.llm import LlamaModel

    tokenizer = nemo_run.Config(AutoTokenizer, pretrained_model_name=run.model.hf_path)
    return nemo_run.Config(LlamaModel, config=model_config(run, llama), tokenizer=tokenizer)


def model_config(run: RunConfig, llama: LlamaConfig) -> Any:
    """Shape, loss, recomputation and kernels."""
    import nemo_run
    from nemo.collections.llm.gpt.model.llama import Llama31Config
    from nemo.collections.llm.gpt.model.llama import LlamaConfig as NemoLlamaConfig

    kind, rope = NemoLlamaConfig, {}
    if llama.rope_scaling is not None:
        scaling = llama.rope_scaling
        kind = Llama31Config
        rope = {
            "scale_factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "old_context_len": scaling.original_max_positions,
        }
    return nemo_run.Config(
        kind,
        num_layers=llama.num_layers,
        hidden_size=llama.hidden_size,
        ffn_hidden_size=llama.ffn_size,
        num_attention_heads=llama.num_heads,
        num_query_groups=llama.num_kv_heads,
        kv_channels=llama.head_dim,
        vocab_size=llama.vocab_size,
        seq_length=run.train.seq_len_tokens,
        layernorm_epsilon=llama.rms_norm_eps,
        rotary_base=int(llama.rope_theta) if llama.rope_theta.is_integer() else llama.rope_theta,
        share_embeddings_and_output_weights=llama.tied_embeddings,
        init_method_std=llama.init_std,
        calculate_per_token_loss=True,  # a token weighs the same wherever it falls
        **rope,
        **_kernels(run),
        **_recompute(run.train.recompute),
    )


def _kernels(run: RunConfig) -> dict[str, Any]:
    """As in models/gpt.py: NeMo's own defaults are others, or hang on what is installed.

    What wants a pipeline is left to the callback of trainer.py: here NeMo does not know of one yet.
    """
    from coalm_nemo.models.gpt import speed_arguments

    interleaved = run.parallel.virtual_pipeline > 1
    return {
        **{name: value for name, value in speed_arguments(run).items() if name not in DEFERRAL},
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
    }


def _recompute(recompute: str) -> dict[str, Any]:
    if recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]} if recompute != "none" else {}


def peft(run: RunConfig) -> Any:
    """Adapters, or None."""
    if not run.lora.rank:
        return None
    import nemo_run

    from recipes.nemo.lora import TARGETS, LlamaLoRA

    return nemo_run.Config(
        LlamaLoRA,
        target_modules=[TARGETS[target] for target in run.lora.targets],
        dim=run.lora.rank,
        alpha=run.lora.alpha,
        dropout=0.0,
    )
