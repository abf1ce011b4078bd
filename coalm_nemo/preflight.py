"""Looks at every node of an allocation before a run is trusted to it: `srun python -m coalm_nemo.preflight --run-dir DIR`.

One task a rank, as in training. A line a node; the first thing wrong is one sentence that names its node, and exit code 4.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from coalm_nemo.errors import UserError
from coalm_nemo.training.ranks import FAREWELL_S, Ranks, ToldByRankZero, first_rank_does, meet, ranks_from_environment

EXIT_BAD_NODE = 4
"""A node should not be trained on: the sentence names it."""

MEET_S = 300
COLLECTIVE_S = 120.0
"""Longest time for the all-reduces, with the libraries' start; what takes longer hangs."""

CLOCKS_APART_S = 5.0
PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "coalm_nemo")
ROUNDS = 5


@dataclass(frozen=True)
class Limits:
    """What a node must have."""

    gpus_per_node: int = 0
    min_disk_gib: float = 0.0
    min_shm_gib: float = 0.0
    min_bus_gb_per_s: float = 0.0


@dataclass
class Node:
    """What one node has."""

    host: str
    gpus: int = 0
    ecc_errors: int = 0
    """Uncorrected since the driver's start, over all GPUs."""
    disk_gib: float = 0.0
    """Free where the run directory is; -1 where it cannot be written."""
    shm_gib: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    clock_s: float = 0.0
    """Seconds since the epoch, read by all nodes at about the same moment."""


def main(words: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m coalm_nemo.preflight", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    for name, kind in (("gpus-per-node", int), ("min-disk-gib", float), ("min-shm-gib", float)):
        parser.add_argument(f"--{name}", type=kind, default=0)
    parser.add_argument("--min-bus-gb-per-s", type=float, default=0)
    options = vars(parser.parse_args(words))
    run_dir = options.pop("run_dir")
    try:
        check(run_dir, Limits(**options))
    except ToldByRankZero:
        return EXIT_BAD_NODE
    except UserError as e:
        print(f"preflight: {e}", file=sys.stderr, flush=True)
        return EXIT_BAD_NODE
    return 0


def check(run_dir: Path, limits: Limits) -> None:
    """Every check. Raises UserError for the first node that fails one."""
    ranks = ranks_from_environment()
    store = meet(ranks, MEET_S)
    node = look_at_node(run_dir) if ranks.local_rank == 0 else None
    start_together(store, ranks)
    if node:
        node.clock_s = time.time()
    store.set(f"preflight/{ranks.rank}", json.dumps(asdict(node) if node else {"host": socket.gethostname()}))
    first_rank_does(store, ranks, "nodes", lambda: judge(gather(store, ranks), limits))
    seconds, size_bytes = all_reduce(store, ranks, cuda=limits.gpus_per_node > 0)
    first_rank_does(store, ranks, "bandwidth", lambda: judge_bandwidth(ranks, seconds, size_bytes, limits))
    leave_together(store, ranks)


def look_at_node(run_dir: Path) -> Node:
    """This node, without its clock."""
    driver, ecc = ask_nvidia_smi()
    versions = {"python": platform.python_version(), **({"driver": driver[0]} if driver else {})}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "missing"
    disk = shutil.disk_usage(run_dir).free / 2**30 if os.access(run_dir, os.W_OK) else -1.0
    shm = shutil.disk_usage("/dev/shm").free / 2**30 if Path("/dev/shm").is_dir() else 0.0
    return Node(socket.gethostname(), len(driver), sum(ecc), disk, shm, versions)


def ask_nvidia_smi() -> tuple[list[str], list[int]]:
    """(driver version, uncorrected ECC errors) of each GPU; empty where there is no nvidia-smi or it fails."""
    if not shutil.which("nvidia-smi"):
        return [], []
    query = "--query-gpu=driver_version,ecc.errors.uncorrected.volatile.total"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=60
        )
    except subprocess.TimeoutExpired:
        return [], []
    rows = [line.split(", ") for line in done.stdout.splitlines()] if done.returncode == 0 else []
    return [row[0] for row in rows], [int(row[1]) if row[1].isdecimal() else 0 for row in rows]


def start_together(store: Any, ranks: Ranks) -> None:
    """Returns on all ranks within about a hundredth of a second: the clocks are compared there."""
    store.add("preflight/arrived", 1)
    if ranks.first:
        while store.add("preflight/arrived", 0) < ranks.world_size:
            time.sleep(0.01)
        store.set("preflight/go", "")
    store.wait(["preflight/go"])


