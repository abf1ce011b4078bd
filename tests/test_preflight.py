"""What the preflight says of nodes, and which it uses."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coalm_nemo.errors import EXIT_BAD_NODE
from coalm_nemo.preflight_judge import Limits, judge
from coalm_nemo.preflight_look import Finding, read_findings, rounds_of_pairs, write

LIMITS = Limits(gpus_per_node=8, min_disk_gib=100, min_disk_mb_per_s=50, min_shm_gib=8, max_slowdown=1.5)
VERSIONS = {"torch": "2.13.0", "driver": "580.1"}
HOSTS = ["gpu1", "gpu2", "gpu3", "gpu4"]


def findings(**wrong: object) -> list[Finding]:
    """Four good nodes, or with something wrong on the second."""
    good: dict[str, object] = {
        "gpus": 8, "torch_gpus": 8, "disk_gib": 500.0, "disk_mb_per_s": 900.0, "shm_gib": 64.0, "versions": VERSIONS,
        "clock_s": 0.1, "compute_s": 0.010, "pairs": {"9": 40.0, "8": 20.0},
    }  # fmt: skip
    return [Finding(host, n, 0, **good | (wrong if n == 1 else {})) for n, host in enumerate(HOSTS)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"gpus": 7}, "shows 7 GPUs of 8"),
        ({"torch_gpus": 0}, "has 8 GPUs of which torch sees none"),
        ({"ecc_errors": 3}, "has 3 uncorrected ECC errors"),
        ({"throttled": [2, 5]}, "slows down GPU 2, 5"),
        ({"disk_gib": -1.0}, "cannot write the run directory"),
        ({"disk_gib": 99.0}, "has 99 GiB free for the run directory, less than 100"),
        ({"disk_mb_per_s": 9.0}, "writes 9 MB/s to the run directory, less than 50"),
        ({"shm_gib": 0.1}, "has 0.1 GiB free in /dev/shm, less than 8"),
        ({"versions": VERSIONS | {"torch": "2.12.0"}}, "has torch 2.12.0, the other nodes 2.13.0"),
        ({"versions": {"torch": "2.13.0"}}, "has driver none, the other nodes 580.1"),
        ({"clock_s": 90.0}, "has a clock that is +90 s off"),
        ({"compute_s": 0.02}, "calculates 2.0 times slower than the median node"),
        ({"pairs": {"0": 10.0, "2": 9.0}}, "sends 10.000 GB/s at best, the median node 40.000"),
        ({"pairs": {"0": 0.0}}, "could send to no other node"),
        ({"local_rank": 1}, "does not answer"),
    ],
)
def test_a_bad_node_is_named_and_left_out(wrong: dict[str, object], said: str) -> None:
    second = {k: v for k, v in wrong.items() if k != "local_rank"}
    told = findings(**second)
    if "local_rank" in wrong:  # its first rank never wrote
        told[1].local_rank = 1
    good, problems = judge(HOSTS, told, LIMITS)
    assert good == ["gpu1", "gpu3", "gpu4"]
    assert list(problems) == ["gpu2"] and problems["gpu2"].startswith(said)


def test_good_nodes_pass_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert judge(HOSTS, findings(), LIMITS) == (HOSTS, {})
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [*HOSTS, "versions"]


def test_one_slow_neighbour_does_not_make_a_node_slow() -> None:
    told = findings(pairs={"0": 1.0, "2": 1.0})
    told[0].pairs = {"1": 1.0, "3": 40.0}
    assert judge(HOSTS, told, LIMITS)[0] == ["gpu1", "gpu3", "gpu4"]


@given(st.integers(1, 40))
def test_every_node_has_its_pairs_and_one_partner_at_a_time(nodes: int) -> None:
    rounds = rounds_of_pairs(nodes)
    for pairs in rounds:
        busy = [n for pair in pairs for n in pair]
        assert len(busy) == len(set(busy))
    met = [pair for pairs in rounds for pair in pairs]
    assert len(met) == len(set(met))
    partners = {n: {a + b - n for a, b in met if n in (a, b)} for n in range(nodes)}
    assert all(len(p) >= min(nodes - 1, 2) for p in partners.values())
    assert len(rounds) <= 8


def test_a_finding_is_read_as_it_was_written(tmp_path: Path) -> None:
    for finding in findings():
        write(finding, tmp_path)
    assert [asdict(f) for f in read_findings(tmp_path)] == [asdict(f) for f in findings()]


def test_the_step_in_a_process_of_its_own(tmp_path: Path) -> None:
    words = ["look", f"--found={tmp_path}", f"--run-dir={tmp_path}"]
    done = subprocess.run([sys.executable, "-m", "coalm_nemo.preflight", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (finding,) = read_findings(tmp_path)
    assert finding.compute_s > 0 and finding.disk_mb_per_s > 0 and abs(finding.clock_s) < 1
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho lost\n")
    (tmp_path / "scontrol").chmod(0o755)
    words = ["judge", f"--found={tmp_path}", "--nodes=lost", "--wanted=1"]
    command = [sys.executable, "-m", "coalm_nemo.preflight", *words]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert done.returncode == EXIT_BAD_NODE and "lost is left out: it does not answer" in done.stdout
    assert "0 of 1 nodes are good, and 1 are wanted; out: lost" in done.stderr and "Traceback" not in done.stderr
