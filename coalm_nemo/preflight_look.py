"""The preflight's first step: what a node has, how fast it calculates, and how fast it sends to its neighbours."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import threading
import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from coalm_nemo.training.ranks import Ranks, ranks_from_environment

PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "coalm_nemo")
PATIENCE_S = float(os.environ.get("PREFLIGHT_PATIENCE_S", "60"))
"""How long a node waits for the others to have looked at themselves; who is not there then is left out."""
PAIR_S = 30.0
"""Longest time for two nodes to meet and send."""
ROUNDS = 5
DISK_MIB = 64
DISTANCES = (1, 2)
"""In the ring: with two, who has a bad neighbour is still measured with a good one."""


@dataclass
class Finding:
    """What one rank found; what is the node's is told by its first rank."""

    host: str
    node: int
    """Place in the allocation."""
    local_rank: int
    compute_s: float = 0.0
    """Of a fixed calculation on the rank's device."""
    torch_gpus: int = 0
    gpus: int = 0
    ecc_errors: int = 0
    """Uncorrected since the driver's start, over all GPUs."""
    throttled: list[int] = field(default_factory=list)
    """GPUs that the hardware slows down now."""
    disk_gib: float = 0.0
    """Free where the run directory is; -1 where it cannot be written."""
    disk_mb_per_s: float = 0.0
    shm_gib: float = 0.0
    clock_s: float = 0.0
    """How far the node's clock is ahead of the shared file system's."""
    versions: dict[str, str] = field(default_factory=dict)
    pairs: dict[str, float] = field(default_factory=dict)
    """Other node's place -> GB/s of an all-reduce (bus); 0 where it failed."""


def look(found: Path, run_dir: Path) -> None:
    """Write this rank's finding, then measure with the neighbours, then write it again."""
    ranks = ranks_from_environment()
    finding = Finding(socket.gethostname(), int(os.environ.get("SLURM_NODEID", 0)), ranks.local_rank)
    if ranks.local_rank == 0:
        look_at_node(finding, run_dir, found)
    import torch

    from coalm_nemo.training.stragglers import Stragglers

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", ranks.local_rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    finding.torch_gpus = torch.cuda.device_count() if cuda else 0
    finding.compute_s = Stragglers(device, 1, 1.0).own_seconds()
    write(finding, found)
    measure_pairs(finding, ranks, found, device)


def write(finding: Finding, found: Path) -> None:
    """Under its own name, whole or not at all."""
    path = found / f"node_{finding.node}_{finding.local_rank}.json"
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(asdict(finding)))
    os.replace(aside, path)


def read_findings(found: Path) -> list[Finding]:
    """All findings, in the order of nodes and ranks."""
    read = [Finding(**json.loads(p.read_text())) for p in found.glob("node_*.json")]
    return sorted(read, key=lambda f: (f.node, f.local_rank))


def look_at_node(finding: Finding, run_dir: Path, found: Path) -> None:
    """Fill in what is the node's."""
    driver, finding.ecc_errors, finding.throttled = ask_nvidia_smi()
    finding.gpus = len(driver)
    finding.versions = {"python": platform.python_version(), **({"driver": driver[0]} if driver else {})}
    for package in PACKAGES:
        try:
            finding.versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            finding.versions[package] = "missing"
    finding.shm_gib = shutil.disk_usage("/dev/shm").free / 2**30 if Path("/dev/shm").is_dir() else 0.0
    try:
        finding.disk_mb_per_s, finding.clock_s = write_speed(found / f".speed_{finding.node}")
        finding.disk_gib = shutil.disk_usage(run_dir).free / 2**30
    except OSError:
        finding.disk_gib = -1.0