def leave_together(store: Any, ranks: Ranks) -> None:
    """The store lives in rank 0's process: that one goes last."""
    deadline = time.monotonic() + FAREWELL_S
    if not ranks.first:
        store.add("preflight/left", 1)
    while ranks.first and store.add("preflight/left", 0) < ranks.world_size - 1 and time.monotonic() < deadline:
        time.sleep(0.01)


def gather(store: Any, ranks: Ranks) -> list[Node]:
    """What the nodes told, in the order of their ranks."""
    told = [json.loads(store.get(f"preflight/{rank}")) for rank in range(ranks.world_size)]
    return [Node(**facts) for facts in told if "gpus" in facts]


def judge(nodes: list[Node], limits: Limits) -> str:
    """Print a line a node. Raises UserError that names the first node that should not be trained on."""
    usual = {name: Counter(n.versions.get(name, "none") for n in nodes).most_common(1)[0][0] for name in names(nodes)}
    clocks = sorted(n.clock_s for n in nodes)
    clock = clocks[len(clocks) // 2]
    for node in nodes:
        print(
            f"{node.host}: {node.gpus} GPUs, {node.ecc_errors} ECC errors, {node.disk_gib:.0f} GiB for the run, "
            f"{node.shm_gib:.1f} GiB in /dev/shm, clock {node.clock_s - clock:+.2f} s",
            flush=True,
        )
    print("versions: " + ", ".join(f"{name} {version}" for name, version in usual.items()), flush=True)
    for node in nodes:
        if problem := problem_of(node, limits, usual, node.clock_s - clock):
            raise UserError(f"{node.host} {problem}")
    return ""


def names(nodes: list[Node]) -> list[str]:
    return list(dict.fromkeys(name for node in nodes for name in node.versions))


def problem_of(node: Node, limits: Limits, usual: dict[str, str], clock_s: float) -> str:
    """The first thing wrong with a node, after its name; empty if nothing is."""
    if node.gpus < limits.gpus_per_node:
        return (
            f"shows {node.gpus} GPUs of {limits.gpus_per_node}; if no node shows any, was the cluster's settings file "
            "sourced before sbatch?"
        )
    if limits.gpus_per_node and node.ecc_errors:
        return f"has {node.ecc_errors} uncorrected ECC errors; its GPUs want a reset, or to be replaced"
    if node.disk_gib < 0:
        return "cannot write the run directory; is it on a file system that all nodes share?"
    if node.disk_gib < limits.min_disk_gib:
        return f"has {node.disk_gib:.0f} GiB free for the run directory, less than {limits.min_disk_gib:.0f}"
    if node.shm_gib < limits.min_shm_gib:
        return f"has {node.shm_gib:.1f} GiB free in /dev/shm, less than {limits.min_shm_gib:g}"
    for name, version in usual.items():
        if (own := node.versions.get(name, "none")) != version:
            return f"has {name} {own}, the other nodes {version}"
    if abs(clock_s) > CLOCKS_APART_S:
        return f"has a clock that is {clock_s:+.0f} s off the others'"
    return ""


def all_reduce(store: Any, ranks: Ranks, *, cuda: bool) -> tuple[float, int]:
    """(seconds, bytes) of an all-reduce over all ranks: NCCL where GPUs are expected, else gloo."""
    import torch
    import torch.distributed as dist

    alarm = threading.Timer(COLLECTIVE_S, give_up, [store, ranks])
    alarm.daemon = True
    alarm.start()
    if cuda:
        torch.cuda.set_device(ranks.local_rank)
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
        hosts = dict.fromkeys(json.loads(store.get(f"preflight/{rank}"))["host"] for rank in absent)
        who = f"{', '.join(hosts)} did not reach it" if hosts else "all nodes reached it: look at the network"
        print(f"preflight: an all-reduce was not done after {COLLECTIVE_S:.0f} s; {who}", file=sys.stderr, flush=True)
    os._exit(EXIT_BAD_NODE)


def judge_bandwidth(ranks: Ranks, seconds: float, size_bytes: int, limits: Limits) -> str:
    """Print it as bus bandwidth, which does not depend on the number of ranks. Raises UserError if it is too low."""
    bus = 2 * (ranks.world_size - 1) / ranks.world_size * size_bytes / seconds / 1e9
    print(f"all-reduce of {size_bytes / 2**20:.0f} MiB over {ranks.world_size} ranks: {bus:.2f} GB/s (bus)", flush=True)
    if bus < limits.min_bus_gb_per_s:
        hosts = os.environ.get("SLURM_JOB_NODELIST", socket.gethostname())
        raise UserError(
            f"the network of {hosts} gives {bus:.2f} GB/s in an all-reduce, less than {limits.min_bus_gb_per_s:g}"
        )
    return ""


if __name__ == "__main__":
    sys.exit(main())
