"""LoRA on every layout is PEFT's LoRA on the Hugging Face model: the same losses, norms and adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from coalm_nemo.checkpoint.convert import export_checkpoint, import_checkpoint
from coalm_nemo.checkpoint.lora import export_adapter
from coalm_nemo.checkpoint.torch_dist import read_metadata
from coalm_nemo.config import RunConfig, build_config
from coalm_nemo.errors import UserError
from coalm_nemo.models.llama import load_llama_config
from coalm_nemo.models.lora import draw_a
from coalm_nemo.training.callbacks.metrics_file import read_steps
from coalm_nemo.validate import check_run
from recipes import load_recipe
from tests.training.hf_reference import Reference, load_prepared, train_reference

STEPS = 5
TOLERANCE = 2e-6
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "single": (1, []),
    "tp2": (2, ["parallel.tensor=2", "parallel.sequence=false"]),
    "tp2_sp": (2, ["parallel.tensor=2"]),
    "pp2_vp2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "dp2": (2, []),
    "dp2_plain_optimizer": (2, ["parallel.distributed_optimizer=false"]),
    "cp2": (2, ["parallel.context=2"]),
    "tp2_pp2_sp_full_recompute": (4, ["parallel.tensor=2", "parallel.pipeline=2", "train.recompute=full"]),
    "tp2_cp2_sp": (4, ["parallel.tensor=2", "parallel.context=2"]),
}


def configure(model: Path, rows: Path, run_dir: Path, *words: str) -> RunConfig:
    base = [
        f"run.dir={run_dir}", f"model.hf_path={model}", f"data.train={rows}", f"train.steps={STEPS}",
        "schedule.name=constant", "optimizer.lr=1e-2", "lora.rank=4", "lora.alpha=8",
        "checkpoint.save_final=false", "checkpoint.resume=false", "logging.console_interval_steps=100",
    ]  # fmt: skip
    return build_config(load_recipe("coalm_tiny"), [], [*base, *words])


def peft_model(run: RunConfig) -> Any:
    """The Hugging Face model with PEFT's adapters, started as ours are."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run.model.hf_path, dtype=torch.float32, attn_implementation="sdpa")
    targets = [f"{t}_proj" for t in run.lora.targets]
    config = LoraConfig(r=run.lora.rank, lora_alpha=int(run.lora.alpha), target_modules=targets, lora_dropout=0.0)
    peft = get_peft_model(model, config)
    for name, parameter in peft.named_parameters():
        if "lora_A" in name:
            words = name.split(".")
            layer, target = (
                int(words[words.index("layers") + 1]) + 1,
                words[words.index("lora_A") - 1].removesuffix("_proj"),
            )
            parameter.data = draw_a(f"{run.run.seed}:{layer}:{target}", run.lora.rank, parameter.shape[1])
    return peft


@pytest.fixture(scope="module")
def references(
    tmp_path_factory: pytest.TempPathFactory, rows_file: Path, tiny_llama: Path, tiny_llama_tied: Path
) -> Any:
    from coalm_nemo.training.prepare import prepare, read_llama

    curves: dict[str, Any] = {}
    cases = {"untied": (tiny_llama, []), "tied": (tiny_llama_tied, []), "q_v": (tiny_llama, ["lora.targets=[q,v]"])}
    for name, (model, words) in cases.items():
        run_dir = tmp_path_factory.mktemp("reference")
        run = configure(model, rows_file, run_dir, *words)
        prepare(run, read_llama(run))
        curves[f"{name}_model"] = peft_model(run)
        curves[name] = train_reference(run, load_prepared(run_dir), STEPS, curves[f"{name}_model"])
    return curves


