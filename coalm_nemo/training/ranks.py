"""Who this process is among the ranks, and how they first meet."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from coalm_nemo.errors import UserError

FAREWELL_S = 20.0
"""How long a failed rank 0 waits for the others to hear of it. They wait for nothing else then: it takes moments."""

MEET_S = 600.0
"""How long the ranks wait for one another at the start. Not for rank 0's preparation, which may take hours."""

RESOLVE_S = 3.0
"""How long a name server may be too busy: thousands of ranks ask it at once."""


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
        return Ranks(_number("RANK"), _number("LOCAL_RANK", env["RANK"]), _number("WORLD_SIZE"), "torchrun")
    if "SLURM_PROCID" in env and _number("SLURM_STEP_NUM_TASKS", "1") > 1:
        return Ranks(_number("SLURM_PROCID"), _number("SLURM_LOCALID"), _number("SLURM_STEP_NUM_TASKS"), "slurm")
    return Ranks(0, 0, 1, "single")


def _number(name: str, default: str = "") -> int:
    value = os.environ.get(name, default)
    if not value.isdecimal():
        raise UserError(f"the launcher's variable {name}='{value}' is no number; start the ranks with torchrun or srun")
    return int(value)


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
        raise UserError(
            "RANK and WORLD_SIZE are set but MASTER_ADDR or MASTER_PORT is not; start the run with torchrun"
        )


def first_slurm_host(nodelist: str) -> str:
    """First host of SLURM's compact list: `gpu[07-09,12],login1` -> `gpu07`."""
    if not nodelist:
        raise UserError("SLURM gave no node list (SLURM_STEP_NODELIST); start the ranks with srun")
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)  # up to a comma that is in no bracket
    assert first is not None
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])


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
    export_rendezvous(ranks)
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    _resolve(address)
    import torch.distributed as dist

    limit = timedelta(seconds=min(timeout_s, MEET_S))
    try:
        store, _, _ = next(dist.rendezvous("env://", ranks.rank, ranks.world_size, timeout=limit))
    except dist.DistError as e:
        reason = str(e).partition("\n")[0]
        raise UserError(
            f"rank {ranks.rank} of {ranks.world_size} could not meet the others at {address}:{port}: {reason}"
        ) from e
    store.set_timeout(timedelta(seconds=timeout_s))
    return store


def _resolve(address: str) -> None:
    """torch would try an unknown name again until its timeout, without a word."""
    import socket

    deadline = time.monotonic() + RESOLVE_S
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except OSError as e:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{socket.gethostname()} cannot resolve '{address}', rank 0's node ({e.strerror}); "
                    "set MASTER_ADDR to an address of that node before srun or torchrun"
                ) from e
        time.sleep(0.5)


class ToldByRankZero(UserError):
    """Rank 0's own error, raised here too: rank 0 prints it."""


def first_rank_does(store: Any, ranks: Ranks, name: str, work: Callable[[], str]) -> str:
    """Rank 0 does `work`, the others wait for its answer, however long it takes: no process group can time out.

    A UserError on rank 0 is raised on every rank; on the others as ToldByRankZero.
    """
    key = f"coalm/{name}"
    if ranks.first:
        try:
            answer = "ok:" + work()
        except UserError as e:
            _tell_failure(store, ranks, key, f"user:{e}")
            raise
        except BaseException as e:
            _tell_failure(store, ranks, key, f"fail:{type(e).__name__}: {e}")
            raise
        store.set(key, answer)
    kind, _, text = store.get(key).decode().partition(":")
    if not ranks.first:
        store.add(f"{key}/read", 1)
    if kind == "user":
        raise ToldByRankZero(text)
    if kind == "fail":
        raise RuntimeError(f"rank 0 failed: {text}")
    return str(text)


def _tell_failure(store: Any, ranks: Ranks, key: str, answer: str) -> None:
    """The store lives in rank 0's process, which is about to end: let the others read why before it goes."""
    store.set(key, answer)
    deadline = time.monotonic() + FAREWELL_S
    while store.add(f"{key}/read", 0) < ranks.world_size - 1 and time.monotonic() < deadline:
        time.sleep(0.02)
