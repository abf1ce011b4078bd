"""The one check of a whole run: what it refuses, and what it derives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coalm_nemo.config import RunConfig, build_config, known_keys
from coalm_nemo.errors import UserError
from coalm_nemo.models.llama import LlamaConfig, parse_llama_config
from coalm_nemo.validate import AT_LEAST_ONE, CHOICES, NOT_NEGATIVE, Layout, check_run


def llama(**changes: Any) -> LlamaConfig:
    raw = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 321, "max_position_embeddings": 8192,
    }  # fmt: skip
    return parse_llama_config(raw | changes)


def check(*words: str, world: int = 1, model: LlamaConfig | None = None) -> Layout:
    return check_run(build_config(RunConfig(), [], words), model or llama(), world)


def test_one_rank() -> None:
    layout = check()
    assert (layout.data_parallel, layout.micro_batches, layout.sequence_parallel, layout.sequence_multiple) == (
        1,
        8,
        False,
        1,
    )


def test_all_dimensions_at_once() -> None:
    words = [
        "parallel.tensor=2",
        "parallel.pipeline=2",
        "parallel.context=2",
        "batch.global_size=16",
        "batch.micro_size=2",
    ]
    layout = check(*words, world=16)
    assert (layout.data_parallel, layout.micro_batches, layout.sequence_parallel) == (2, 4, True)
    assert layout.sequence_multiple == 2 * 2 * 2
    assert check(*words, "parallel.sequence=false", world=16).sequence_multiple == 4


def test_what_is_derived_is_said() -> None:
    layout = check("parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true", world=4)
    notes = {d.name: d for d in layout.derived}
    assert notes["data-parallel ranks"].value == 1 and "TP 2 x PP 2" in notes["data-parallel ranks"].why
    assert notes["micro-batches a step"].value == 8
    assert notes["bubble"].value == "11.1%"
    assert notes["padded vocabulary"].value == 322
    assert notes["sequence lengths"].value == "multiples of 2"
    assert {d.name for d in check().derived} >= {"sequence parallelism", "parameters"}


def test_interleaving_shrinks_the_bubble() -> None:
    plain, interleaved = (
        {d.name: d.value for d in check("parallel.pipeline=2", f"parallel.virtual_pipeline={v}", world=2).derived}
        for v in (1, 2)
    )
    assert (plain["bubble"], interleaved["bubble"]) == ("11.1%", "5.9%")


REFUSED = [
    (["parallel.tensor=3"], 3, "8 attention heads do not divide by parallel.tensor=3"),
    (["parallel.tensor=8"], 8, "4 key/value groups do not divide"),
    (["parallel.pipeline=3"], 3, "8 layers do not divide .* = 3"),
    (["parallel.pipeline=4", "parallel.virtual_pipeline=4"], 4, "8 layers do not divide .* = 16"),
    (["parallel.pipeline=2", "parallel.count_embedding_and_loss=true", "parallel.virtual_pipeline=2"], 2, "plus the"),
    (["parallel.virtual_pipeline=2"], 1, "needs parallel.pipeline above 1"),
    (["parallel.tensor=2"], 3, "start a multiple of 2 ranks"),
    (["batch.global_size=6"], 4, "batch.global_size=6 does not divide"),
    (["parallel.pipeline=2", "parallel.virtual_pipeline=2", "batch.global_size=3"], 2, "global_size a multiple of 2"),
    (["parallel.context=2", "train.seq_len_tokens=510"], 2, "does not divide by 4"),
    (["parallel.tensor=2", "train.seq_len_tokens=511"], 2, "does not divide by 2"),
    (["train.seq_len_tokens=8193"], 1, "above the model's 8192 positions"),
    (["optimizer.min_lr=1"], 1, "is above optimizer.lr"),
    (["optimizer.lr=.inf"], 1, "optimizer.lr is inf"),
    (["optimizer.beta1=1"], 1, "optimizer.beta1 is 1.0; it must be at least 0 and below 1"),
    (["precision.dtype=fp8_hybrid"], 1, "use one of fp32, bf16, fp8_current"),
    (["precision.fp8_params=true"], 1, "goes with Transformer Engine's FP8, and precision.dtype is bf16"),
    (["precision.dtype=fp8_delayed", "precision.bf16_layers_at_end=1"], 1, "cannot go with fp8_delayed"),
    (["precision.dtype=fp8_current", "precision.bf16_layers_at_start=-1"], 1, "must not be negative"),
    (["precision.dtype=fp8_current", "train.seq_len_tokens=500"], 1, "FP8 products want a multiple of 16"),
    (["precision.dtype=fp8_current", "precision.fp8_params=true", "parallel.distributed_optimizer=false"], 1,
     "needs parallel.distributed_optimizer=true"),
    (["precision.dtype=fp8_emulated_current", "precision.fp8_params=true"], 1, "goes with Transformer"),
    (["precision.dtype=fp8_emulated_delayed", "precision.gradients=bf16"], 1, "and the weights are fp32"),
    (["precision.dtype=fp8_emulated_delayed", "train.seq_len_tokens=500"], 1, "FP8 products want a multiple of 16"),
    (["parallel.overlap_param_gather=true"], 1, "needs parallel.overlap_grad_reduce=true"),
    (["data.packing=true", "batch.micro_size=2"], 1, "wants batch.micro_size=1"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "world", "sentence"), REFUSED, ids=[" ".join(r[0]) for r in REFUSED])
def test_refused(words: list[str], world: int, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check(*words, world=world)


def test_counting_the_embedding_and_the_loss() -> None:
    """6 layers and two more are 8: four chunks of two."""
    words = ["parallel.pipeline=4", "parallel.count_embedding_and_loss=true"]
    assert check(*words, world=4, model=llama(num_hidden_layers=6)).data_parallel == 1


def test_ffn_against_tensor() -> None:
    with pytest.raises(UserError, match="intermediate_size 97"):
        check("parallel.tensor=2", world=2, model=llama(intermediate_size=97))


@pytest.mark.parametrize("key", CHOICES)
def test_choices(key: str) -> None:
    default = build_config(RunConfig())
    section, name = key.split(".")
    assert getattr(getattr(default, section), name) in CHOICES[key]
    with pytest.raises(UserError, match=f"{key} is 'else'; use one of"):
        check(f"{key}=else")


@pytest.mark.parametrize("key", [*AT_LEAST_ONE, *NOT_NEGATIVE])
def test_ranges(key: str) -> None:
    assert key in known_keys()
    with pytest.raises(UserError, match=key):
        check(f"{key}=-1")


SIZES = st.sampled_from([1, 2, 3, 4, 6, 8])


@settings(max_examples=200, deadline=None)
@given(SIZES, SIZES, SIZES, SIZES, st.integers(1, 64), st.integers(1, 32), st.integers(1, 4))
def test_what_passes_adds_up(tp: int, pp: int, vp: int, cp: int, world: int, batch: int, micro: int) -> None:
    """Whatever is accepted deals ranks, layers, heads, sequence and batch without a rest; the rest is one sentence."""
    run = RunConfig()
    run.parallel.tensor, run.parallel.pipeline, run.parallel.virtual_pipeline, run.parallel.context = tp, pp, vp, cp
    run.batch.global_size, run.batch.micro_size = batch, micro
    model = llama(num_attention_heads=24, num_key_value_heads=12, num_hidden_layers=24)
    try:
        layout = check_run(run, model, world)
    except UserError as e:
        assert "\n" not in str(e) and len(str(e)) < 300
        return
    assert tp * pp * cp * layout.data_parallel == world
    assert layout.micro_batches * micro * layout.data_parallel == batch
    assert model.num_layers % (pp * vp) == model.num_heads % tp == model.num_kv_heads % tp == 0
    assert run.train.seq_len_tokens % layout.sequence_multiple == 0
    assert layout.sequence_multiple == (tp if tp > 1 else 1) * (2 * cp if cp > 1 else 1)
    assert vp == 1 or (pp > 1 and layout.micro_batches % pp == 0)


@pytest.mark.parametrize("recipe", ["current", "blockwise", "delayed"])
def test_fp8_reaches_megatron(recipe: str) -> None:
    """What Transformer Engine is told; without it, megatron-core would train on in bf16 and say nothing."""
    from coalm_nemo.models.gpt import transformer_config
    from coalm_nemo.platform import Platform

    run = build_config(RunConfig(), [], [f"precision.dtype=fp8_{recipe}"])
    config = transformer_config(llama(), run, Platform("cpu", "gloo", transformer_engine=False))
    megatrons = {"current": "tensorwise", "blockwise": "blockwise", "delayed": "delayed"}[recipe]
    assert (config.fp8, config.fp8_recipe, config.params_dtype) == ("hybrid", megatrons, torch.bfloat16)
    with pytest.raises(UserError, match="needs Transformer Engine"):
        Platform("cpu", "gloo", transformer_engine=False).refuse(run.precision.dtype)
    Platform("cuda", "nccl", transformer_engine=True).refuse(run.precision.dtype)
