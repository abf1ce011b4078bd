"""The switches of `speed`: what megatron-core is told, what rules them out, and what a machine lacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import coalm_nemo.speed
from coalm_nemo.config import RunConfig, build_config
from coalm_nemo.errors import UserError
from coalm_nemo.models.gpt import transformer_config
from coalm_nemo.planning.adapt import expected
from coalm_nemo.planning.hardware import GIB
from coalm_nemo.planning.memory import stage_memory
from coalm_nemo.planning.shapes import SHAPES
from coalm_nemo.platform import Platform, choose_platform
from coalm_nemo.speed import check_speed, defers_embedding, overlaps_tensor, refuse_missing
from coalm_nemo.training.setup import optimizer_config
from coalm_nemo.training.userbuffers import buffer_arguments, buffer_kinds, userbuffers
from coalm_nemo.validate import check_run
from recipes import RECIPES, load_recipe

CPU = Platform("cpu", "gloo", transformer_engine=False)
GPU = Platform("cuda", "nccl", transformer_engine=True)
BARE_GPU = Platform("cuda", "nccl", transformer_engine=False)
GPUS = {name: recipe.gpus[-1] for name, recipe in RECIPES.items() if recipe.gpus}
DEFER = [
    "speed.defer_embedding_gradient=true",
    "parallel.overlap_grad_reduce=false",
    "parallel.overlap_param_gather=false",
]
FULL = ("coalm_8b", "coalm_70b", "coalm_405b")


@pytest.fixture
def rope_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron-core refuses a configuration with fused RoPE where Transformer Engine is not; nothing here runs it."""
    from megatron.core.models.common.embeddings import rope_utils

    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", object())


@pytest.mark.parametrize("name", FULL)
def test_the_recipes_tell_megatron(name: str, rope_kernel: None) -> None:
    """TransformerConfig and OptimizerConfig accept the switches together, and have them."""
    run = load_recipe(name)
    config: Any = transformer_config(SHAPES[run.model.shape], run, GPU)
    assert config.tp_comm_overlap and config.sequence_parallel
    assert config.gradient_accumulation_fusion and config.cross_entropy_loss_fusion
    assert config.cross_entropy_fusion_impl == "native"  # Transformer Engine's would not know the padded vocabulary
    assert config.apply_rope_fusion and config.bias_activation_fusion
    assert not config.defer_embedding_wgrad_compute  # the overlapped reduction of gradients would miss it
    assert config.cuda_graph_impl == "none"
    assert config.fp8_param and run.parallel.overlap_grad_reduce and run.parallel.overlap_param_gather
    if run.optimizer.moments == "fp32":  # megatron-core asks Transformer Engine for its version where they are bf16
        assert optimizer_config(run).use_distributed_optimizer


@pytest.mark.parametrize("name", [n for n in GPUS if n not in FULL])
def test_adapters_and_padded_rows_leave_out_what_does_not_go(name: str, rope_kernel: None) -> None:
    run = load_recipe(name)
    config: Any = transformer_config(SHAPES[run.model.shape], run, GPU)
    assert not config.tp_comm_overlap and config.cross_entropy_loss_fusion
    if run.lora.rank:
        assert not config.gradient_accumulation_fusion and not config.defer_embedding_wgrad_compute


def test_the_defaults_switch_nothing_on() -> None:
    config: Any = transformer_config(SHAPES["8b"], RunConfig(), CPU)
    on = (
        "tp_comm_overlap",
        "gradient_accumulation_fusion",
        "cross_entropy_loss_fusion",
        "defer_embedding_wgrad_compute",
    )
    assert not any(getattr(config, name) for name in on)
    refuse_missing(RunConfig(), CPU)


def test_torch_layers_on_a_gpu_ask_for_no_kernel_of_transformer_engine() -> None:
    config: Any = transformer_config(SHAPES["8b"], RunConfig(), BARE_GPU)
    assert not config.apply_rope_fusion and not config.gradient_accumulation_fusion and not config.tp_comm_overlap
    assert config.deallocate_pipeline_outputs and not config.use_cpu_initialization


def test_cuda_graphs_reach_megatron_and_fix_the_length(rope_kernel: None) -> None:
    run = build_config(RunConfig(), [], ["speed.cuda_graphs=true", "train.seq_len_tokens=512"])
    config: Any = transformer_config(SHAPES["8b"], run, GPU)
    assert config.cuda_graph_impl == "local"
    assert check_run(run, SHAPES["8b"], 1).sequence_multiple == 512


