"""Every field that NeMo and `coalm train` both have is the same: compared on what each of them builds."""

from __future__ import annotations

import sys
from dataclasses import fields
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from coalm_nemo.config import RunConfig, build_config
from coalm_nemo.errors import UserError
from coalm_nemo.platform import Platform
from coalm_nemo.validate import check_run
from recipes import RECIPES
from recipes.nemo.fields import MAPPED
from recipes.nemo.model import find_llama
from tests.nemo.needs import CLUSTER_RECIPES, NEEDS_NEMO, make, ready

pytestmark = NEEDS_NEMO
CUDA = Platform("cuda", "nccl", transformer_engine=True)
OTHERWISE = {
    "timers": "NeMo's strategy sets its own",
    "persist_layer_norm": "an Apex layer norm's; both use Transformer Engine's RMSNorm",
    "masked_softmax_fusion": "of a softmax that Transformer Engine's attention does not use",
    "attention_softmax_in_fp32": "of the same softmax",
}
"""Fields of megatron-core's TransformerConfig that may differ, and why it does not matter."""
WITHOUT_FP8 = {
    "num_layers_at_start_in_bf16": "counts only where first_last_layers_bf16 is set",
    "num_layers_at_end_in_bf16": "the same",
}


@pytest.fixture(autouse=True)
def as_with_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron-core's configurations ask for kernels of Transformer Engine, which needs a GPU; nothing here runs them."""
    import megatron.core.utils
    from megatron.core.models.common.embeddings import rope_utils
    from packaging.version import Version

    def adam(master_weight_dtype: Any, exp_avg_dtype: Any, exp_avg_sq_dtype: Any, use_decoupled_grad: Any) -> None: ...

    import nemo.collections.llm  # noqa: F401  (the callbacks import it in a ring, which has to be entered here)
    from nemo.lightning.pytorch.callbacks import megatron_comm_overlap

    monkeypatch.setattr(megatron_comm_overlap, "HAVE_TE", True)
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", object())
    monkeypatch.setattr(megatron.core.utils, "get_te_version", lambda: Version("2.12.0"))
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    optimizers = ModuleType("transformer_engine.pytorch.optimizers")
    optimizers.FusedAdam = adam  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, optimizers.__name__, optimizers)


def built(recipe: Any) -> SimpleNamespace:
    """What NeMo's strategy makes of model, optimizer and DDP before it trains."""
    import fiddle as fdl
    from nemo.lightning._strategy_lib import set_model_parallel_attributes
    from nemo.lightning.pytorch.plugins.mixed_precision import update_config_with_dtype_overrides

    strategy, plugin = fdl.build(recipe.trainer.strategy), fdl.build(recipe.trainer.plugins)
    model = SimpleNamespace(config=fdl.build(recipe.model.config), configure_model=None)
    set_model_parallel_attributes(model, strategy.parallelism)
    for callback in recipe.trainer.callbacks:
        if callback.__fn_or_cls__.__name__ == "MegatronCommOverlapCallback":
            made = fdl.build(callback)
            made._apply_cfgs(made._get_model_comm_overlap_cfgs(strategy.parallelism), model.config)
    optimizer = fdl.build(recipe.optim)
    for config in (model.config, optimizer.config, strategy.ddp_config):
        update_config_with_dtype_overrides(plugin.dtype_config, config)
    return SimpleNamespace(
        model=model.config, optimizer=optimizer.config, ddp=strategy.ddp_config, schedule=optimizer.lr_scheduler
    )


def differing(ours: Any, theirs: Any, kind: type, leave: dict[str, str]) -> dict[str, tuple[Any, Any]]:
    """Fields of `kind` that are not equal; functions aside, which both make of the other fields."""
    pairs = {f.name: (getattr(ours, f.name), getattr(theirs, f.name)) for f in fields(kind) if f.name not in leave}
    return {name: (a, b) for name, (a, b) in pairs.items() if a != b and not (callable(a) and callable(b))}


@pytest.mark.parametrize("name", CLUSTER_RECIPES)
def test_model_layout_precision_optimizer_and_ddp_are_equal(name: str) -> None:
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    from coalm_nemo.models.gpt import transformer_config
    from coalm_nemo.training.setup import optimizer_config

    run, gpus = ready(name), RECIPES[name].gpus[-1]
    llama = find_llama(run)
    nemo = built(make(run, gpus))
    leave = OTHERWISE if run.precision.fp8 else OTHERWISE | WITHOUT_FP8
    assert not differing(transformer_config(llama, run, CUDA), nemo.model, TransformerConfig, leave)
    assert not differing(optimizer_config(run), nemo.optimizer, OptimizerConfig, {"timers": "", "fp8_recipe": ""})
    assert nemo.ddp.grad_reduce_in_fp32 == (run.precision.gradients == "fp32")
    assert (nemo.ddp.overlap_grad_reduce, nemo.ddp.overlap_param_gather) == (
        run.parallel.overlap_grad_reduce,
        run.parallel.overlap_param_gather,
    )
    assert nemo.ddp.use_distributed_optimizer and nemo.ddp.fp8_param_gather == run.precision.fp8_params
    assert not nemo.ddp.average_in_collective


