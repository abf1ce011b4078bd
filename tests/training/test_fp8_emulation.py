"""Training with emulated FP8: near fp32 but not it, and the same on every layout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from coalm_nemo.config import RunConfig
from coalm_nemo.errors import UserError
from coalm_nemo.models.llama import load_llama_config
from coalm_nemo.training.callbacks.metrics_file import read_steps
from coalm_nemo.validate import check_run
from tests.training.test_layout_invariance import configure as configure_fp32

STEPS = 3
"""What is not emulated (norms, loss, gradient norm) is fp32 and differs in the last bit by layout; sooner or later one
rounding to FP8 falls the other way for it, and from then on losses part by 1e-4."""
TOLERANCE = 1e-5
RECIPES = ("current", "blockwise", "delayed")
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "tp2": (2, ["parallel.tensor=2", "parallel.sequence=false"]),
    "tp2_sp": (2, ["parallel.tensor=2"]),
    "tp2_pp2_sp": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "tp2_pp2_sp_full_recompute": (4, ["parallel.tensor=2", "parallel.pipeline=2", "train.recompute=full"]),
    "pp2_vp2_full_recompute": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "train.recompute=full"]),
    "dp2_overlapped": (2, ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]),
}
CASES = [
    *((recipe, layout) for recipe in RECIPES for layout in ("tp2_sp", "tp2_pp2_sp")),
    *(("delayed", layout) for layout in ("tp2", "tp2_pp2_sp_full_recompute", "pp2_vp2_full_recompute")),
    ("current", "dp2_overlapped"),  # its history makes delayed scaling see the order of micro-batches
]

Curve = list[tuple[float, float]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for blocks of 128 on two tensor-parallel ranks."""
    from tests.tiny_llama import make_tiny_llama

    directory = tmp_path_factory.mktemp("blocks") / "model"
    return make_tiny_llama(directory, hidden_size=128, ffn_size=256, num_layers=4, head_dim=64)


def configure(model: Path, rows: Path, run_dir: Path, recipe: str, *words: str) -> RunConfig:
    """tests/training/test_layout_invariance.py's run with emulated FP8."""
    dtype = f"fp8_emulated_{recipe}" if recipe else "fp32"
    own = [f"precision.dtype={dtype}", "precision.amax_history_len=4", f"train.steps={STEPS}"]
    return configure_fp32(model, rows, run_dir, *own, *words)


def curve(run_dir: Path) -> Curve:
    steps = read_steps(run_dir / "metrics.jsonl")
    assert all(math.isfinite(s["grad_norm"]) for s in steps)
    return [(s["lm_loss"], s["grad_norm"]) for s in steps]


@pytest.fixture(scope="module")
def singles(tmp_path_factory: pytest.TempPathFactory, ranks_pool: Any, rows_file: Path, model: Path) -> Any:
    """Curve of each recipe, and of fp32 (""), on one rank."""
    curves: dict[str, Curve] = {}
    for recipe in ("", *RECIPES):
        run_dir = tmp_path_factory.mktemp("single")
        assert ranks_pool.train(configure(model, rows_file, run_dir, recipe), 1) == [0]
        curves[recipe] = curve(run_dir)
    return curves