@pytest.mark.parametrize(
    ("recipe", "words", "told"),
    [
        ("coalm_8b", ["data.packing=false"], "tensor_overlap=true needs data.packing=true"),
        ("coalm_8b", ["lora.rank=8"], "tensor_overlap=true needs lora.rank=0"),
        ("coalm_8b", ["precision.dtype=fp8_blockwise"], "cannot carry its scales"),
        ("coalm_8b", ["evaluation.every_steps=5", "evaluation.data=x"], "needs evaluation.every_steps=0"),
        ("coalm_8b", ["parallel.tensor=1", "lora.rank=8"], "gradient_fusion=true needs lora.rank=0"),
        ("coalm_8b_lora", ["precision.dtype=fp32"], "fused_loss=true needs bf16 weights"),
        ("coalm_70b", [*DEFER, "speed.gradient_fusion=false"], "needs speed.gradient_fusion=true"),
        ("coalm_70b", ["speed.defer_embedding_gradient=true"], "needs parallel.overlap_grad_reduce=false"),
        ("coalm_8b_lora", ["speed.cuda_graphs=true"], "cuda_graphs=true needs data.packing=false"),
        ("coalm_8b_lora", ["speed.cuda_graphs=true", "data.packing=false"], "cuda_graphs=true needs lora.rank=0"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_an_error(recipe: str, words: list[str], told: str) -> None:
    run = build_config(load_recipe(recipe), [], words)
    with pytest.raises(UserError, match=told) as caught:
        check_run(run, SHAPES[run.model.shape], GPUS[recipe])
    assert "\n" not in str(caught.value)
    switch = str(caught.value).split("without it: ")[1]
    check_speed(build_config(run, [], [switch, "speed.gradient_fusion=false", "speed.defer_embedding_gradient=false"]))


def test_what_has_nothing_to_do_is_said() -> None:
    run = build_config(load_recipe("coalm_8b"), [], ["parallel.tensor=1", *DEFER])
    assert not overlaps_tensor(run) and not defers_embedding(run)
    told = {d.name: d.why for d in check_run(run, SHAPES["8b"], 8).derived if d.value == "off"}
    assert {"tensor overlap", "deferred embedding gradient"} <= set(told)


def test_a_cpu_refuses_all_switches_in_one_sentence() -> None:
    run = build_config(load_recipe("coalm_405b"), [], DEFER)
    with pytest.raises(UserError, match="on the CPU and lacks CUDA, Transformer Engine") as caught:
        refuse_missing(run, CPU)
    off = str(caught.value).split("without what needs it: ")[1].split()
    refuse_missing(build_config(run, [], off), CPU)


def test_a_gpu_without_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coalm_nemo.speed, "FUSION_KERNEL", "no_such_extension")
    with pytest.raises(UserError, match="Apex's no_such_extension"):
        refuse_missing(load_recipe("coalm_405b"), GPU)
    monkeypatch.setattr(coalm_nemo.speed, "FUSION_KERNEL", "json")  # any module that is there
    refuse_missing(load_recipe("coalm_405b"), GPU)
    with pytest.raises(UserError, match="Transformer Engine; .*speed.tensor_overlap=false$"):
        refuse_missing(load_recipe("coalm_8b"), BARE_GPU)
    with pytest.raises(UserError, match="speed.tensor_overlap=false speed.defer_embedding_gradient=false$"):
        refuse_missing(build_config(load_recipe("coalm_405b"), [], DEFER), BARE_GPU)


def test_userbuffers_are_as_large_as_a_pass() -> None:
    run = build_config(load_recipe("coalm_405b"), [], ["parallel.context=2"])
    assert buffer_arguments(run, SHAPES["405b"]) == {"shape": [2048, 16384], "tp_size": 8, "bootstrap_backend": "nccl"}
    assert buffer_kinds(run) == ["FP8"]
    assert buffer_kinds(build_config(run, [], ["precision.bf16_layers_at_end=1"])) == ["FP8", "NONE"]
    assert buffer_kinds(build_config(run, [], ["precision.dtype=bf16", "precision.fp8_params=false"])) == ["NONE"]
    with userbuffers(RunConfig(), SHAPES["8b"]):
        pass  # nothing is set up where nothing is asked for


@pytest.mark.parametrize("name", FULL)
def test_waiting_gradients_and_buffers_fit(name: str) -> None:
    """What the planner does not count: logits' gradients that wait on the last stage, and userbuffers on every one."""
    run, gpus = build_config(load_recipe(name), [], DEFER), GPUS[name]
    llama, plan = SHAPES[run.model.shape], expected(run, SHAPES[run.model.shape], gpus)
    assert plan
    tokens, tensor = run.train.seq_len_tokens, run.parallel.tensor
    buffers = 14 * tokens * llama.hidden_size * 2  # one for each product, at most two bytes an element
    layout = check_run(run, llama, gpus)
    waiting = min(run.speed.deferral_limit, layout.micro_batches) if defers_embedding(run) else 0
    each = tokens * 2 * (llama.padded_vocab_size(tensor) / tensor + llama.hidden_size / tensor)
    last = stage_memory(plan.job, plan.layout, run.parallel.pipeline - 1)
    assert last.total + buffers + waiting * each <= plan.job.gpu.memory
    assert plan.memory.worst.total + buffers <= plan.job.gpu.memory - 2 * GIB


@pytest.mark.parametrize(
    ("gpu", "engine", "asked", "layers", "found"),
    [
        (False, False, "auto", "auto", CPU),
        (False, False, "auto", "torch", CPU),
        (False, True, "cpu", "transformer_engine", "needs a GPU"),
        (True, True, "auto", "auto", GPU),
        (True, True, "cuda", "torch", BARE_GPU),
        (True, True, "cpu", "auto", CPU),
        (True, False, "auto", "auto", "run.layers=torch"),
        (True, False, "cuda", "transformer_engine", "Transformer Engine is not"),
        (True, False, "auto", "torch", BARE_GPU),
        (False, False, "cuda", "torch", "torch sees no GPU"),
        (True, True, "auto", "local", "run.layers is 'local'"),
    ],
)
def test_layers_are_chosen_or_refused(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, engine: bool, asked: str, layers: str, found: Platform | str
) -> None:
    """Plain torch on a GPU only where it is asked for by name."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if engine else None)
    if isinstance(found, Platform):
        assert choose_platform(asked, layers) == found
        return
    with pytest.raises(UserError, match=found):
        choose_platform(asked, layers)
