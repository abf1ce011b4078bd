"""A cluster's YAML file -> nemo_run's SLURM executor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coalm_nemo.cluster import ClusterConfig
from coalm_nemo.config import RunConfig
from coalm_nemo.errors import UserError
from recipes.nemo.recipe import require_nemo


def slurm_executor(
    cluster: ClusterConfig, run: RunConfig, nodes: int, time: str = "1-00:00:00", job_dir: str = ""
) -> Any:
    """A rank a GPU on `nodes` nodes; submits from this machine. `job_dir`: scripts and logs; empty: in the run's directory.

    The recipe's environment variables and, over them, the cluster's go to every rank. Raises UserError where nemo_run
    cannot start what the cluster file asks for.
    """
    require_nemo()
    import nemo_run

    if cluster.container == "apptainer":
        raise UserError("container=apptainer: nemo_run starts containers with pyxis only; use slurm/train_*.sh")
    if not cluster.gpus_per_node:
        raise UserError("gpus_per_node=0: NeMo 2.7 trains on GPUs only")
    return nemo_run.SlurmExecutor(
        account=cluster.account,
        partition=cluster.partition or None,
        nodes=nodes,
        ntasks_per_node=cluster.gpus_per_node,
        gpus_per_node=None if cluster.gres else cluster.gpus_per_node,
        gres=cluster.gres or None,
        mem="0",
        exclusive=True,
        time=time,
        container_image=cluster.image if cluster.container == "pyxis" else None,
        container_mounts=_mounts(cluster, run) if cluster.container == "pyxis" else [],
        env_vars=run.run.environment | cluster.environment,
        additional_parameters={name.replace("-", "_"): value for name, value in cluster.sbatch.items()},
        setup_lines=_path_line(cluster),
        tunnel=nemo_run.LocalTunnel(job_dir=job_dir or str(Path(run.run.dir).absolute() / "slurm")),
    )


def _mounts(cluster: ClusterConfig, run: RunConfig) -> list[str]:
    """The cluster's, this repository and the run's directory, each under its own name."""
    own = [Path(__file__).parents[2], Path(run.run.dir).absolute()]
    return [*cluster.mounts, *(f"{path}:{path}" for path in own)]


def _path_line(cluster: ClusterConfig) -> str | None:
    """nemo_run starts `python`: outside a container, the cluster file says which."""
    if cluster.container != "none" or "/" not in cluster.python:
        return None
    return f'export PATH="{Path(cluster.python).absolute().parent}:$PATH"'
