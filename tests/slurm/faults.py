"""What goes wrong with a job on a cluster, done to a real one. Each fault is named, done, and may have to be undone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Job

STEPS = 50
SAVE_EVERY = 5
FAULT_AFTER = 12
"""Steps done when the fault comes, with two checkpoints on disk."""


@dataclass(frozen=True)
class Fault:
    """`do` and `undo` get the running job. `words`, `variables`: how it is submitted."""

    name: str
    cause: str
    """What the job's events call it; empty: the run does not stop."""
    do: Callable[[Job], None]
    undo: Callable[[Job], None] = lambda job: None
    words: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    small_disk: bool = False


def ranks_of(job: Job, node: str) -> list[str]:
    """Process numbers of the ranks on a node, as the control host sees them."""
    listed = job.cluster.run(["ps", "-eo", "pid=,args="])[1].splitlines()
    ours = [line.split()[0] for line in listed if "faulty.py -m coalm_nemo.cli train" in line and "bash" not in line]
    uts = job.cluster.run(["bash", "-c", f"readlink /proc/$(cat {job.cluster.directory}/{node}.pid)/ns/uts"])[1]
    return [p for p in ours if job.cluster.run(["readlink", f"/proc/{p}/ns/uts"])[1] == uts]


def signal_rank(job: Job, signal: str) -> None:
    """To the rank on the second node."""
    (rank,) = ranks_of(job, job.nodes()[1])
    assert job.cluster.run(["kill", f"-{signal}", rank])[0] == 0


def preempt(job: Job) -> None:
    """A job of a higher partition takes all nodes for a moment."""
    urgent = ["sbatch", "--partition=urgent", "--nodes=5", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    assert job.cluster.run(urgent)[0] == 0


def requeue(job: Job) -> None:
    assert job.cluster.run(["scontrol", "requeue", job.number])[0] == 0


def spoil_newest(job: Job) -> None:
    """A byte of the newest checkpoint changes, and the run is killed."""
    signal_rank(job, "KILL")
    newest = job.run_dir / "checkpoints" / f"step_{job.saved()[-1]:08d}"
    part = max(newest.glob("*.distcp"), key=lambda p: p.stat().st_size)
    with part.open("r+b") as file:
        file.seek(part.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0xFF]))


def fill_disk(job: Job) -> None:
    """Nothing is left for the next save; once it has failed, there is room again."""
    full = job.cluster.inside(job.cluster.small_disk / "full")
    with full.open("wb") as file:
        try:
            while True:
                file.write(bytes(2**16))
                file.flush()
        except OSError:
            pass
    job.wait_until(lambda: "is not saved: " in job.log())


def free_disk(job: Job) -> None:
    job.cluster.inside(job.cluster.small_disk / "full").unlink()


def unplug_last(job: Job) -> None:
    job.cluster.cable(job.nodes()[1], "down")


def plug_all(job: Job) -> None:
    for node in job.cluster.addresses:
        job.cluster.cable(node, "up")
    job.cluster.wait_for_nodes()


def power_off(which: int) -> Callable[[Job], None]:
    def do(job: Job) -> None:
        job.cluster.power_off(job.nodes()[which])

    return do


def power_on_all(job: Job) -> None:
    for node in job.cluster.addresses:
        if job.cluster.run(["sinfo", "-hn", node, "-o", "%T"])[1].startswith("down"):
            job.cluster.power_on(node)
    job.cluster.wait_for_nodes()


def wait_for_hang(job: Job) -> None:
    job.wait_until((job.run_dir / "hung_once").exists)


QUICK_WATCHDOG = ("health.hang_floor_s=8", "health.hang_factor=10")
FAULTS = (
    Fault("preempted", "preempted", preempt),
    Fault("scontrol requeue", "preempted", requeue),
    Fault("rank killed", "killed", lambda job: signal_rank(job, "KILL")),
    Fault("hung rank", "hung", wait_for_hang, words=QUICK_WATCHDOG, variables=(("HANG_AT", str(FAULT_AFTER)),)),
    Fault("stopped rank", "hung", lambda job: signal_rank(job, "STOP"), words=QUICK_WATCHDOG),
    Fault("worker powered off", "node lost", power_off(1), power_on_all),
    Fault("batch host powered off", "node lost", power_off(0), power_on_all),
    Fault("network unplugged", "node lost", unplug_last, plug_all),
    Fault("corrupt newest checkpoint", "killed", spoil_newest),
    Fault("disk full", "", fill_disk, free_disk, small_disk=True),
    Fault("W&B unreachable", "", lambda job: None, words=("logging.wandb=online", "logging.wandb_timeout_s=5",
          "logging.wandb_finish_s=5"), variables=(("WANDB_BASE_URL", "http://10.0.0.99:9"), ("WANDB_API_KEY", "0" * 40))),
)  # fmt: skip


@dataclass(frozen=True)
class Recovery:
    """What a fault cost."""

    fault: str
    starts: int
    cause: str
    recovery_s: float
    """From the fault, its detection included, to the first step that was not done before."""
    repeated_steps: int
    worst_loss_difference: float
    wandb_runs: int


def words_for(model: Path, rows: Path, steps: int = STEPS) -> list[str]:
    """A run of `steps` steps that both the job and its uninterrupted twin train."""
    return [
        f"model.hf_path={model}", f"data.train={rows}", f"train.steps={steps}", "batch.global_size=4",
        f"checkpoint.save_interval_steps={SAVE_EVERY}", "health.straggler_interval_steps=0",
    ]  # fmt: skip


def survive(cluster: Cluster, directory: Path, fault: Fault, words: list[str], expected: list[float]) -> Recovery:
    """Submit, break, wait for the end. AssertionError if the job does not complete by itself with `expected` losses."""
    run_dir = cluster.small_disk / directory.name if fault.small_disk else directory / "run"
    job = Job(cluster, directory, run_dir)
    wandb = () if "W&B" in fault.name else ("logging.wandb=offline",)
    job.submit(*words, *wandb, *fault.words, SKIP_PREFLIGHT="1", STEP_S="0.15", **dict(fault.variables))
    job.wait_until(lambda: job.reached() >= FAULT_AFTER and len(job.saved()) >= 2)
    at = time.time()
    fault.do(job)
    if fault.cause == "node lost":
        job.wait_until(lambda: bool(job.ends()))
    fault.undo(job)
    code, log = job.outcome()
    assert code == 0, log
    *before, last = job.causes()
    assert last == "finished" and len(before) == bool(fault.cause), (before, log)
    # The other ranks may fall over a lost node before SLURM has noticed it.
    assert all(cause == fault.cause or (fault.cause, cause) == ("node lost", "crashed") for cause in before), (
        before,
        log,
    )
    assert len(job.losses()) == len(expected), log
    worst = max(abs(a - b) for a, b in zip(job.losses(), expected, strict=True))
    assert worst <= 1e-6, worst
    if fault.small_disk:
        assert "is not saved: " in log and "Traceback" not in log, log
    starts = job.starts()
    again = len(starts) > 1
    reached = max(job.ends()[0][1], starts[-1])  # who is asked to stop saves the step that it is in
    after = min((s["time"] for s in job.steps() if s["step"] > reached), default=at)
    ids = {p.name.rpartition("-")[2] for p in cluster.inside(run_dir).glob("wandb/offline-run-*")}
    return Recovery(
        fault.name,
        len(starts),
        fault.cause,
        after - at if again else 0.0,
        reached - starts[1] if again else 0,
        worst,
        len(ids),
    )
