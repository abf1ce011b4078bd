"""Training with FP8 through torch's scaled matrix product, which runs on the CPU too: near the emulation, on any layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coalm_nemo.config import RunConfig
from coalm_nemo.errors import UserError
from coalm_nemo.models.llama import load_llama_config
from coalm_nemo.platform import Platform
from coalm_nemo.validate import check_run
from tests.training.test_fp8_emulation import configure as configure_emulated
from tests.training.test_fp8_emulation import curve
from tests.training.test_fp8_emulation import model as model

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "tp2": (2, ["parallel.tensor=2", "parallel.sequence=false"]),
    "tp2_pp2_sp": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "tp2_sp_full_recompute": (2, ["parallel.tensor=2", "train.recompute=full"]),
    "dp2": (2, []),
}
TOLERANCE = 5e-3
"""Relative. Between its products everything is bf16, and each rank has its own scales: layouts differ by that."""


def configure(model: Path, rows: Path, run_dir: Path, *words: str) -> RunConfig:
    return configure_emulated(model, rows, run_dir, "current", "precision.dtype=fp8_scaled_mm", *words)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, ranks_pool: Any, rows_file: Path, model: Path) -> Any:
    run_dir = tmp_path_factory.mktemp("single")
    assert ranks_pool.train(configure(model, rows_file, run_dir), 1) == [0]
    return curve(run_dir)


def near(ours: Any, theirs: Any) -> None:
    for (loss, norm), (other_loss, other_norm) in zip(ours, theirs, strict=True):
        assert loss == pytest.approx(other_loss, rel=TOLERANCE)
        assert norm == pytest.approx(other_norm, rel=3e-2)


def test_near_the_emulation_but_neither_it_nor_bf16(
    single: Any, ranks_pool: Any, rows_file: Path, model: Path, tmp_path: Path
) -> None:
    emulated = configure_emulated(model, rows_file, tmp_path / "e", "current", "precision.emulation_weights=bf16")
    plain = configure(model, rows_file, tmp_path / "b", "precision.dtype=bf16")
    for run in (emulated, plain):
        assert ranks_pool.train(run, 1) == [0]
    near(single, curve(tmp_path / "e"))
    gap = [abs(ours[1] - theirs[1]) for ours, theirs in zip(single, curve(tmp_path / "e"), strict=True)]
    from_bf16 = [abs(ours[1] - theirs[1]) for ours, theirs in zip(single, curve(tmp_path / "b"), strict=True)]
    assert gap[0] < from_bf16[0] / 3, "the gradients are FP8's"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, single: Any, ranks_pool: Any, rows_file: Path, model: Path, tmp_path: Path) -> None:
    nproc, words = LAYOUTS[layout]
    assert ranks_pool.train(configure(model, rows_file, tmp_path, *words), nproc) == [0] * nproc
    near(curve(tmp_path), single)


def test_lora(ranks_pool: Any, rows_file: Path, model: Path, tmp_path: Path) -> None:
    words = ["lora.rank=4", "lora.alpha=8", "optimizer.lr=1e-2", *LAYOUTS["tp2_pp2_sp"][1]]
    assert ranks_pool.train(configure(model, rows_file, tmp_path, *words), 4) == [0] * 4
    losses = [loss for loss, _ in curve(tmp_path)]
    assert losses[-1] < losses[0]


def test_resume(ranks_pool: Any, rows_file: Path, model: Path, tmp_path: Path) -> None:
    """It keeps nothing between steps, so what is resumed is what would have been, to the bit."""
    words = ["schedule.name=constant", "checkpoint.save_interval_steps=2", "checkpoint.resume=true"]
    for run_dir, stops in (("whole", [[]]), ("parts", [["train.steps=2"], []])):
        for stop in stops:
            assert ranks_pool.train(configure(model, rows_file, tmp_path / run_dir, *words, *stop), 1) == [0]
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


def test_odd_widths_are_refused(rows_file: Path, tiny_llama: Path, tmp_path: Path) -> None:
    run = configure(tiny_llama, rows_file, tmp_path, "parallel.tensor=8")
    llama = replace(load_llama_config(tiny_llama), ffn_size=8 * 24, num_heads=8, num_kv_heads=8)
    with pytest.raises(UserError, match="wants multiples of 16; intermediate features a rank: 24"):
        check_run(run, llama, 8)


def test_on_an_older_gpu_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    for engine in (False, True):
        with pytest.raises(UserError, match=r"compute capability 8\.9"):
            Platform("cuda", "nccl", transformer_engine=engine).refuse("fp8_scaled_mm")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    Platform("cuda", "nccl", transformer_engine=False).refuse("fp8_scaled_mm")
    Platform("cpu", "gloo", transformer_engine=False).refuse("fp8_scaled_mm")
