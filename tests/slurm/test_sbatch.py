"""The scripts of slurm/ on two nodes without GPUs: only what the command line and the cluster's settings change."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from coalm_nemo.config import build_config
from coalm_nemo.errors import EXIT_USER_ERROR
from coalm_nemo.preflight import EXIT_BAD_NODE
from coalm_nemo.training.callbacks.metrics_file import read_steps
from recipes import load_recipe
from tests.slurm.cluster import Cluster
from tests.slurm.test_srun_train import outcome, show, wait_for_first_step

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]
STEPS = 40
TWO_NODES = ["--nodes=2", "--ntasks-per-node=1", "--time=30"]
SETTINGS = f"""
GPUS_PER_NODE=0
PYTHON={sys.executable}
MAX_STALLED_STARTS=2
export LINGER_S=2
"""


@dataclass
class Job:
    """A script under test: how it is submitted, and what it leaves."""

    cluster: Cluster
    directory: Path

    @property
    def run_dir(self) -> Path:
        return self.directory / "run"

    def submit(self, *words: str, script: str = "train_8b.sh", settings: str = "", **variables: str) -> str:
        """The job's number."""
        path = self.directory / "cluster.env"
        path.write_text(SETTINGS + settings)
        options = ["--parsable", f"--chdir={ROOT}", f"--output={self.directory}/%x-%j.log", *TWO_NODES]
        variables = {"RECIPE": "coalm_tiny", "RUN_DIR": str(self.run_dir), "CLUSTER_ENV": str(path)} | variables
        code, out = self.cluster.run(["sbatch", *options, f"slurm/{script}", *words], **variables)
        assert code == 0, out
        return out.strip()


@pytest.fixture
def job(cluster: Cluster, tmp_path: Path) -> Job:
    return Job(cluster, tmp_path)


def words_for(model: Path, rows: Path) -> list[str]:
    return [f"model.hf_path={model}", f"data.train={rows}", f"train.steps={STEPS}", "batch.global_size=4"]


def losses(run_dir: Path) -> list[float]:
    steps = read_steps(run_dir / "metrics.jsonl")
    assert [s["step"] for s in steps] == list(range(1, STEPS + 1))
    return [s["lm_loss"] for s in steps]


def wait_until(true: Callable[[], bool], job: Job, number: str) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, show(job.cluster, number)
        time.sleep(0.1)


def saved_steps(run_dir: Path) -> list[int]:
    return sorted(int(p.parent.name.removeprefix("step_")) for p in run_dir.glob("checkpoints/step_*/manifest.json"))


def test_it_runs_to_the_end(job: Job, tiny_llama: Path, rows_file: Path) -> None:
    """With the preflight, and the 405B script, of which nothing but the sizes is changed."""
    words = [*words_for(tiny_llama, rows_file), "parallel.pipeline=2"]
    code, log = outcome(job.cluster, job.submit(*words, script="train_405b.sh"))
    assert code == 0, log
    assert saved_steps(job.run_dir) == [STEPS]
    assert re.search(r"^0: node1: 0 GPUs.*\n0: node2: 0 GPUs", log, re.MULTILINE), log
    assert "all-reduce of 4 MiB over 2 ranks" in log and "torch 2." in log
    assert f"finished at step {STEPS}" in log
    for line in (
        "nodes       2 x 1 ranks: node[1-2]",
        "recipe      coalm_tiny",
        f"run         {job.run_dir}",
        "commit ",
    ):
        assert line in log