@pytest.mark.parametrize("name", CLUSTER_RECIPES)
def test_shape_batch_schedule_lora_and_checkpoints_are_equal(name: str) -> None:
    from coalm_nemo.training.setup import warmup_steps

    run, gpus = ready(name), RECIPES[name].gpus[-1]
    llama, layout = find_llama(run), check_run(run, find_llama(run), gpus)
    recipe = make(run, gpus)
    model, scaling = built(recipe).model, llama.rope_scaling
    assert scaling is not None
    assert (model.vocab_size, model.rotary_base, model.seq_length) == (128256, 500000, run.train.seq_len_tokens)
    assert not model.share_embeddings_and_output_weights
    assert (model.scale_factor, model.low_freq_factor, model.high_freq_factor, model.old_context_len) == (
        scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_positions,
    )  # fmt: skip
    assert recipe.trainer.devices * recipe.trainer.num_nodes == gpus
    data = recipe.data
    assert (data.global_batch_size, data.micro_batch_size) == (run.batch.global_size, run.batch.micro_size)
    assert (data.seq_length, data.packing, data.pack_multiple) == (
        run.train.seq_len_tokens, run.data.packing, run.data.pack_multiple,
    )  # fmt: skip
    assert (data.length_multiple, data.seed) == (layout.sequence_multiple, run.run.seed)
    schedule = recipe.optim.lr_scheduler
    assert (schedule.name, schedule.warmup_steps, schedule.min_lr) == (
        run.schedule.name, warmup_steps(run, 120), run.optimizer.min_lr,
    )  # fmt: skip
    assert recipe.trainer.max_steps == schedule.max_steps == 120
    assert recipe.log.ckpt.every_n_train_steps == run.checkpoint.save_interval_steps
    assert recipe.log.ckpt.save_top_k == run.checkpoint.keep_last
    assert recipe.trainer.strategy.ckpt_async_save == run.checkpoint.async_save
    if not run.lora.rank:
        assert recipe.peft is None
        return
    assert (recipe.peft.dim, recipe.peft.alpha, recipe.peft.dropout) == (run.lora.rank, run.lora.alpha, 0.0)
    assert len(recipe.peft.target_modules) == len(run.lora.targets)


@pytest.mark.parametrize("name", CLUSTER_RECIPES)
def test_a_partial_is_written_read_and_built(name: str) -> None:
    """nemo_run sends a recipe to a cluster as text. The trainer is built for CPU: Lightning looks for the GPUs."""
    import fiddle as fdl
    from nemo_run.core.serialization.yaml import YamlSerializer
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    recipe = make(ready(name), RECIPES[name].gpus[-1])
    assert ZlibJSONSerializer().deserialize(ZlibJSONSerializer().serialize(recipe)) == recipe
    assert "llm.api.finetune" in YamlSerializer().serialize(recipe)
    for part in (recipe.data, recipe.log, recipe.resume, recipe.optim, recipe.peft, recipe.trainer.plugins):
        fdl.build(part)


