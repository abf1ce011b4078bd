"""Who this process is among the ranks, and how they first meet."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from coalm_nemo.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process's place."""

    rank: int
    local_rank: int
    world_size: int
    source: str
    """torchrun | slurm | single: where the numbers come from."""

    @property
    def first(self) -> bool:
        return self.rank == 0


def ranks_from_environment() -> Ranks:
    """torchrun's (or --nproc's) variables, else SLURM's, else a single process.

    A SLURM allocation of one task (an interactive shell, a batch script's own process) counts as single.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return Ranks(int(env["RANK"]), int(env.get("LOCAL_RANK", env["RANK"])), int(env["WORLD_SIZE"]), "torchrun")
    if "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return Ranks(int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"]), int(env["SLURM_STEP_NUM_TASKS"]), "slurm")
    return Ranks(0, 0, 1, "single")


def export_rendezvous(ranks: Ranks) -> None:
    """Set the variables that torch's env:// rendezvous reads, where the launcher did not."""
    env = os.environ
    env.setdefault("RANK", str(ranks.rank))
    env.setdefault("LOCAL_RANK", str(ranks.local_rank))
    env.setdefault("WORLD_SIZE", str(ranks.world_size))
    if ranks.source == "slurm":
        env.setdefault("MASTER_ADDR", first_slurm_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST", "")))
        env.setdefault("MASTER_PORT", str(slurm_port(env.get("SLURM_JOB_ID", "0"), env.get("SLURM_STEP_ID", "0"))))
    elif ranks.source == "single":
        env["MASTER_ADDR"], env["MASTER_PORT"] = "127.0.0.1", str(free_port())
    if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
        raise UserError("RANK and WORLD_SIZE are set but MASTER_ADDR or MASTER_PORT is not; start the run with torchrun")


def first_slurm_host(nodelist: str) -> str:
    """First host of SLURM's compact list: `gpu[07-09,12],login1` -> `gpu07`."""
    if not nodelist:
        raise UserError("SLURM gave no node list (SLURM_STEP_NODELIST); start the ranks with srun")
    head, bracket, rest = nodelist.partition("[")
    if not bracket or "," in head:
        return nodelist.split(",")[0]
    number = rest.split("]")[0].split(",")[0].split("-")[0]
    suffix = rest.partition("]")[2].split(",")[0]
    return f"{head}{number}{suffix}"


def slurm_port(job_id: str, step_id: str) -> int:
    """A port that all ranks compute alike, and that two steps on the same nodes do not share."""
    return 20000 + (int(job_id) * 31 + int(step_id)) % 12000


def free_port() -> int:
    """A TCP port nobody listens on now."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def meet(ranks: Ranks, timeout_s: int) -> Any:
    """The key-value store that all ranks share before there is a process group."""
    import torch.distributed as dist

    export_rendezvous(ranks)
    store, _, _ = next(dist.rendezvous("env://", ranks.rank, ranks.world_size, timeout=timedelta(seconds=timeout_s)))
    store.set_timeout(timedelta(seconds=timeout_s))
    return store


def first_rank_does(store: Any, ranks: Ranks, name: str, work: Callable[[], str]) -> str:
    """Rank 0 does `work`, the others wait for its answer, however long it takes: no process group can time out.

    A UserError on rank 0 is raised on every rank.
    """
    key = f"coalm/{name}"
    if ranks.first:
        try:
            answer = "ok:" + work()
        except UserError as e:
            store.set(key, f"user:{e}")
            raise
        except BaseException as e:
            store.set(key, f"fail:{type(e).__name__}: {e}")
            raise
        store.set(key, answer)
    kind, _, text = store.get(key).decode().partition(":")
    if kind == "user":
        raise UserError(text)
    if kind == "fail":
        raise RuntimeError(f"rank 0 failed: {text}")
    return str(text)
