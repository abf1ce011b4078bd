"""A running job's FLOPs and MFU are the planner's, and what is off the plan is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coalm_nemo.config import RunConfig, build_config
from coalm_nemo.planning.adapt import expected
from coalm_nemo.planning.flops import CAUSAL, FULL, model_flops_per_token
from coalm_nemo.planning.hardware import GPUS, gpu_of_device
from coalm_nemo.planning.memory import stage_memory
from coalm_nemo.planning.shapes import SHAPES
from coalm_nemo.training.callbacks.metrics_file import read_steps
from coalm_nemo.training.throughput import SPEED_AFTER_STEPS, Meter, attended, compare_memory, gather_peaks, peak_of
from recipes import load_recipe
from tests.tiny_llama import make_tiny_llama

LENGTHS = np.array([100, 300, 600, 4000, 50])


def meter(run: RunConfig, gpus: int, *, gpu: str = "", fill: float = 1.0) -> tuple[Meter, list[str]]:
    said: list[str] = []
    made = Meter(run, SHAPES[run.model.shape], gpus, LENGTHS, fill, torch.device("cpu"), said.append)
    if gpu:
        made.gpu, made.peak = GPUS[gpu], peak_of(GPUS[gpu], run.precision.dtype)
    return made, said


@pytest.mark.parametrize("recipe", ["coalm_8b", "coalm_405b", "coalm_8b_lora", "released_8b_lora"])
def test_at_the_planned_speed_the_log_shows_the_planned_mfu(recipe: str) -> None:
    """The same functions: rows of the lengths that the plan assumes, at its tokens/s, are at its MFU in both countings."""
    run = load_recipe(recipe)
    plan = expected(run, SHAPES[run.model.shape], 8 if "8b" in recipe else 128, attended=attended(LENGTHS[:3]))
    assert plan is not None
    if not run.data.packing:
        plan = replace(plan, job=replace(plan.job, packed=True))
    watch, _ = meter(run, plan.job.gpus, gpu="h100-80gb")
    seconds = LENGTHS[:3].sum() / (plan.tokens_per_s_per_gpu * plan.job.gpus)
    step = watch.measure([0, 1, 2], int(LENGTHS[:3].sum()), float(seconds))
    assert (step.mfu_causal, step.mfu_full) == pytest.approx(plan.both_mfu)
    assert step.mfu_causal is not None and watch.peak is not None
    assert step.tflops_per_device * 1e12 == pytest.approx(step.mfu_causal * watch.peak)


def test_flops_are_those_of_the_rows_one_by_one() -> None:
    run = load_recipe("coalm_8b")
    watch, _ = meter(run, 4)
    step = watch.measure([0, 2, 4], 750, 0.5)
    for found, counting in ((step.tflops_per_device, CAUSAL), (step.tflops_per_device_full, FULL)):
        total = sum(n * model_flops_per_token(SHAPES["8b"], n, counting) for n in (100, 600, 50))
        assert found == pytest.approx(total / 0.5 / 4 / 1e12)


def test_where_no_peak_is_known_there_is_no_mfu() -> None:
    run = load_recipe("coalm_8b")
    step = meter(run, 8)[0].measure([0], 100, 1.0)
    assert step.tflops_per_device > 0
    rest = (
        step.mfu_causal,
        step.mfu_full,
        step.memory_allocated_bytes,
        step.predicted_tokens_per_s,
        step.predicted_memory_bytes,
    )
    assert rest == (None,) * 5
    run.precision.dtype, run.precision.gradients, run.precision.fp8_params = "fp32", "fp32", False
    watch, _ = meter(run, 8, gpu="h100-80gb")
    assert watch.measure([0], 100, 1.0).mfu_causal is None
    assert list(watch.lines()) == []


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H200", "h200-141gb"),
        ("NVIDIA H100 PCIe", ""),
        ("NVIDIA H100 NVL", ""),
        ("NVIDIA H200 NVL", ""),
        ("NVIDIA GH200 480GB", ""),
        ("NVIDIA A100-SXM4-80GB", ""),
        ("", ""),
    ],
)
def test_only_devices_with_the_published_peaks_are_known(name: str, gpu: str) -> None:
    found = gpu_of_device(name)
    assert (found.name if found else "") == gpu


def test_memory_off_by_more_than_a_tenth_is_told_by_stage() -> None:
    plan = expected(load_recipe("coalm_70b"), SHAPES["70b"], 32)
    assert plan is not None
    planned = [stage_memory(plan.job, plan.layout, stage).allocated for stage in range(4)]
    near = [(stage, planned[stage] * factor) for stage in range(4) for factor in (0.5, 1.09)]
    assert list(compare_memory(plan, near)) == []  # the fullest rank of a stage counts
    far = [*near, (2, planned[2] * 1.2)]
    (sentence,) = compare_memory(plan, far)
    assert sentence.startswith("stage 2 ") and "+20%" in sentence
    padded = replace(plan, job=replace(plan.job, packed=False))
    less = [(stage, planned[stage] * 0.5) for stage in range(4)]
    assert len(list(compare_memory(plan, less))) == 4
    assert (
        list(compare_memory(padded, [(s, 0.5 * stage_memory(padded.job, plan.layout, s).allocated) for s in range(4)]))
        == []
    )


def test_a_run_far_below_the_plan_is_told_once() -> None:
    watch, said = meter(load_recipe("coalm_8b"), 8, gpu="h100-80gb", fill=0.5)
    assert watch.plan is not None and watch.predicted_tokens_per_s is not None
    assert watch.predicted_tokens_per_s == pytest.approx(0.5 * 8 * watch.plan.tokens_per_s_per_gpu)
    for _ in range(3 * SPEED_AFTER_STEPS):
        watch.measure([0], 100, 100 / (0.5 * watch.predicted_tokens_per_s))
    assert len(said) == 1 and "50% below the planned" in said[0]
    fast, quiet = meter(load_recipe("coalm_8b"), 8, gpu="h100-80gb")
    for _ in range(SPEED_AFTER_STEPS):
        fast.measure([0], 100, 100 / (0.8 * (fast.predicted_tokens_per_s or 0)))
    assert quiet == []


def test_a_run_logs_its_flops_and_no_mfu_on_cpu(
    ranks_pool: Any, rows_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = make_tiny_llama(tmp_path / "llama", num_layers=4)
    words = [f"run.dir={tmp_path / 'run'}", f"model.hf_path={model}", f"data.train={rows_file}", "train.steps=2"]
    words += ["train.seq_len_tokens=256", "batch.global_size=4", "data.packing=true", "precision.dtype=bf16"]
    assert ranks_pool.train(build_config(load_recipe("coalm_tiny"), [], words), 2) == [0, 0]
    for step in read_steps(tmp_path / "run" / "metrics.jsonl"):
        assert 0 < step["tflops_per_device"] < step["tflops_per_device_full"] < 10
        assert not {"mfu_causal", "memory_allocated_bytes", "predicted_tokens_per_s"} & step.keys()
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1


def gathering_worker(run: RunConfig) -> int:
    """Each rank has held (rank + 1) GiB; every rank hears of all, by pipeline stage."""
    from coalm_nemo.platform import choose_platform
    from coalm_nemo.training.ranks import meet, ranks_from_environment
    from coalm_nemo.training.setup import start_process_groups, stop_process_groups

    ranks = ranks_from_environment()
    start_process_groups(run, choose_platform("cpu"), ranks, meet(ranks, 60))
    peaks = gather_peaks((ranks.rank + 1) * 2**30, torch.device("cpu"))
    stop_process_groups()
    return 0 if peaks == [(0, 2.0**30), (0, 2.0**31), (1, 3 * 2.0**30), (1, 2.0**32)] else 3


def test_every_ranks_peak_is_known_by_stage(ranks_pool: Any, tmp_path: Path) -> None:
    run = load_recipe("coalm_demo")
    run.run.dir = str(tmp_path / "run")
    assert ranks_pool.train(run, 4, gathering_worker) == [0] * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_is_read_from_the_device() -> None:
    watch = Meter(load_recipe("coalm_8b"), SHAPES["8b"], 1, LENGTHS, 1.0, torch.device("cuda", 0), print)
    kept = torch.zeros(2**20, device="cuda")
    step = watch.measure([0], 100, 1.0)
    assert step.memory_allocated_bytes is not None and step.memory_allocated_bytes >= kept.numel() * 4
