"""What is particular to a cluster: one typed YAML file a cluster, and the shell settings that the sbatch scripts read.

`coalm slurm env configs/clusters/NAME.yaml` prints the settings; slurm/cluster.env is what it prints for h100.yaml.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from coalm_nemo.errors import UserError

CONTAINERS = ("none", "pyxis", "apptainer")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
BEGIN = """\
# Made by `coalm slurm env FILE.yaml`: change the YAML and write this file again, or edit this one.
# Source it before sbatch, so that sbatch sees the first part; the job reads all of it again by itself.
"""


def told(default: Any, sentence: str) -> Any:
    """A field whose sentence is both its explanation here and the comment in the shell settings."""
    if callable(default):
        return field(default_factory=default, metadata={"help": sentence})
    return field(default=default, metadata={"help": sentence})


@dataclass
class ClusterConfig:
    """A cluster. Every key is optional; the defaults are nodes of 8 H100 without a container."""

    account: str = told("", "sbatch --account; empty: your default")
    partition: str = told("", "sbatch --partition; empty: the cluster's default")
    sbatch: dict[str, str] = told(dict, "more options of sbatch by their long name, such as qos or reservation")
    gpus_per_node: int = told(8, "what a healthy node shows; also sbatch --gpus-per-node. 0: nodes without GPUs")
    gres: str = told("", "where only --gres is known, such as gpu:8: used instead of --gpus-per-node")
    container: str = told("none", "none: PYTHON on the node; pyxis: srun --container-image; apptainer: apptainer exec")
    image: str = told(
        "nvcr.io#nvidia/nemo:26.02", "pyxis's way to write it, or a .sqsh; apptainer: docker://..., or a .sif"
    )
    mounts: list[str] = told(list, "HOST:CONTAINER; the repository and the run directory are always mounted")
    python: str = told(".venv/bin/python", "in a container: python")
    min_disk_gib: float = told(
        200.0, "free where the run is; a checkpoint of 8B is 0.1 TB, of 405B about 4 TB. 0: not checked"
    )
    min_disk_mb_per_s: float = told(0.0, "a node's speed writing where the run is. 0: not checked")
    min_shm_gib: float = told(8.0, "free in /dev/shm. 0: not checked")
    min_bus_gb_per_s: float = told(0.0, "of an all-reduce over all ranks; four fifths of a good day's. 0: not checked")
    min_pair_gb_per_s: float = told(
        0.0, "the same over two nodes; a node below it with both neighbours is out. 0: not checked"
    )
    max_slowdown: float = told(
        1.5, "a node that computes or sends this much slower than the median is out. 0: not checked"
    )
    max_stalled_starts: int = told(3, "a run that starts this often without a newer checkpoint is not started again")
    max_starts: int = told(50, "nor one that has started this often at all")
    environment: dict[str, str] = told(dict, "network and libraries: these variables go to every rank")


def load_cluster(path: Path) -> ClusterConfig:
    """Raises UserError for a missing or unreadable file, an unknown key, a wrong type or value."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not Path(path).is_file():
        raise UserError(f"the cluster file {path} does not exist")
    try:
        values = OmegaConf.load(path)
    except Exception as e:
        raise UserError(f"{path} is not valid YAML: {str(e).splitlines()[0]}") from e
    if not OmegaConf.is_dict(values):
        raise UserError(f"{path} must hold keys such as 'partition: gpu'")
    known = [f.name for f in fields(ClusterConfig)]
    if unknown := [str(key) for key in values if key not in known]:
        raise UserError(f"{path}: unknown key '{unknown[0]}'; keys are {', '.join(known)}")
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ClusterConfig), values))
    except (OmegaConfBaseException, ValueError) as e:
        raise UserError(f"{path}: {str(e).splitlines()[0].rstrip('.')}") from e
    assert isinstance(config, ClusterConfig)
    check_cluster(config, str(path))
    return config


def check_cluster(config: ClusterConfig, where: str) -> None:
    """Raises UserError for a value that no cluster can have."""
    if config.container not in CONTAINERS:
        raise UserError(f"{where}: container is '{config.container}'; use one of {', '.join(CONTAINERS)}")
    if config.container != "none" and not config.image:
        raise UserError(f"{where}: container={config.container} needs an image")
    for name in ("max_stalled_starts", "max_starts"):
        if getattr(config, name) < 1:
            raise UserError(f"{where}: {name} is {getattr(config, name)}; it must be at least 1")
    for name in (f.name for f in fields(config) if f.name.startswith("min_") or f.name == "gpus_per_node"):
        if not 0 <= getattr(config, name) < float("inf"):
            raise UserError(f"{where}: {name} is {getattr(config, name)}; it must not be negative")
    if config.max_slowdown and not config.max_slowdown > 1:
        raise UserError(f"{where}: max_slowdown is {config.max_slowdown}; it must be above 1, or 0 to leave it out")
    for mount in config.mounts:
        if ":" not in mount or "," in mount:
            raise UserError(f"{where}: mounts has '{mount}'; write HOST:CONTAINER, one a line")
    for name in config.environment:
        if not NAME.fullmatch(name):
            raise UserError(f"{where}: environment has '{name}', which is no name of a variable")


def shell_settings(config: ClusterConfig) -> str:
    """The file that slurm/lib.sh sources: every setting with its comment."""
    helps = {f.name: f.metadata["help"] for f in fields(config)}
    lines = [BEGIN, "# For sbatch. These win over the scripts' #SBATCH lines, and sbatch's own options win over these."]
    lines += [_export(name, value, help_) for name, value, help_ in _sbatch(config, helps)]
    lines.append("\n# For the job.")
    for name in helps:
        if name not in ("account", "partition", "sbatch", "gres", "environment"):
            lines.append(f"{name.upper()}={_value(getattr(config, name))} # {helps[name]}")
    lines.append(f"\n# {helps['environment']}")
    lines += [_export(name, value) for name, value in config.environment.items()]
    return "\n".join(lines) + "\n"


def _sbatch(config: ClusterConfig, helps: dict[str, str]) -> list[tuple[str, str, str]]:
    """(variable, value, comment); without a value it stays a comment."""
    found = [(f"SBATCH_{name.upper()}", getattr(config, name), helps[name]) for name in ("account", "partition")]
    if config.gres:
        found.append(("SBATCH_GRES", config.gres, helps["gres"]))
    elif config.gpus_per_node:
        found.append(
            ("SBATCH_GPUS_PER_NODE", str(config.gpus_per_node), "where only --gres is known: SBATCH_GRES=gpu:8")
        )
    return found + [(f"SBATCH_{k.upper().replace('-', '_')}", v, "") for k, v in config.sbatch.items()]


def _export(name: str, value: str, comment: str = "") -> str:
    line = f"export {name}={_value(value)}" if value else f"# export {name}="
    return f"{line} # {comment}" if comment else line


def _value(value: Any) -> str:
    if isinstance(value, list):
        return shlex.quote(",".join(value)) if value else ""
    return shlex.quote(f"{value:g}" if isinstance(value, float) else str(value)) if value != "" else ""
