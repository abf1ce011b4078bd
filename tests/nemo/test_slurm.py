"""The same cluster file for nemo_run's SLURM executor."""

from __future__ import annotations

from pathlib import Path

import pytest

from coalm_nemo.cluster import ClusterConfig, load_cluster
from coalm_nemo.errors import UserError
from recipes import load_recipe
from tests.nemo.needs import NEEDS_NEMO

pytestmark = NEEDS_NEMO
ROOT = Path(__file__).parents[2]


def test_the_executor_is_the_cluster_files() -> None:
    from recipes.nemo.slurm import slurm_executor

    cluster = load_cluster(ROOT / "configs" / "clusters" / "h100.yaml")
    cluster.account, cluster.partition, cluster.container = "ours", "gpu", "pyxis"
    cluster.mounts, cluster.sbatch = ["/data:/data"], {"qos": "high"}
    cluster.environment = {"NCCL_IB_HCA": "mlx5", "NVTE_FWD_LAYERNORM_SM_MARGIN": "8"}
    run = load_recipe("coalm_405b")
    made = slurm_executor(cluster, run, nodes=16)
    assert (made.account, made.partition, made.nodes, made.ntasks_per_node, made.gpus_per_node) == (
        "ours", "gpu", 16, 8, 8,
    )  # fmt: skip
    assert made.container_image == cluster.image and "/data:/data" in made.container_mounts
    assert made.env_vars == run.run.environment | cluster.environment
    assert made.env_vars["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert made.env_vars["NVTE_FWD_LAYERNORM_SM_MARGIN"] == "8"
    assert made.additional_parameters == {"qos": "high"}


def test_the_script_that_nemo_run_would_submit(tmp_path: Path) -> None:
    from nemo_run.core.execution.slurm import SlurmBatchRequest

    from recipes.nemo.slurm import slurm_executor

    cluster = ClusterConfig(account="ours", python="/opt/coalm/bin/python")
    executor = slurm_executor(cluster, load_recipe("coalm_8b"), nodes=1, job_dir=str(tmp_path))
    executor.job_dir = executor.experiment_dir = str(tmp_path)
    request = SlurmBatchRequest(
        launch_cmd=["sbatch"], jobs=["coalm"], command_groups=[["python train.py"]], executor=executor, max_retries=0,
        extra_env={},
    )  # fmt: skip
    script = request.materialize()
    for line in (
        "--gpus-per-node=8",
        "--ntasks-per-node=8",
        "export NCCL_AVOID_RECORD_STREAMS=1",
        "/opt/coalm/bin:$PATH",
    ):
        assert line in script, line


def test_what_nemo_run_cannot_start_is_refused() -> None:
    from recipes.nemo.slurm import slurm_executor

    with pytest.raises(UserError, match="pyxis only"):
        slurm_executor(ClusterConfig(container="apptainer"), load_recipe("coalm_8b"), 1)
