"""The preflight's third step: an all-reduce over all ranks of the nodes that will be trained on."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import Any

from coalm_nemo.errors import EXIT_BAD_NODE, UserError
from coalm_nemo.training.ranks import FAREWELL_S, Ranks, first_rank_does, meet, ranks_from_environment

MEET_S = 300
COLLECTIVE_S = 120.0
"""Longest time for the all-reduces, with the libraries' start; what takes longer hangs."""
ROUNDS = 5


def work_together(min_bus_gb_per_s: float = 0.0) -> None:
    """Raises UserError if the ranks are slower than that together, or get a wrong sum."""
    ranks = ranks_from_environment()
    store = meet(ranks, MEET_S)
    store.set(f"preflight/{ranks.rank}", socket.gethostname())
    seconds, size_bytes = all_reduce(store, ranks)
    first_rank_does(store, ranks, "bandwidth", lambda: judge_bandwidth(ranks, seconds, size_bytes, min_bus_gb_per_s))
    leave_together(store, ranks)


def leave_together(store: Any, ranks: Ranks) -> None:
    """The store lives in rank 0's process: that one goes last."""
    deadline = time.monotonic() + FAREWELL_S
    if not ranks.first:
        store.add("preflight/left", 1)
    while ranks.first and store.add("preflight/left", 0) < ranks.world_size - 1 and time.monotonic() < deadline:
        time.sleep(0.01)


def all_reduce(store: Any, ranks: Ranks) -> tuple[float, int]:
    """(seconds, bytes) of an all-reduce over all ranks: NCCL where there are GPUs, else gloo."""
    import torch
    import torch.distributed as dist

    alarm = threading.Timer(COLLECTIVE_S, give_up, [store, ranks])
    alarm.daemon = True
    alarm.start()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())
    device = torch.device("cuda" if cuda else "cpu")
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.PrefixStore("preflight", store),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(seconds=2 * COLLECTIVE_S),
    )
    numbers = torch.ones(2**26 if cuda else 2**20, device=device)
    store.set(f"preflight/ready/{ranks.rank}", "")
    dist.all_reduce(numbers)
    right = bool((numbers == ranks.world_size).all())
    started = time.monotonic()
    for _ in range(ROUNDS):
        dist.all_reduce(numbers)
    if cuda:
        torch.cuda.synchronize()
    seconds = (time.monotonic() - started) / ROUNDS
    alarm.cancel()
    dist.destroy_process_group()
    if not right:
        raise UserError(f"{socket.gethostname()} got a wrong sum from an all-reduce (rank {ranks.rank})")
    return seconds, numbers.nbytes


def give_up(store: Any, ranks: Ranks) -> None:
    """The collective hangs: rank 0 says which nodes did not reach it, and every rank ends."""
    if ranks.first:
        absent = [r for r in range(ranks.world_size) if not store.check([f"preflight/ready/{r}"])]
        hosts = dict.fromkeys(store.get(f"preflight/{rank}").decode() for rank in absent)
        who = f"{', '.join(hosts)} did not reach it" if hosts else "all nodes reached it: look at the network"
        print(f"preflight: an all-reduce was not done after {COLLECTIVE_S:.0f} s; {who}", file=sys.stderr, flush=True)
    os._exit(EXIT_BAD_NODE)


def judge_bandwidth(ranks: Ranks, seconds: float, size_bytes: int, least: float) -> str:
    """Print it as bus bandwidth, which does not depend on the number of ranks. Raises UserError if it is too low."""
    bus = 2 * (ranks.world_size - 1) / ranks.world_size * size_bytes / seconds / 1e9
    print(f"all-reduce of {size_bytes / 2**20:.0f} MiB over {ranks.world_size} ranks: {bus:.2f} GB/s (bus)", flush=True)
    if bus < least:
        hosts = os.environ.get("SLURM_JOB_NODELIST", socket.gethostname())
        raise UserError(f"the network of {hosts} gives {bus:.2f} GB/s in an all-reduce, less than {least:g}")
    return ""
