"""The planner against published figures: the bounds that are promised, and that the fit finds what is there."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from coalm_nemo.errors import UserError
from coalm_nemo.planning import fit as module
from coalm_nemo.planning.constants import CONSTANTS_FILE, PRIOR, Constants, fitted
from coalm_nemo.planning.costs import step_time
from coalm_nemo.planning.fit import NAMES, fit, leave_one_model_out, relative_error, summary
from coalm_nemo.planning.published import Published, read_published

ROWS = read_published()


def test_errors_are_within_the_stated_bounds() -> None:
    errors = summary([relative_error(r, fitted()) for r in ROWS])
    assert errors["median"] <= 0.03
    assert errors["worst"] <= 0.15


def test_a_model_that_was_not_fitted_on_is_predicted_too() -> None:
    assert summary(leave_one_model_out(ROWS))["median"] <= 0.06


def test_the_kept_constants_are_those_of_a_fit_today() -> None:
    again = fit(ROWS)
    for name in NAMES:
        assert getattr(again, name) == pytest.approx(getattr(fitted(), name), rel=1e-3, abs=1e-6)


def test_the_priors_alone_are_not_far_off() -> None:
    """Most is physics: before any row is seen the median error is below 10 %."""
    assert summary([relative_error(r, PRIOR) for r in ROWS])["median"] < 0.10


def test_the_fit_recovers_constants_that_made_the_rows() -> None:
    truth = replace(PRIOR, gemm_fp8=0.64, gemm_bf16=0.64, tensor_exposed=0.4)
    made = [replace(r, tokens_per_s_per_gpu=_rate(r, truth)) for r in ROWS]
    found = fit(made)
    assert max(abs(relative_error(r, found)) for r in made) < 0.01
    assert found.gemm_fp8 == pytest.approx(0.64, abs=0.015)


def _rate(row: Published, constants: Constants) -> float:
    job = row.job
    return job.global_batch * job.seq_len_tokens / step_time(job, row.layout, constants).total / job.gpus


def test_one_wild_row_does_not_drag_the_rest() -> None:
    wild = [replace(ROWS[0], tokens_per_s_per_gpu=ROWS[0].tokens_per_s_per_gpu * 3), *ROWS[1:]]
    moved = fit(wild)
    assert abs(math.log(moved.gemm_fp8 / fitted().gemm_fp8)) < 0.05


def test_the_script_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "CONSTANTS_FILE", tmp_path / "constants.json")
    module.main(["--write"])
    out = capsys.readouterr().out
    assert "leave one model out: median" in out
    written = json.loads((tmp_path / "constants.json").read_text())
    assert written["values"].keys() == json.loads(CONSTANTS_FILE.read_text())["values"].keys()


def test_a_csv_that_is_not_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_published(tmp_path / "none.csv")
    (tmp_path / "odd.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="not in the form"):
        read_published(tmp_path / "odd.csv")
