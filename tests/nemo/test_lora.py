"""NeMo's adapters, as the recipes put them on, compute what ours compute; and the model's frequencies are ours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.nemo.needs import NEEDS_NEMO

pytestmark = NEEDS_NEMO


@pytest.fixture
def one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """megatron-core's groups over this process alone, and its own linear layers: NeMo looks for Transformer Engine's."""
    import torch
    from megatron.core import parallel_state
    from nemo.collections.llm.peft import utils

    from coalm_nemo.platform import Platform
    from coalm_nemo.training.setup import seed_everything

    monkeypatch.setattr(utils, "HAVE_TE", False)
    Platform("cpu", "gloo", transformer_engine=False).activate(0)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    seed_everything(0, 0)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def linear(width_in: int, width_out: int) -> Any:
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1, hidden_size=64, num_attention_heads=4, num_query_groups=2, kv_channels=16,
        use_cpu_initialization=True, add_bias_linear=False, gradient_accumulation_fusion=False,
    )  # fmt: skip
    return ColumnParallelLinear(width_in, width_out, config=config, init_method=config.init_method, bias=False)


@pytest.mark.parametrize("targets", [["q", "k", "v"], ["q", "v"], ["k"]])
def test_grouped_queries_get_their_own_adapter(one_rank: None, targets: list[str]) -> None:
    """Rows of the fused layer stand by group: 2 queries, a key, a value of 16 features each."""
    import torch

    from recipes.nemo.lora import TARGETS, LlamaLoRA

    layer = linear(64, (4 + 2 * 2) * 16)
    peft = LlamaLoRA(target_modules=[TARGETS[t] for t in targets], dim=4, alpha=8.0)
    wrapped = peft.transform(layer, name="linear_qkv", prefix="decoder.layers.0.self_attention")
    assert set(wrapped.adapter) == {f"adapter_{t}" for t in targets}
    for part in wrapped.adapter.values():
        torch.nn.init.normal_(part.linear_out.weight)
    x = torch.randn(5, 1, 64)
    added = (wrapped(x)[0] - layer(x)[0]).reshape(5, 2, 4, 16)
    found = {
        "q": added[:, :, :2].reshape(5, -1),
        "k": added[:, :, 2].reshape(5, -1),
        "v": added[:, :, 3].reshape(5, -1),
    }
    for name, value in found.items():
        if name in targets:
            part = wrapped.adapter[f"adapter_{name}"]
            wanted = (x @ part.linear_in.weight.T @ part.linear_out.weight.T * 2.0).reshape(5, -1)
            torch.testing.assert_close(value, wanted, atol=1e-4, rtol=1e-4)
        else:
            assert not value.any()


@pytest.mark.parametrize("targets", [["gate", "up"], ["up"]])
def test_gate_and_up_get_their_own_adapter(one_rank: None, targets: list[str]) -> None:
    import torch

    from recipes.nemo.lora import TARGETS, LlamaLoRA

    layer = linear(64, 2 * 96)
    peft = LlamaLoRA(target_modules=[TARGETS[t] for t in targets], dim=4, alpha=8.0)
    wrapped = peft.transform(layer, name="linear_fc1", prefix="decoder.layers.0.mlp")
    for part in wrapped.adapter.values():
        torch.nn.init.normal_(part.linear_out.weight)
    x = torch.randn(5, 1, 64)
    added = (wrapped(x)[0] - layer(x)[0]).reshape(5, 2, 96)
    for number, name in enumerate(("gate", "up")):
        if name in targets:
            part = wrapped.adapter[f"adapter_{name}"]
            wanted = (x @ part.linear_in.weight.T @ part.linear_out.weight.T * 2.0).reshape(5, -1)
            torch.testing.assert_close(added[:, number], wanted, atol=1e-4, rtol=1e-4)
        else:
            assert not added[:, number].any()


def test_the_models_frequencies_are_ours() -> None:
    """Llama 3.1's scaling, by NeMo's function with the recipe's numbers."""
    import torch
    from nemo.collections.llm.gpt.model.llama import apply_rope_scaling

    from coalm_nemo.models.rope import rope_inv_freq
    from recipes.nemo.model import LLAMA31_ROPE, find_llama
    from tests.nemo.needs import make, ready

    run = ready("coalm_8b")
    config = make(run, 8).model.config
    plain = 1.0 / (config.rotary_base ** (torch.arange(0, 128, 2, dtype=torch.float32) / 128))
    theirs = apply_rope_scaling(
        plain, config.scale_factor, config.low_freq_factor, config.high_freq_factor, config.old_context_len
    )
    assert find_llama(run).rope_scaling == LLAMA31_ROPE
    torch.testing.assert_close(theirs, rope_inv_freq(find_llama(run)), rtol=1e-6, atol=0)
