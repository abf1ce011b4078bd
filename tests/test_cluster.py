"""A cluster's YAML, and the shell settings made of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coalm_nemo.cluster import ClusterConfig, load_cluster, shell_settings
from coalm_nemo.errors import UserError
from tests.run_coalm import coalm

ROOT = Path(__file__).parents[1]
CLUSTERS = sorted((ROOT / "configs" / "clusters").glob("*.yaml"))


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda p: p.stem)
def test_every_cluster_of_the_repository_loads(path: Path) -> None:
    assert load_cluster(path).max_starts >= 1


def test_the_shell_file_is_the_h100_cluster() -> None:
    """After a change: coalm slurm env configs/clusters/h100.yaml > slurm/cluster.env"""
    made = shell_settings(load_cluster(ROOT / "configs" / "clusters" / "h100.yaml"))
    assert (ROOT / "slurm" / "cluster.env").read_text() == made


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("contaner: none", "unknown key 'contaner'; keys are account, "),
        ("gpus_per_node: many", "'many'"),
        ("container: docker", "container is 'docker'; use one of none, pyxis, apptainer"),
        ("container: pyxis\nimage: ''", "needs an image"),
        ("max_starts: 0", "max_starts is 0; it must be at least 1"),
        ("min_disk_gib: -1", "min_disk_gib is -1.0; it must not be negative"),
        ("max_slowdown: 0.5", "max_slowdown is 0.5"),
        ("mounts: [/data]", "mounts has '/data'; write HOST:CONTAINER"),
        ("environment: {'A B': x}", "'A B', which is no name of a variable"),
        ("a: [", "is not valid YAML"),
        ("- a", "must hold keys"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as told:
        load_cluster(path)
    assert said in str(told.value) and "mine.yaml" in str(told.value) and "\n" not in str(told.value)


WORDS = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1, max_size=20)


@given(st.dictionaries(st.from_regex(r"X_[A-Z]{1,5}", fullmatch=True), WORDS, max_size=3), WORDS, WORDS)
@settings(max_examples=20, deadline=None)
def test_the_shell_reads_what_was_written(environment: dict[str, str], account: str, image: str) -> None:
    cluster = ClusterConfig(account=account, image=image, environment=environment, mounts=["/a b:/c", "/d:/d"])
    wanted = {"SBATCH_ACCOUNT": account, "IMAGE": image, "MOUNTS": "/a b:/c,/d:/d", "MIN_DISK_GIB": "200"} | environment
    script = 'source /dev/stdin; for name; do printf "%s\\n" "${!name}"; done'
    read = subprocess.run(
        ["bash", "-c", script, "bash", *wanted],
        input=shell_settings(cluster),
        capture_output=True,
        text=True,
        check=True,
    )
    assert read.stdout == "".join(f"{value}\n" for value in wanted.values())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("partition: gpu\nsbatch: {qos: high}\nenvironment: {NCCL_IB_HCA: mlx5}\n")
    assert coalm("slurm", "env", tmp_path / "mine.yaml") == 0
    printed = capsys.readouterr().out
    for line in ("export SBATCH_PARTITION=gpu", "export SBATCH_QOS=high", "export NCCL_IB_HCA=mlx5"):
        assert line in printed
    assert coalm("slurm", "env", tmp_path / "none.yaml") == 2