OTHER_VALUES = {
    "run.dir": "runs/elsewhere", "run.platform": "cpu", "run.seed": 7, "model.hf_path": "/models/other",
    "model.checkpoint": "/models/base", "model.shape": "70b", "model.init": "random",
    "parallel.tensor": 1, "parallel.pipeline": 2, "parallel.virtual_pipeline": 2, "parallel.context": 2,
    "parallel.sequence": "false", "parallel.count_embedding_and_loss": "true", "parallel.distributed_optimizer": "false",
    "parallel.overlap_grad_reduce": "false", "parallel.overlap_param_gather": "false",
    "lora.rank": 4, "lora.alpha": 5.0, "lora.targets": "[q]",
    "precision.dtype": "fp8_blockwise", "precision.bf16_layers_at_start": 1, "precision.bf16_layers_at_end": 1,
    "precision.fp8_params": "false", "precision.gradients": "fp32", "precision.fp8_weight_gradients": "false",
    "precision.amax_history_len": 16, "speed.tensor_overlap": "false", "speed.gradient_fusion": "false",
    "speed.defer_embedding_gradient": "true", "speed.deferral_limit": 3, "speed.fused_loss": "false",
    "speed.collect_interval_steps": 7, "batch.global_size": 64, "batch.micro_size": 2,
    "data.train": "/sets/other", "data.validation": "/sets/held_out", "data.validation_fraction": 0.1,
    "data.packing": "false", "data.pack_multiple": 8, "data.overlong": "drop", "data.shuffle": "false",
    "train.steps": 64, "train.epochs": 2.0, "train.seq_len_tokens": 2048, "train.recompute": "full",
    "train.eval_interval_steps": 8, "train.empty_rows": "drop", "optimizer.lr": 1e-3, "optimizer.min_lr": 1e-7,
    "optimizer.weight_decay": 0.1, "optimizer.clip_grad": 0.5, "optimizer.beta1": 0.8, "optimizer.beta2": 0.9,
    "optimizer.eps": 1e-7, "optimizer.moments": "bf16", "schedule.name": "cosine", "schedule.warmup_steps": 9,
    "schedule.warmup_ratio": 0.5, "checkpoint.save_interval_steps": 60, "checkpoint.keep_last": 5,
    "checkpoint.async_save": "false", "checkpoint.resume": "false", "logging.console_interval_steps": 4,
    "logging.wandb": "offline", "logging.wandb_project": "p", "logging.wandb_entity": "e", "logging.wandb_name": "n",
}  # fmt: skip
WITH_LORA = ["speed.tensor_overlap=false", "speed.gradient_fusion=false"]
NOT_OVERLAPPED = ["parallel.pipeline=2", "parallel.overlap_grad_reduce=false", "parallel.overlap_param_gather=false"]
TOGETHER = {
    "parallel.virtual_pipeline": ["parallel.pipeline=2"],
    "parallel.context": ["data.packing=false", "speed.tensor_overlap=false"],
    "data.packing": ["speed.tensor_overlap=false"],
    "parallel.distributed_optimizer": ["parallel.overlap_param_gather=false", "precision.fp8_params=false"],
    "parallel.overlap_grad_reduce": ["parallel.overlap_param_gather=false"],
    "lora.rank": WITH_LORA,
    "lora.alpha": ["lora.rank=4", *WITH_LORA],
    "lora.targets": ["lora.rank=4", *WITH_LORA],
    "precision.dtype": ["speed.tensor_overlap=false"],
    "speed.defer_embedding_gradient": NOT_OVERLAPPED,
    "speed.deferral_limit": [*NOT_OVERLAPPED, "speed.defer_embedding_gradient=true"],
    "precision.amax_history_len": ["precision.dtype=fp8_delayed"],
    "batch.micro_size": ["data.packing=false", "speed.tensor_overlap=false"],
    "checkpoint.save_interval_steps": [],
    "train.eval_interval_steps": ["checkpoint.save_interval_steps=8"],
}
BY_OTHER_MEANS = {"run.environment", "train.epochs"}
"""Tested beside the executor, and with a set."""


@pytest.mark.parametrize("key", sorted(set(MAPPED) - BY_OTHER_MEANS))
def test_every_mapped_field_reaches_the_recipe(key: str) -> None:
    """Another value gives another recipe, or is refused; nothing is dropped silently."""
    before, after = TOGETHER.get(key, []), f"{key}={OTHER_VALUES[key]}"
    run = build_config(ready("coalm_8b"), [], before)
    other = build_config(ready("coalm_8b"), [], [*before, after])
    if key in ("run.platform", "model.init"):
        with pytest.raises(UserError, match=key):
            make(other, 8)
        return
    assert make(other, 8) != make(run, 8)


def test_the_command_reads_a_recipe_by_its_name() -> None:
    """As `nemo llm finetune --factory` does."""
    from nemo.collections import llm
    from nemo_run.cli.cli_parser import parse_cli_args, parse_factory

    text = "recipes.nemo.coalm_8b(hf='/models/Llama', data='/sets/x', steps=50)"
    recipe = parse_factory(llm.finetune, "factory", Any, text)  # type: ignore[arg-type]
    assert (recipe.data.train, recipe.trainer.max_steps, recipe.trainer.num_nodes) == ("/sets/x", 50, 1)
    changed = parse_cli_args(recipe, ["data.seed=7", "optim.lr_scheduler.warmup_steps=3"])
    assert (changed.data.seed, changed.optim.lr_scheduler.warmup_steps) == (7, 3)


def test_a_run_in_epochs_counts_the_packs(tiny_llama: Any, tmp_path: Any) -> None:
    from coalm_nemo.data.build import build
    from coalm_nemo.data.build_config import load_build_config
    from coalm_nemo.data.shards import ShardSet
    from tests.conftest import write_rows

    rows = write_rows(tmp_path / "rows.jsonl", 40)
    config = load_build_config(None, [f"chat={rows}"], [], tokenizer=str(tiny_llama), seq_len_tokens=96)
    directory = build(config, tmp_path / "set", workers=1).directory
    run = RunConfig()
    run.model.hf_path, run.data.train, run.data.packing = str(tiny_llama), str(directory), True
    run.train.seq_len_tokens, run.train.epochs, run.batch.global_size = 96, 2.0, 8
    packs = ShardSet.load(directory).packs(96, 4)
    assert packs is not None
    recipe = make(run, 8)
    assert recipe.trainer.max_steps == -(-2 * len(packs) // 8)
    assert recipe.data.epochs == 2.0