def write_speed(path: Path) -> tuple[float, float]:
    """(MB/s of a file with fsync, this clock's lead over the file's time stamp in seconds)."""
    block = os.urandom(2**20)
    started = time.monotonic()
    try:
        with path.open("wb") as file:
            for _ in range(DISK_MIB):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.monotonic() - started
        os.utime(path)
        return DISK_MIB * 2**20 / 1e6 / seconds, time.time() - path.stat().st_mtime
    finally:
        path.unlink(missing_ok=True)


def ask_nvidia_smi() -> tuple[list[str], int, list[int]]:
    """(driver version of each GPU, uncorrected ECC errors, GPUs slowed down by hardware); empty without nvidia-smi."""
    rows = _query("driver_version,ecc.errors.uncorrected.volatile.total")
    slowed = _query("clocks_throttle_reasons.hw_slowdown,clocks_throttle_reasons.hw_thermal_slowdown")
    errors = sum(int(row[1]) for row in rows if row[1].isdecimal())
    return [row[0] for row in rows], errors, [n for n, row in enumerate(slowed) if "Active" in row]


def _query(fields: str) -> list[list[str]]:
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return []
    return [line.split(", ") for line in done.stdout.splitlines()] if done.returncode == 0 else []


def rounds_of_pairs(nodes: int) -> list[list[tuple[int, int]]]:
    """Pairs of a ring, at each distance, in rounds in which no node has two partners."""
    pairs = dict.fromkeys(
        (min(i, j), max(i, j)) for d in DISTANCES for i in range(nodes) if (j := (i + d) % nodes) != i
    )
    rounds: list[list[tuple[int, int]]] = []
    for pair in pairs:
        free = (r for r in rounds if not any(set(pair) & set(other) for other in r))
        (next(free, None) or rounds.append([]) or rounds[-1]).append(pair)  # type: ignore[func-returns-value]
    return rounds


def measure_pairs(finding: Finding, ranks: Ranks, found: Path, device: Any) -> None:
    """All-reduces with each partner in turn, each written down at once. One that hangs ends this rank, and only this."""
    nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
    present = wait_for_others(found, nodes)
    a_node = max(1, ranks.world_size // nodes)
    for number, pairs in enumerate(rounds_of_pairs(nodes)):
        for low, high in pairs:
            if finding.node not in (low, high) or not {low, high} <= set(present):
                continue
            other = high if finding.node == low else low
            finding.pairs[str(other)] = 0.0
            write(finding, found)
            place = ranks.local_rank + (a_node if finding.node == high else 0)
            port = 33000 + (int(os.environ.get("SLURM_JOB_ID", "0")) * 64 + number) % 20000
            alarm = threading.Timer(PAIR_S + 10, os._exit, [0])
            alarm.daemon = True
            alarm.start()
            with contextlib.suppress(Exception):  # whatever it is, the pair has no rate
                finding.pairs[str(other)] = pair_rate(present[low], port, place, 2 * a_node, device)
            alarm.cancel()
            write(finding, found)


def wait_for_others(found: Path, nodes: int) -> dict[int, str]:
    """Place -> host of the nodes whose first rank has written."""
    deadline = time.monotonic() + PATIENCE_S
    while len(list(found.glob("node_*_0.json"))) < nodes and time.monotonic() < deadline:
        time.sleep(0.1)
    return {f.node: f.host for f in read_findings(found)}


def pair_rate(host: str, port: int, place: int, size: int, device: Any) -> float:
    """GB/s (bus) of an all-reduce over the ranks of two nodes."""
    import torch
    import torch.distributed as dist

    limit = timedelta(seconds=PAIR_S)
    store = dist.TCPStore(host, port, size, is_master=place == 0, timeout=limit)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=place, world_size=size, timeout=limit)
    try:
        numbers = torch.ones(2**26 if device.type == "cuda" else 2**18, device=device)
        dist.all_reduce(numbers)
        started = time.monotonic()
        for _ in range(ROUNDS):
            dist.all_reduce(numbers)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = (time.monotonic() - started) / ROUNDS
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return 2 * (size - 1) / size * numbers.nbytes / seconds / 1e9
