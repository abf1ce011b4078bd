"""An NF4 base trains as the model whose linear layers were rounded to NF4 beforehand; dropout and PEFT starts on layouts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from coalm_nemo.checkpoint.lora import export_adapter
from coalm_nemo.errors import UserError
from coalm_nemo.models.llama import load_llama_config
from coalm_nemo.models.nf4 import dequantise, quantise
from coalm_nemo.training.callbacks.metrics_file import read_steps
from coalm_nemo.validate import check_run
from tests.training.test_fp8_emulation import model as model
from tests.training.test_lora import LAYOUTS, TOLERANCE, configure

QLORA_LAYOUTS = ("tp2", "tp2_sp", "pp2_vp2", "dp2", "tp2_pp2_sp_full_recompute")


def losses(ranks_pool: Any, model: Path, rows: Path, run_dir: Path, layout: str, *words: str) -> list[float]:
    nproc, parallel = LAYOUTS[layout]
    assert ranks_pool.train(configure(model, rows, run_dir, *words, *parallel), nproc) == [0] * nproc
    return [s["lm_loss"] for s in read_steps(run_dir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """The model with its layers' matrices rounded to NF4, in its own dtype."""
    directory = tmp_path_factory.mktemp("rounded") / "model"
    shutil.copytree(model, directory)
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if ".layers." in name and tensor.ndim == 2:
                tensors[name] = dequantise(*quantise(tensor), tensor.dtype)
        save_file(tensors, path, {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def reference(ranks_pool: Any, rounded: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(ranks_pool, rounded, rows_file, tmp_path_factory.mktemp("reference"), "single")


@pytest.mark.parametrize("layout", ["single", *QLORA_LAYOUTS])
def test_nf4_is_the_rounded_model(
    layout: str, reference: list[float], ranks_pool: Any, model: Path, rows_file: Path, tmp_path: Path
) -> None:
    ours = losses(ranks_pool, model, rows_file, tmp_path / "nf4", layout, "lora.base=nf4")
    assert ours == pytest.approx(reference, rel=0, abs=TOLERANCE)


def test_the_base_is_rounded_at_all(
    reference: list[float], ranks_pool: Any, model: Path, rows_file: Path, tmp_path: Path
) -> None:
    exact = losses(ranks_pool, model, rows_file, tmp_path, "single")
    assert abs(exact[0] - reference[0]) > 1e-4
    assert exact[-1] == pytest.approx(reference[-1], rel=0.1)


def test_nf4_resumes_on_another_layout(
    reference: list[float], ranks_pool: Any, model: Path, rows_file: Path, tmp_path: Path
) -> None:
    words = ["lora.base=nf4", "checkpoint.resume=true", "checkpoint.save_interval_steps=2"]
    losses(ranks_pool, model, rows_file, tmp_path, "tp2_sp", *words, "train.steps=2")
    assert losses(ranks_pool, model, rows_file, tmp_path, "single", *words) == pytest.approx(reference, abs=TOLERANCE)


def test_dropout_is_the_same_on_every_layout(
    ranks_pool: Any, model: Path, rows_file: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    plain = losses(ranks_pool, model, rows_file, tmp_path / "plain", "single")
    one = losses(ranks_pool, model, rows_file, tmp_path / "one", "single", "lora.dropout=0.3")
    assert one[0] == pytest.approx(plain[0], abs=TOLERANCE), "B is zero at the start"
    assert max(abs(a - b) for a, b in zip(one[2:], plain[2:], strict=True)) > 1e-4
    for layout in ("tp2", "tp2_sp", "tp2_pp2_sp_full_recompute"):
        other = losses(ranks_pool, model, rows_file, tmp_path / layout, layout, "lora.dropout=0.3")
        assert other == pytest.approx(one, rel=0, abs=TOLERANCE), layout


def test_training_starts_from_peft_files(ranks_pool: Any, model: Path, rows_file: Path, tmp_path: Path) -> None:
    """The first loss after an export and a start from it is a resumed run's; the optimizer starts anew."""
    words = ["checkpoint.save_interval_steps=2", "checkpoint.resume=true", "data.shuffle=false"]
    losses(ranks_pool, model, rows_file, tmp_path / "first", "tp2_sp", *words, "train.steps=2")
    export_adapter(tmp_path / "first/checkpoints/step_00000002", tmp_path / "peft")
    shutil.copytree(tmp_path / "first", tmp_path / "resumed")
    start = f"lora.start_from={tmp_path / 'peft'}"
    resumed = losses(ranks_pool, model, rows_file, tmp_path / "resumed", "single", *words)[2]
    for layout in ("single", "tp2_pp2_sp_full_recompute"):
        again = losses(ranks_pool, model, rows_file, tmp_path / layout, layout, *words, start)
        first = read_steps(tmp_path / "first/metrics.jsonl")[0]["lm_loss"]
        assert abs(again[0] - first) > 1e-3, "the same rows, and better adapters than at the start"
    nothing = losses(ranks_pool, model, rows_file, tmp_path / "nothing", "single", *words, start, "optimizer.lr=0")
    assert nothing[2] == pytest.approx(resumed, rel=0, abs=TOLERANCE)


def test_bad_choices(model: Path, rows_file: Path, tiny_llama: Path, tmp_path: Path) -> None:
    wide, narrow = load_llama_config(model), load_llama_config(tiny_llama)
    for words, llama, said in (
        (["lora.base=nf4", "lora.rank=0"], wide, "go with adapters"),
        (["lora.dropout=1"], wide, "below 1"),
        (["lora.base=nf4", "precision.dtype=fp8_emulated_current"], wide, "goes with bf16 or fp32"),
        (["lora.base=nf5"], wide, "as_trained, nf4"),
        (["lora.base=nf4", "parallel.tensor=2"], narrow, "no multiple of it"),
    ):
        with pytest.raises(UserError, match=said):
            check_run(configure(model, rows_file, tmp_path, *words), llama, 2 if "parallel.tensor=2" in words else 1)


def test_memory_is_a_quarter(model: Path) -> None:
    weight = torch.randn(256, 512)
    codes, scale = quantise(weight)
    assert 8 * (codes.nbytes + scale.nbytes) / weight.numel() == 4.5
