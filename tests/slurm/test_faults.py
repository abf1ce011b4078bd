"""Whatever happens to a job, it ends by itself with the losses of the uninterrupted run, and stays one W&B run."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from coalm_nemo.config import build_config
from coalm_nemo.training.callbacks.metrics_file import read_steps
from recipes import load_recipe
from tests.slurm.cluster import Cluster
from tests.slurm.faults import FAULTS, Fault, Recovery, survive, words_for
from tests.slurm.jobs import Job

pytestmark = pytest.mark.slurm
LIMIT_STEPS = 150


def uninterrupted(ranks_pool: Any, run_dir: Path, words: list[str]) -> list[float]:
    """The losses of the same run here, on two ranks."""
    run = build_config(
        load_recipe("coalm_tiny"), [], [*words, f"run.dir={run_dir}", "checkpoint.save_interval_steps=0"]
    )
    assert ranks_pool.train(run, 2) == [0, 0]
    return [s["lm_loss"] for s in read_steps(run_dir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def expected(
    ranks_pool: Any, tiny_llama: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    return uninterrupted(ranks_pool, tmp_path_factory.mktemp("expected") / "run", words_for(tiny_llama, rows_file))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_a_fault_is_survived(
    cluster: Cluster, tmp_path: Path, fault: Fault, tiny_llama: Path, rows_file: Path, expected: list[float]
) -> None:
    recovery = survive(cluster, tmp_path / "job", fault, words_for(tiny_llama, rows_file), expected)
    assert recovery.starts == (2 if fault.cause else 1) and recovery.wandb_runs == 1
    if out := os.environ.get("COALM_FAULTS_OUT"):
        keep(Path(out), recovery)


def keep(out: Path, recovery: Recovery) -> None:
    """A line for benchmarks/slurm_faults.py."""
    with out.open("a") as file:
        file.write(json.dumps(asdict(recovery)) + "\n")


def test_a_poisoned_batch_is_named(cluster: Cluster, tmp_path: Path, tiny_llama: Path, rows_file: Path) -> None:
    job = Job(cluster, tmp_path)
    words = [*words_for(tiny_llama, rows_file), "checkpoint.save_interval_steps=4"]
    code, log = job.submit(*words, SKIP_PREFLIGHT="1", CRASH_ON_ROW="row14").outcome()
    assert code != 0
    step = re.search(r"step (\d+) trains on 4 rows: (.*) \(also in", log)
    assert step and "row14" in step[2].split(", "), log
    assert job.causes() == ["crashed"] * 2 and f"giving up: step {step[1]} has failed 2 times" in log
    assert "exit code 139" in log and (job.run_dir / f"failed_step_{int(step[1]):08d}.json").is_file()


def test_the_time_limit_is_reached_three_times(
    cluster: Cluster, ranks_pool: Any, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    """Of a minute each, the least that SLURM knows. The job saves before it by what its saves have taken."""
    options = ("--nodes=2", "--ntasks-per-node=1", "--time=1", "--signal=B:USR1@5")
    job = Job(cluster, tmp_path / "job", options=options)
    words = words_for(tiny_llama, rows_file, LIMIT_STEPS)
    job.submit(*words, "logging.wandb=offline", SKIP_PREFLIGHT="1", STEP_S="0.8")
    expected = uninterrupted(ranks_pool, tmp_path / "run", words)
    code, log = job.outcome()
    assert code == 0, log
    assert job.causes()[:3] == ["time limit"] * 3 and job.causes()[-1] == "finished"
    assert job.losses() == pytest.approx(expected, rel=0, abs=1e-6)
    assert len({p.name.rpartition("-")[2] for p in job.run_dir.glob("wandb/offline-run-*")}) == 1
    if out := os.environ.get("COALM_FAULTS_OUT"):
        keep(Path(out), limits_recovery(job, expected))


def limits_recovery(job: Job, expected: list[float]) -> Recovery:
    """From the last step before each limit to the first one after it; the mean."""
    steps = {int(s["step"]): float(s["time"]) for s in job.steps()}
    gaps = [steps[start + 1] - steps[start] for start in job.starts()[1:] if start < LIMIT_STEPS]
    repeated = sum(max(0, end - start) for (_, end), start in zip(job.ends(), job.starts()[1:], strict=False))
    worst = max(abs(a - b) for a, b in zip(job.losses(), expected, strict=True))
    name = f"time limit, {len(gaps)} times"
    return Recovery(name, len(job.starts()), "time limit", sum(gaps) / len(gaps), repeated, worst, 1)