def assert_same(run_dir: Path, reference: Reference) -> None:
    steps = read_steps(run_dir / "metrics.jsonl")
    assert [s["lm_loss"] for s in steps] == pytest.approx(reference.losses, rel=0, abs=TOLERANCE)
    assert [s["grad_norm"] for s in steps] == pytest.approx(reference.grad_norms, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_match_peft(
    layout: str, references: Any, ranks_pool: Any, rows_file: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    nproc, words = LAYOUTS[layout]
    run = configure(tiny_llama, rows_file, tmp_path, *words)
    assert ranks_pool.train(run, nproc) == [0] * nproc
    assert_same(tmp_path, references["untied"])


def test_tied_embeddings_over_a_pipeline(
    references: Any, ranks_pool: Any, rows_file: Path, tiny_llama_tied: Path, tmp_path: Path
) -> None:
    run = configure(tiny_llama_tied, rows_file, tmp_path, "parallel.pipeline=2")
    assert ranks_pool.train(run, 2) == [0, 0]
    assert_same(tmp_path, references["tied"])


def test_some_projections_only(
    references: Any, ranks_pool: Any, rows_file: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """The published recipe of the 8B model adapts q and v; the fused layer's other rows stay as they are."""
    run = configure(tiny_llama, rows_file, tmp_path, "lora.targets=[q,v]", "parallel.tensor=2", "parallel.pipeline=2")
    assert ranks_pool.train(run, 4) == [0] * 4
    assert_same(tmp_path, references["q_v"])


def test_a_checkpoint_holds_the_adapters_and_resumes_on_another_layout(
    references: Any, ranks_pool: Any, rows_file: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    words = ["checkpoint.resume=true", "checkpoint.save_final=true"]
    first = configure(
        tiny_llama, rows_file, tmp_path, *words, "train.steps=2", "parallel.tensor=2", "parallel.pipeline=2"
    )
    assert ranks_pool.train(first, 4) == [0] * 4
    (saved,) = (tmp_path / "checkpoints").glob("step_*")
    weights = [key for key in read_metadata(saved) if not key.startswith("optimizer")]
    assert weights and all(".adapter." in key for key in weights)
    second = configure(tiny_llama, rows_file, tmp_path, *words, "parallel.pipeline=2")
    assert ranks_pool.train(second, 2) == [0, 0]
    assert_same(tmp_path, references["untied"])


def logits_of(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 60).reshape(3, 19)
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=ids).logits)


def test_the_exported_adapter_is_pefts(
    references: Any, ranks_pool: Any, rows_file: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """Trained on four ranks, exported, loaded by PEFT: the model that PEFT itself trained."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    words = ["checkpoint.save_final=true", "parallel.tensor=2", "parallel.pipeline=2"]
    run = configure(tiny_llama, rows_file, tmp_path / "run", *words)
    assert ranks_pool.train(run, 4) == [0] * 4
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    assert export_adapter(saved, tmp_path / "adapter") == 2 * 7 * 4
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    before = logits_of(base)
    exported = logits_of(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    assert (exported - before).abs().max() > 0.05
    torch.testing.assert_close(exported, logits_of(references["untied_model"]), rtol=0, atol=2e-5)

    merged = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), tmp_path / "adapter"
    ).merge_and_unload()
    export_checkpoint(saved, tmp_path / "merged", merge_lora=True, max_memory_bytes=1 << 20)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    theirs = merged.state_dict()
    assert set(ours.state_dict()) == set(theirs)
    for name, weight in ours.state_dict().items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-7, msg=name)
    torch.testing.assert_close(logits_of(ours), exported, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="merge them into their base with --merge-lora"):
        export_checkpoint(saved, tmp_path / "whole")


def test_only_adapters_can_be_merged(tiny_llama: Path, tmp_path: Path) -> None:
    import_checkpoint(tiny_llama, tmp_path / "base")
    with pytest.raises(UserError, match="is not a checkpoint of a LoRA run"):
        export_checkpoint(tmp_path / "base", tmp_path / "out", merge_lora=True)


def test_what_is_no_adapter_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a checkpoint of a LoRA run"):
        export_adapter(tiny_llama, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["lora.rank=-1"], "lora.rank is -1"),
        (["lora.alpha=0"], "lora.alpha is 0"),
        (["lora.targets=[q,qkv]"], "name some of q, k, v"),
        (["lora.targets=[]"], "name some of q, k, v"),
    ],
)
def test_bad_options(tiny_llama: Path, rows_file: Path, tmp_path: Path, words: list[str], sentence: str) -> None:
    run = configure(tiny_llama, rows_file, tmp_path, *words)
    with pytest.raises(UserError) as refused:
        check_run(run, load_llama_config(tiny_llama), 1)
    assert sentence in str(refused.value)