@pytest.fixture(scope="module")
def single_losses(
    ranks_pool: Any, tiny_llama: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    """The losses of the same run in one process."""
    run_dir = tmp_path_factory.mktemp("single")
    words = [*words_for(tiny_llama, rows_file), f"run.dir={run_dir}"]
    assert ranks_pool.train(build_config(load_recipe("coalm_tiny"), [], words), 1) == [0]
    return losses(run_dir)


@pytest.mark.parametrize(
    ("to", "wandb_runs"), [(["--batch"], 0), ([], 1)], ids=["to the script", "to the ranks, and W&B"]
)
def test_a_signal_saves_requeues_and_goes_on(
    job: Job, single_losses: list[float], tiny_llama: Path, rows_file: Path, to: list[str], wandb_runs: int
) -> None:
    """As --signal sends it, and as a hand does that forgets --batch."""
    wandb = "offline" if wandb_runs else "disabled"
    number = job.submit(*words_for(tiny_llama, rows_file), f"logging.wandb={wandb}", SKIP_PREFLIGHT="1")
    wait_for_first_step(job.cluster, number, job.run_dir / "metrics.jsonl")
    assert job.cluster.run(["scancel", *to, "--signal=USR1", number])[0] == 0
    code, log = outcome(job.cluster, number)
    assert code == 0, log
    stopped = re.search(r"stopped by a signal at step (\d+) \(exit code 75\)", log)
    assert stopped and 0 < int(stopped[1]) < STEPS, log
    assert f"requeued: goes on from step {stopped[1]}" in log and f"resuming after step {stopped[1]}:" in log
    assert "start 2\n" in log and "Restarts=1" in show(job.cluster, number)
    parts = [p.name.rpartition("-")[2] for p in job.run_dir.glob("wandb/offline-run-*")]
    assert len(parts) == 2 * wandb_runs and len(set(parts)) == wandb_runs
    assert losses(job.run_dir) == pytest.approx(single_losses, rel=0, abs=2e-6)


def test_a_failed_node_is_survived(job: Job, single_losses: list[float], tiny_llama: Path, rows_file: Path) -> None:
    """SLURM requeues the job itself, and starts it when there are two nodes again."""
    number = job.submit(*words_for(tiny_llama, rows_file), "checkpoint.save_interval_steps=4", SKIP_PREFLIGHT="1")
    wait_for_first_step(job.cluster, number, job.run_dir / "metrics.jsonl")
    wait_until(lambda: bool(saved_steps(job.run_dir)), job, number)
    assert job.cluster.run(["scontrol", "update", "nodename=node2", "state=down", "reason=test"])[0] == 0
    wait_until(lambda: "JobState=PENDING" in show(job.cluster, number), job, number)
    job.cluster.run(["scontrol", "update", "nodename=node2", "state=resume"])  # if it has not come back by itself
    code, log = outcome(job.cluster, number)
    assert code == 0, log
    assert "DUE TO NODE FAILURE" in log and "start 2\n" in log and "Restarts=1" in show(job.cluster, number)
    assert "requeued: " not in log
    assert losses(job.run_dir) == pytest.approx(single_losses, rel=0, abs=2e-6)


def test_bad_input_is_told_and_not_tried_again(job: Job, tiny_llama: Path, tmp_path: Path) -> None:
    number = job.submit(*words_for(tiny_llama, tmp_path / "none.jsonl"), SKIP_PREFLIGHT="1")
    code, log = outcome(job.cluster, number)
    assert code == EXIT_USER_ERROR, log
    assert log.count("none.jsonl") == 1 and "Traceback" not in log
    assert "bad input (exit code 2): not started again" in log and "Restarts=0" in show(job.cluster, number)


def test_a_job_without_progress_ends(job: Job, tmp_path: Path) -> None:
    """A rank that is killed each time, long before a checkpoint."""
    python = tmp_path / "python"
    python.write_text("#!/bin/bash\n[[ $SLURM_PROCID == 1 ]] && kill -9 $$\nsleep 60\n")
    python.chmod(0o755)
    number = job.submit(settings=f"PYTHON={python}", SKIP_PREFLIGHT="1")
    code, log = outcome(job.cluster, number)
    assert code in (137, 143), log  # the killed rank's, or that of the one that srun ends with it
    assert log.count("ended with exit code") == 2 and log.count("requeued: goes on from step 0") == 1
    assert "giving up: 2 starts since step 0 brought no newer checkpoint" in log
    assert "Restarts=1" in show(job.cluster, number)


def test_a_node_that_fails_the_preflight_is_named(job: Job) -> None:
    """These nodes have no GPUs; with SBATCH_GPUS_PER_NODE forgotten, those of a cluster look the same."""
    code, log = outcome(job.cluster, job.submit(settings="GPUS_PER_NODE=8"))
    assert code == EXIT_BAD_NODE, log
    assert log.count("preflight: node1 shows 0 GPUs of 8") == 1 and "node2: 0 GPUs" in log and "Traceback" not in log
    assert "preflight failed (4): not trained" in log


def test_a_cancelled_job_stays_cancelled(job: Job, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/bash\ntouch {tmp_path}/started\nsleep 60 & wait\n")
    python.chmod(0o755)
    number = job.submit(settings=f"PYTHON={python}", SKIP_PREFLIGHT="1")
    wait_until((tmp_path / "started").exists, job, number)
    assert job.cluster.run(["scancel", number])[0] == 0
    _, log = outcome(job.cluster, number)
    assert "requeued: " not in log and "(COMPLETING): not requeued from here" in log
    assert "JobState=CANCELLED" in show(job.cluster, number) and "Restarts=0" in show(job.cluster, number)


@pytest.mark.parametrize("script", ["train_8b.sh", "train_70b.sh", "train_405b.sh", "preflight.sh"])
def test_slurm_takes_the_script(cluster: Cluster, script: str) -> None:
    code, out = cluster.run(["sbatch", "--test-only", *TWO_NODES, str(ROOT / "slurm" / script)])
    assert code == 0, out
