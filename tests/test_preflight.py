"""What the preflight says of a node, and what it passes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from coalm_nemo.errors import UserError
from coalm_nemo.preflight import EXIT_BAD_NODE, Limits, Node, judge

LIMITS = Limits(gpus_per_node=8, min_disk_gib=100, min_shm_gib=8)
VERSIONS = {"torch": "2.13.0", "driver": "580.1"}


def nodes(**wrong: object) -> list[Node]:
    """Three good ones, or with something wrong on the second."""
    good: dict[str, object] = {"gpus": 8, "disk_gib": 500.0, "shm_gib": 64.0, "versions": VERSIONS, "clock_s": 1000.0}
    return [Node(f"gpu{n}", **good | (wrong if n == 2 else {})) for n in (1, 2, 3)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"gpus": 7}, "gpu2 shows 7 GPUs of 8"),
        ({"ecc_errors": 3}, "gpu2 has 3 uncorrected ECC errors"),
        ({"disk_gib": -1.0}, "gpu2 cannot write the run directory"),
        ({"disk_gib": 99.0}, "gpu2 has 99 GiB free for the run directory, less than 100"),
        ({"shm_gib": 0.1}, "gpu2 has 0.1 GiB free in /dev/shm, less than 8"),
        ({"versions": VERSIONS | {"torch": "2.12.0"}}, "gpu2 has torch 2.12.0, the other nodes 2.13.0"),
        ({"versions": {"torch": "2.13.0"}}, "gpu2 has driver none, the other nodes 580.1"),
        ({"clock_s": 1090.0}, r"gpu2 has a clock that is \+90 s off"),
    ],
)
def test_a_bad_node_is_named(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        judge(nodes(**wrong), LIMITS)


def test_good_nodes_pass_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    judge(nodes(), LIMITS)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["gpu1", "gpu2", "gpu3", "versions"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [([], 0, "all-reduce of 4 MiB over 1 ranks"), (["--gpus-per-node=99"], EXIT_BAD_NODE, "GPUs of 99")],
)
def test_one_process_is_checked_too(tmp_path: Path, words: list[str], code: int, said: str) -> None:
    command = [sys.executable, "-m", "coalm_nemo.preflight", f"--run-dir={tmp_path}", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr and "Traceback" not in done.stderr
