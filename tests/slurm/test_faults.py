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
from tests.slurm.faults import FAULTS, Fault, survive, words_for
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


@pytest.fixture(scope="module")
def job_of_three_limits(
    cluster: Cluster, tiny_llama: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Job:
    """Submitted first, read last: its minutes pass while the others run."""
    options = ("--nodes=2", "--ntasks-per-node=1", "--time=1", "--signal=B:USR1@5")
    job = Job(cluster, tmp_path_factory.mktemp("limits"), options=options)
    words = [
        *words_for(tiny_llama, rows_file, LIMIT_STEPS),
        "checkpoint.save_interval_steps=0",
        "logging.wandb=offline",
    ]
    return job.submit(*words, SKIP_PREFLIGHT="1", STEP_S="0.8")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_a_fault_is_survived(
    cluster: Cluster, tmp_path: Path, fault: Fault, tiny_llama: Path, rows_file: Path, expected: list[float]
) -> None:
    recovery = survive(cluster, tmp_path / "job", fault, words_for(tiny_llama, rows_file), expected)
    assert recovery.starts == (2 if fault.cause else 1) and recovery.wandb_runs == 1
    if out := os.environ.get("COALM_FAULTS_OUT"):
        with Path(out).open("a") as file:
            file.write(json.dumps(asdict(recovery)) + "\n")


def test_a_poisoned_batch_is_named(cluster: Cluster, tmp_path: Path, tiny_llama: Path, rows_file: Path) -> None:
    job = Job(cluster, tmp_path)
    words = [*words_for(tiny_llama, rows_file), "checkpoint.save_interval_steps=1"]
    code, log = job.submit(*words, SKIP_PREFLIGHT="1", CRASH_ON_ROW="row30").outcome()
    assert code != 0
    step = re.search(r"step (\d+) trains on 4 rows: (.*) \(also in", log)
    assert step and "row30" in step[2].split(", "), log
    assert job.causes() == ["crashed"] * 2 and f"giving up: step {step[1]} has failed 2 times" in log
    assert "exit code 139" in log and (job.run_dir / f"failed_step_{int(step[1]):08d}.json").is_file()


def test_the_time_limit_is_reached_three_times(
    job_of_three_limits: Job, ranks_pool: Any, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    words = words_for(tiny_llama, rows_file, LIMIT_STEPS)
    expected = uninterrupted(ranks_pool, tmp_path / "run", words)
    code, log = job_of_three_limits.outcome()
    assert code == 0, log
    assert job_of_three_limits.causes()[:3] == ["time limit"] * 3 and job_of_three_limits.causes()[-1] == "finished"
    assert job_of_three_limits.losses() == pytest.approx(expected, rel=0, abs=1e-6)
    assert len({p.name.rpartition("-")[2] for p in job_of_three_limits.run_dir.glob("wandb/offline-run-*")}) == 1
