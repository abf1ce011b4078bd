"""The check as ranks run it, on several layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coalm_nemo.fp8_check.variants import make_variants
from coalm_nemo.fp8_check.worker import check_worker
from tests.run_coalm import coalm
from tests.training.test_fp8_emulation import configure
from tests.training.test_fp8_emulation import model as model

STEPS = 4
TP2_PP2 = ["parallel.tensor=2", "parallel.pipeline=2"]


def check(
    ranks_pool: Any, model: Path, rows: Path, out: Path, recipe: str, nproc: int, *words: str, seeds: int = 1
) -> dict[str, Any]:
    run = configure(model, rows, out, recipe, *words)
    variants = make_variants(run, STEPS, "", control=seeds == 1)
    codes = ranks_pool.train(run, nproc, check_worker(variants, out / "check", 0.01, seeds), fine=(0, 1))
    result: dict[str, Any] = json.loads((out / "check/fp8_check.json").read_text())
    assert codes == [0 if result["verdict"] == "pass" else 1] + [0] * (nproc - 1)
    assert (out / "check/fp8_check.png").stat().st_size > 10_000
    return result


@pytest.mark.parametrize("recipe", ["current", "blockwise", "delayed"])
def test_same_on_another_layout(recipe: str, ranks_pool: Any, rows_file: Path, model: Path, tmp_path: Path) -> None:
    one = check(ranks_pool, model, rows_file, tmp_path / "one", recipe, 1)
    four = check(ranks_pool, model, rows_file, tmp_path / "four", recipe, 4, *TP2_PP2)
    assert len(one["matrices"]) == 16 and one["matrices"].keys() == four["matrices"].keys()
    for name in ("baseline", "fp8", "control"):
        (ones,), (fours,) = one["seeds"], four["seeds"]
        assert ones[name]["losses"] == pytest.approx(fours[name]["losses"], rel=0, abs=2e-4)
        assert ones[name]["after"] == pytest.approx(fours[name]["after"], rel=0, abs=1e-3)
        assert len(ones[name]["losses"]) == STEPS and ones[name]["after"] < ones[name]["losses"][-1]
    for name, matrix in one["matrices"].items():
        assert 0.9 < matrix["gradient_cosine"] < 1 - 1e-6, "FP8 ran, and points nearly where fp32 does"
        assert 0.005 < matrix["input_error"] < 0.05 and 0.005 < matrix["weight_error"] < 0.05, (
            "e4m3: 3 bits of mantissa"
        )
        assert 0.02 < matrix["gradient_error"] < 0.1, "e5m2: 2 bits"
        assert matrix["input_error"] == pytest.approx(four["matrices"][name]["input_error"], rel=0.2)
        assert matrix["gradient_cosine"] == pytest.approx(four["matrices"][name]["gradient_cosine"], abs=5e-3)


def test_kept_out_layers_have_equal_gradients(ranks_pool: Any, rows_file: Path, model: Path, tmp_path: Path) -> None:
    """All layers but the first kept out: the last layers' gradients differ only by what the first one passes on."""
    words = ["precision.bf16_layers_at_end=4"]
    result = check(ranks_pool, model, rows_file, tmp_path, "current", 1, *words)
    assert all(m["gradient_cosine"] == pytest.approx(1, abs=1e-6) for m in result["matrices"].values())
    assert result["loss_gap"] == pytest.approx(0, abs=1e-9) and result["verdict"] == "pass"


def test_seeds(ranks_pool: Any, rows_file: Path, model: Path, tmp_path: Path) -> None:
    """Each seed is another order of rows, and the same seed the same run."""
    three = check(ranks_pool, model, rows_file, tmp_path / "three", "current", 1, seeds=3)
    last = check(ranks_pool, model, rows_file, tmp_path / "last", "current", 1, f"run.seed={three['seeds'][2]['seed']}")
    assert [s["seed"] - three["seeds"][0]["seed"] for s in three["seeds"]] == [0, 1, 2]
    curves = [s["baseline"] for s in three["seeds"]]
    assert curves[0] != curves[1] != curves[2] and all(s["control"] is None for s in three["seeds"])
    for name in ("baseline", "fp8"):
        assert three["seeds"][2][name] == last["seeds"][0][name]
    gaps = [s["loss_gap"] for s in three["seeds"]]
    assert three["loss_gap"] == pytest.approx(sum(gaps) / 3) and three["noise"] > 0


def test_without_fp8_it_says_so(
    rows_file: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"model.hf_path={model}", f"data.train={rows_file}", f"run.dir={tmp_path / 'run'}"]
    assert coalm("fp8-check", "--recipe", "coalm_tiny", *words) == 2
    assert "nothing to compare" in capsys.readouterr().err
    assert coalm("fp8-check", "--recipe", "coalm_tiny", "--precision", "fp8_current", "--nproc", "1", *words) == 2
    assert "needs Transformer Engine" in capsys.readouterr().err
    assert (
        coalm("fp8-check", "--recipe", "coalm_tiny", "--seeds", "0", "precision.dtype=fp8_emulated_current", *words)
        == 2
    )
    assert "--seeds 0" in capsys.readouterr().err
    same = ["--seeds", "2", "--precision", "fp8_emulated_current", "data.shuffle=false"]
    assert coalm("fp8-check", "--recipe", "coalm_tiny", *same, *words) == 2
    assert "the same run 2 times" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
