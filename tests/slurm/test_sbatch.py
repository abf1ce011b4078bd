"""The scripts of slurm/ on nodes with pretended GPUs: only what the command line and the cluster's settings change."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from coalm_nemo.config import build_config
from coalm_nemo.errors import EXIT_BAD_NODE, EXIT_USER_ERROR
from coalm_nemo.training.callbacks.metrics_file import read_steps
from recipes import load_recipe
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import ROOT, Job

pytestmark = pytest.mark.slurm

STEPS = 12
SCRIPTS = ["train_8b.sh", "train_70b.sh", "train_405b.sh", "preflight.sh", "pipeline.sh"]


@pytest.fixture
def job(cluster: Cluster, tmp_path: Path) -> Job:
    return Job(cluster, tmp_path)


def words_for(model: Path, rows: Path, steps: int = STEPS) -> list[str]:
    return [f"model.hf_path={model}", f"data.train={rows}", f"train.steps={steps}", "batch.global_size=4"]


def test_405b_on_four_nodes(ranks_pool: Any, job: Job, tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    """4 nodes x 2 ranks with the preflight; nothing of the script but its sizes and the recipe is changed."""
    layout = ["parallel.tensor=2", "parallel.pipeline=2"]
    words = words_for(tiny_llama, rows_file)
    job.options = ("--nodes=4", "--ntasks-per-node=2", "--gpus-per-node=2", "--time=30")
    code, log = job.submit(*words, *layout, script="train_405b.sh").outcome()
    assert code == 0, log
    assert "8 ranks / (TP 2 x PP 2 x CP 1)" in log and "4 nodes are used: node1, node2, node3, node4" in log
    assert "all-reduce of 4 MiB over 8 ranks" in log and "torch 2." in log and f"finished at step {STEPS}" in log
    for line in (
        "nodes       4 x 2 ranks: node[1-4]",
        "recipe      coalm_tiny",
        f"run         {job.run_dir}",
        "commit ",
    ):
        assert line in log
    assert job.saved() == [STEPS] and job.causes() == ["finished"]
    logs = sorted(p.name for p in job.run_dir.glob("logs/*-1/rank_*.log"))
    assert logs == [f"rank_{r:04}_node{1 + r // 2}.log" for r in range(8)]
    local = build_config(load_recipe("coalm_tiny"), [], [*words, f"run.dir={tmp_path}/local"])
    assert ranks_pool.train(local, 1) == [0]
    expected = [s["lm_loss"] for s in read_steps(tmp_path / "local" / "metrics.jsonl")]
    assert job.losses() == pytest.approx(expected, rel=0, abs=2e-6)


def test_a_signal_by_hand_saves_and_goes_on(job: Job, tiny_llama: Path, rows_file: Path) -> None:
    """Without --batch: every rank gets it by itself."""
    job.submit(*words_for(tiny_llama, rows_file, 40), SKIP_PREFLIGHT="1", STEP_S="0.1")
    job.wait_until(lambda: job.reached() > 0)
    assert job.cluster.run(["scancel", "--signal=USR1", job.number])[0] == 0
    code, log = job.outcome()
    assert code == 0, log
    stopped = re.search(r"stopped by a signal at step (\d+) \(exit code 75\): signal", log)
    assert stopped and f"requeued: goes on from step {stopped[1]}" in log
    assert f"resuming after step {stopped[1]}:" in log and "before      1 signal" in log
    assert job.causes() == ["signal", "finished"] and len(job.losses()) == 40


def test_bad_input_is_told_and_not_tried_again(job: Job, tiny_llama: Path, tmp_path: Path) -> None:
    code, log = job.submit(*words_for(tiny_llama, tmp_path / "none.jsonl"), SKIP_PREFLIGHT="1").outcome()
    assert code == EXIT_USER_ERROR, log
    assert "none.jsonl" in log and "Traceback" not in log
    assert "bad input (exit code 2): not started again" in log and "Restarts=0" in job.show()


def test_a_job_without_progress_ends(job: Job, tmp_path: Path) -> None:
    """A rank that is killed each time, long before a checkpoint."""
    python = tmp_path / "dying"
    python.write_text("#!/bin/bash\necho my last words\n[[ $SLURM_PROCID == 1 ]] && kill -9 $$\nsleep 60\n")
    python.chmod(0o755)
    code, log = job.submit(settings=f"PYTHON={python}", SKIP_PREFLIGHT="1").outcome()
    assert code in (137, 143), log  # the killed rank's, or that of the one that srun ends with it
    assert log.count("ended with exit code") == 2 and log.count("requeued: goes on from step 0") == 1
    assert "the first to fail: rank_0001_node2, exit code 137" in log and "  | my last words" in log
    assert "giving up: 2 failures since step 0 brought no newer checkpoint" in log
    assert job.causes() == ["killed", "killed"] and "Restarts=1" in job.show()


def test_a_node_that_fails_the_preflight_is_named(job: Job) -> None:
    """These nodes have no GPUs; with SBATCH_GPUS_PER_NODE forgotten, those of a cluster look the same."""
    code, log = job.submit(settings="GPUS_PER_NODE=8").outcome()
    assert code == EXIT_BAD_NODE, log
    assert "preflight: node1 is left out: it shows 0 GPUs of 8" in log and "Traceback" not in log
    assert "preflight failed (4): not trained" in log


def test_a_cancelled_job_stays_cancelled(job: Job, tmp_path: Path) -> None:
    python = tmp_path / "waiting"
    python.write_text(f"#!/bin/bash\ntouch {tmp_path}/started\nsleep 60 & wait\n")
    python.chmod(0o755)
    job.submit(settings=f"PYTHON={python}", SKIP_PREFLIGHT="1")
    job.wait_until((tmp_path / "started").exists)
    assert job.cluster.run(["scancel", job.number])[0] == 0
    _, log = job.outcome()
    assert "requeued: " not in log and "(COMPLETING): not requeued from here" in log
    assert "JobState=CANCELLED" in job.show() and "Restarts=0" in job.show()


@pytest.mark.parametrize("script", SCRIPTS)
def test_slurm_takes_the_script(cluster: Cluster, script: str) -> None:
    two = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2"]
    code, out = cluster.run(["sbatch", "--test-only", *two, str(ROOT / "slurm" / script)])
    assert code == 0, out