@pytest.mark.parametrize(("recipe", "layout"), CASES)
def test_layouts_agree(
    recipe: str, layout: str, singles: Any, ranks_pool: Any, rows_file: Path, model: Path, tmp_path: Path
) -> None:
    nproc, words = LAYOUTS[layout]
    assert ranks_pool.train(configure(model, rows_file, tmp_path, recipe, *words), nproc) == [0] * nproc
    for (loss, norm), (other_loss, other_norm) in zip(curve(tmp_path), singles[recipe], strict=True):
        assert loss == pytest.approx(other_loss, rel=0, abs=TOLERANCE)
        assert norm == pytest.approx(other_norm, rel=1e-3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_near_fp32_but_not_it(recipe: str, singles: Any) -> None:
    for (loss, norm), (exact_loss, exact_norm) in zip(singles[recipe], singles[""], strict=True):
        assert loss == pytest.approx(exact_loss, rel=5e-3)
        assert norm == pytest.approx(exact_norm, rel=5e-2)
        assert abs(loss - exact_loss) > 1e-7 * exact_loss, "FP8 was asked for and fp32 ran"


def first_loss(ranks_pool: Any, run: RunConfig) -> float:
    run.train.steps = 1
    assert ranks_pool.train(run, 1) == [0]
    return curve(Path(run.run.dir))[0][0]


def test_layers_kept_out(singles: Any, ranks_pool: Any, rows_file: Path, model: Path, tmp_path: Path) -> None:
    """All four kept out is fp32; some kept out is neither."""
    words = ["precision.bf16_layers_at_start=1", "precision.bf16_layers_at_end=3"]
    none = first_loss(ranks_pool, configure(model, rows_file, tmp_path / "none", "current", *words))
    some = first_loss(ranks_pool, configure(model, rows_file, tmp_path / "some", "current", words[0]))
    assert none == pytest.approx(singles[""][0][0], rel=1e-7)
    assert some not in (none, singles["current"][0][0])


def test_unquantised_weight_gradients(
    singles: Any, ranks_pool: Any, rows_file: Path, model: Path, tmp_path: Path
) -> None:
    run = configure(model, rows_file, tmp_path, "current", "precision.fp8_weight_gradients=false")
    assert ranks_pool.train(run, 1) == [0]
    ours, theirs = curve(tmp_path), singles["current"]
    assert ours[0][0] == theirs[0][0] and ours[0][1] != theirs[0][1]


@pytest.mark.parametrize("recipe", RECIPES)
def test_bf16_weights(recipe: str, singles: Any, ranks_pool: Any, rows_file: Path, model: Path, tmp_path: Path) -> None:
    run = configure(model, rows_file, tmp_path, recipe, "precision.emulation_weights=bf16")
    assert ranks_pool.train(run, 1) == [0]
    assert [loss for loss, _ in curve(tmp_path)] == pytest.approx([loss for loss, _ in singles[recipe]], rel=5e-3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_lora(recipe: str, ranks_pool: Any, rows_file: Path, model: Path, tmp_path: Path) -> None:
    """Adapters are not quantised: their fp32 sums differ in the last bit by layout, and FP8 makes more of that."""
    words = ["lora.rank=4", "lora.alpha=8", "optimizer.lr=1e-2"]
    curves = []
    for name, nproc, layout in (("one", 1, []), ("four", 4, ["parallel.tensor=2", "parallel.pipeline=2"])):
        run = configure(model, rows_file, tmp_path / name, recipe, *words, *layout)
        assert ranks_pool.train(run, nproc) == [0] * nproc
        curves.append([loss for loss, _ in curve(tmp_path / name)])
    assert curves[0][0] == pytest.approx(curves[1][0], rel=0, abs=TOLERANCE)
    assert curves[0] == pytest.approx(curves[1], rel=5e-3)
    assert curves[0][-1] < curves[0][0]


def test_blocks_that_a_rank_would_cut_are_refused(rows_file: Path, tiny_llama: Path, tmp_path: Path) -> None:
    run = configure(tiny_llama, rows_file, tmp_path, "blockwise", "parallel.tensor=2")
    with pytest.raises(UserError, match="64 query features over parallel.tensor=2 are 32 a rank"):
        check_run(run, load_llama_config(tiny_llama), 2)
    run.parallel.tensor = 1
    check_run(run, load_llama_config(tiny_llama), 1)


@pytest.mark.parametrize("recipe", RECIPES)
def test_resume_on_another_layout(recipe: str, ranks_pool: Any, rows_file: Path, model: Path, tmp_path: Path) -> None:
    """Delayed scaling's histories are in the checkpoint; without them the scales of step 3 would be others."""
    words = ["schedule.name=constant", "checkpoint.save_interval_steps=2", "checkpoint.resume=true"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert ranks_pool.train(configure(model, rows_file, whole, recipe, *words), 1) == [0]
    first = configure(model, rows_file, parts, recipe, *words, "train.steps=2")
    assert ranks_pool.train(first, 1) == [0]
    assert (parts / "checkpoints/step_00000002/fp8_state.safetensors").is_file() == (recipe == "delayed")
    assert ranks_pool.train(configure(model, rows_file, parts, recipe, *words, *LAYOUTS["tp2_sp"][1]), 2) == [0, 0]
    for (loss, norm), (other_loss, other_norm) in zip(curve(parts), curve(whole), strict=True):
        assert loss == pytest.approx(other_loss, rel=0, abs=TOLERANCE)
        assert norm == pytest.approx(other_norm, rel=1e-3)


def test_delayed_scaling_is_calibrated(
    singles: Any, ranks_pool: Any, rows_file: Path, model: Path, tmp_path: Path
) -> None:
    """With history, the first step is as near fp32 as current scaling's; at scale 1 gradients below e5m2's range vanish."""
    exact, current, delayed = (singles[name][0][1] for name in ("", "current", "delayed"))
    assert abs(delayed - exact) < 2 * abs(current - exact) + 1e-3 * exact
