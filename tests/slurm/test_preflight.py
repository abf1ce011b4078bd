"""Five nodes, of which one is broken and one is slow: both are named, and the job trains on the other three."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from coalm_nemo.errors import EXIT_BAD_NODE
from tests.slurm.cluster import Cluster
from tests.slurm.faults import words_for
from tests.slurm.jobs import Job

pytestmark = pytest.mark.slurm
FIVE = ("--nodes=5", "--ntasks-per-node=1", "--time=30", "--gpus-per-node=2")
BROKEN = """
PYTHON={directory}/broken
MAX_SLOWDOWN=10
export PREFLIGHT_PATIENCE_S=25
"""


@pytest.fixture
def job(cluster: Cluster, tmp_path: Path) -> Job:
    return Job(cluster, tmp_path / "job", options=FIVE)


def settings_with_a_broken_node(job: Job, node: str) -> str:
    """There, Python does not start: a mount that is not there, for instance."""
    script = f'#!/bin/bash\n[[ $(hostname) != {node} ]] || exit 127\nexec {sys.executable} "$@"\n'
    (job.directory / "broken").write_text(script)
    (job.directory / "broken").chmod(0o755)
    return BROKEN.format(directory=job.directory)


def test_a_broken_and_a_slow_node_are_left_out(job: Job, tiny_llama: Path, rows_file: Path) -> None:
    settings = settings_with_a_broken_node(job, "node2")
    slow = ["tc", "qdisc", "{}", "dev", "node4", "root", "tbf", "rate", "8mbit", "burst", "32kbit", "latency", "800ms"]
    assert job.cluster.run([w.format("add") for w in slow])[0] == 0
    try:
        words = [*words_for(tiny_llama, rows_file, 6), "batch.global_size=3"]
        code, log = job.submit(*words, settings=settings, SPARES="2").outcome()
    finally:
        job.cluster.run(["tc", "qdisc", "del", "dev", "node4", "root"])
    assert code == 0, log
    assert "preflight: node2 is left out: it does not answer" in log, log
    assert "preflight: node4 is left out: it sends 0.0" in log, log
    assert "preflight: 3 nodes are used: node1, node3, node5\n" in log and "over 3 ranks" in log, log
    assert "3 ranks / (TP 1 x PP 1 x CP 1)" in log and job.saved()[-1] == 6, log


def test_too_few_good_nodes_end_the_job(job: Job) -> None:
    settings = settings_with_a_broken_node(job, "node1") + "MIN_SHM_GIB=1000000\n"
    code, log = job.submit(settings=settings, script="preflight.sh", SPARES="2").outcome()
    assert code == EXIT_BAD_NODE, log
    assert "preflight: 0 of 5 nodes are good, and 3 are wanted" in log and "Traceback" not in log
    assert "preflight: node1 is left out: it does not answer" in log and "node3 is left out: it has" in log
