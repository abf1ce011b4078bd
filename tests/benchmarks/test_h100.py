"""The command for H100s: it runs end to end in tiny shapes, refuses where there is no GPU, and can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import h100, h100_numerics
from benchmarks.h100_cases import SMOKE, TINY, Case, make_run, make_slice, speed_parts
from coalm_nemo.planning.adapt import expected
from coalm_nemo.platform import Platform
from coalm_nemo.validate import check_run

ROOT = Path(__file__).parents[2]
CPU = Platform("cpu", "gloo", transformer_engine=False)
GPU = Platform("cuda", "nccl", transformer_engine=True)
CASES = [case for part in speed_parts(8, engine=True).values() for case in part]
PLAIN_GPU = replace(GPU, transformer_engine=False)
PLAIN_CASES = [case for part in speed_parts(8, engine=False).values() for case in part]
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def run_h100(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.h100", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = run_h100()
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("h100: torch sees no GPU") and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("case", "platform"),
    [*((c, GPU) for c in CASES), *((c, PLAIN_GPU) for c in PLAIN_CASES)],
    ids=lambda value: value.name if isinstance(value, Case) else str(value.transformer_engine),
)
def test_every_case_is_a_run_that_fits(case: Case, platform: Platform) -> None:
    """What is asked of the GPU is legal, and by the planner it fits with one layer at least and one more would not."""
    run = make_run(case, platform)
    llama = make_slice(case, run, "h100-80gb")
    assert llama is not None and llama.num_layers >= 1
    check_run(run, llama, case.tensor)
    whole = {"8b": 32, "70b": 80, "405b": 126}[case.shape]
    more = expected(run, replace(llama, num_layers=llama.num_layers + 1), case.tensor)
    assert llama.num_layers == whole or (more and not more.fits)


def test_a_part_has_time_for_its_cases() -> None:
    assert max(map(len, speed_parts(8, engine=True).values())) * h100.CASE_S <= h100.PART_LIMIT_S <= 600
    assert "tensor" not in speed_parts(1, engine=True)
    assert {c.shape for c in CASES} == {"8b", "70b", "405b"} and {c.task for c in CASES} == {"full", "lora"}
    assert {c.precision for c in CASES} == {"bf16", "fp8_current", "fp8_blockwise", "fp8_delayed"}
    assert {c.precision for c in PLAIN_CASES} == {"bf16", "fp8_scaled_mm"}, "named as torch's own"


def test_a_table_without_results_says_not_measured() -> None:
    text = h100.table({"machine": h100.describe(GPU, 0), "parts": {}})
    assert text.count("not measured") == 5
    missing = {"case": "8b full bf16 4096", "not_measured": "out of memory"}
    assert "not measured: out of memory" in h100.table(
        {"machine": h100.describe(GPU, 0), "parts": {"8b-4096": [missing]}}
    )


def test_targets_are_judged() -> None:
    row = {"task": "full", "precision": "bf16", "tflops_causal": 549.0}
    assert "NOT passed" in h100._targets({"8b-4096": [row]})[0]
    assert h100._targets({"8b-8192": [row | {"tflops_causal": 551.0}]})[0].endswith("551 TFLOP/s, passed")


def test_a_command_that_crashes_or_hangs_is_told(tmp_path: Path) -> None:
    crash = [sys.executable, "-c", "raise SystemExit(3)"]
    assert h100.call(crash, tmp_path / "log", 30).startswith("it ended with exit code 3")
    hang = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert h100.call(hang, tmp_path / "log", 0.5).startswith("it took more than")


def test_a_case_measures_speed_in_its_own_process(tmp_path: Path) -> None:
    """Also with Transformer Engine missing: its cases say so, and are not silently something else."""
    assert SMOKE["tiny-128"][0].task == "lora"
    for row in h100.measure_cases(SMOKE["tiny-128"], tmp_path, smoke=True):
        assert row["finite"] and row["tokens_per_s_per_gpu"] > 0 and row["tflops_full"] > row["tflops_causal"] > 0
        assert (row["layers"], row["layers_from"]) == (TINY.num_layers, "torch")
    (fp8,) = h100.measure_cases([Case("tiny", "full", "fp8_current", 64)], tmp_path, smoke=True)
    assert fp8["not_measured"] == "needs Transformer Engine"


@pytest.mark.parametrize("broken", [False, True])
def test_numerics_pass_and_can_fail(broken: bool, tmp_path: Path, ranks_pool: Any) -> None:
    """A rotary frequency off by half is found against transformers."""
    from coalm_nemo.config import RunConfig

    run = RunConfig()
    run.run.dir = str(tmp_path / "run")

    def check(_: RunConfig) -> int:
        from coalm_nemo.models import gpt

        if broken:
            right = gpt.rope_inv_freq
            gpt.rope_inv_freq = lambda llama: right(llama) * 1.5  # type: ignore[assignment]
        rows = h100_numerics.check(CPU, tmp_path, smoke=True)
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        return 0

    assert ranks_pool.train(run, 1, worker=check) == [0]
    rows = {r["variant"]: r for r in json.loads((tmp_path / "rows.json").read_text())}
    assert all("not_measured" in r for name, r in rows.items() if name.startswith("transformer_engine"))
    assert rows["torch fp32"]["passed"] is not broken
    for precision in ("bf16", "fp8_emulated_current", "fp8_scaled_mm"):
        assert rows[f"torch {precision}"]["passed"] is not broken


@pytest.mark.slow
def test_smoke_end_to_end(tmp_path: Path) -> None:
    """One part after the other adds to the same results."""
    for part in ("gates", "tensor"):
        done = run_h100("--smoke", "--out", str(tmp_path), "--part", part)
        assert done.returncode == 0, done.stderr
    known = json.loads((tmp_path / "results.json").read_text())
    assert known["smoke"] and set(known["parts"]) == {"gates", "tensor"}
    assert [g["gate"] for g in known["parts"]["gates"]] == ["fp8_emulated_current", "fp8_scaled_mm"]
    assert all(g["verdict"] in ("pass", "within noise", "fail") for g in known["parts"]["gates"])
    assert known["parts"]["tensor"][0]["tokens_per_s_per_gpu"] > 0
    text = (tmp_path / "table.md").read_text()
    assert text.startswith("A smoke run") and "tiny full bf16 64 TP2" in text


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("precision", ["bf16", "fp8_scaled_mm"])
def test_a_slice_on_a_gpu(precision: str, tmp_path: Path) -> None:
    (row,) = h100.measure_cases([Case("8b", "full", precision, 4096)], tmp_path, smoke=False)
    assert row["finite"] and row["tflops_causal"] > 1 and row["memory_bytes"] > 2**30


@pytest.mark.gpu
@NO_GPU
def test_numerics_on_a_gpu(tmp_path: Path) -> None:
    """Torch layers on the GPU, and Transformer Engine's where they are."""
    where, _ = h100.find_platform(False)
    rows = h100.numerics(where, tmp_path, False)
    assert all(r.get("not_measured") == "needs Transformer Engine" or r["passed"] for r in rows)
