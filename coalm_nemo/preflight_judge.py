"""The preflight's second step: who is good, and what is wrong with the others."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass

from coalm_nemo.preflight_look import Finding

CLOCKS_APART_S = 5.0


@dataclass(frozen=True)
class Limits:
    """What a node must have; 0: not checked."""

    ranks_per_node: int = 1
    gpus_per_node: int = 0
    min_disk_gib: float = 0.0
    min_disk_mb_per_s: float = 0.0
    min_shm_gib: float = 0.0
    min_pair_gb_per_s: float = 0.0
    max_slowdown: float = 0.0


def judge(hosts: list[str], findings: list[Finding], limits: Limits) -> tuple[list[str], dict[str, str]]:
    """(good hosts, problem of each other host), in SLURM's order. Prints a line a node, and the versions."""
    told = {host: [f for f in findings if f.host.partition(".")[0] == host.partition(".")[0]] for host in hosts}
    first = {host: found[0] for host, found in told.items() if found and found[0].local_rank == 0}
    usual = _usual_versions(list(first.values()))
    clock = statistics.median([f.clock_s for f in first.values()] or [0.0])
    compute = {host: max(f.compute_s for f in told[host]) for host in first}
    rate = {host: max(f.pairs.values()) for host, f in first.items() if f.pairs}
    for host, f in first.items():
        print(
            f"{host}: {f.gpus} GPUs, {f.ecc_errors} ECC errors, {f.disk_gib:.0f} GiB for the run at "
            f"{f.disk_mb_per_s:.0f} MB/s, {f.shm_gib:.1f} GiB in /dev/shm, clock {f.clock_s - clock:+.2f} s, "
            f"calculates in {compute[host] * 1e3:.1f} ms, sends {rate.get(host, 0):.2f} GB/s",
            flush=True,
        )
    print("versions: " + ", ".join(f"{name} {version}" for name, version in usual.items()), flush=True)
    problems = {host: "does not answer: its log beside the findings says why" for host in hosts if host not in first}
    for host, f in first.items():
        found = problem_of(f, limits, usual, f.clock_s - clock) or (
            f"had {len(told[host])} of {limits.ranks_per_node} ranks answer" * (len(told[host]) < limits.ranks_per_node)
        )
        found = found or too_slow(host, compute, rate, limits)
        if found:
            problems[host] = found
    return [h for h in hosts if h not in problems], {h: problems[h] for h in hosts if h in problems}


def _usual_versions(first: list[Finding]) -> dict[str, str]:
    names = dict.fromkeys(name for f in first for name in f.versions)
    return {name: Counter(f.versions.get(name, "none") for f in first).most_common(1)[0][0] for name in names}


def problem_of(f: Finding, limits: Limits, usual: dict[str, str], clock_s: float) -> str:
    """The first thing wrong with a node by itself; empty if nothing is."""
    if f.gpus < limits.gpus_per_node:
        return (
            f"shows {f.gpus} GPUs of {limits.gpus_per_node}; if no node shows any, was the cluster's settings file "
            "sourced before sbatch?"
        )
    if limits.gpus_per_node and not f.torch_gpus:
        return f"has {f.gpus} GPUs of which torch sees none: the driver and this torch do not fit"
    if limits.gpus_per_node and f.ecc_errors:
        return f"has {f.ecc_errors} uncorrected ECC errors; its GPUs want a reset, or to be replaced"
    if limits.gpus_per_node and f.throttled:
        return f"slows down GPU {', '.join(map(str, f.throttled))}: heat or power"
    if f.disk_gib < 0:
        return "cannot write the run directory; is it on a file system that all nodes share?"
    if f.disk_gib < limits.min_disk_gib:
        return f"has {f.disk_gib:.0f} GiB free for the run directory, less than {limits.min_disk_gib:.0f}"
    if f.disk_mb_per_s < limits.min_disk_mb_per_s:
        return f"writes {f.disk_mb_per_s:.0f} MB/s to the run directory, less than {limits.min_disk_mb_per_s:.0f}"
    if f.shm_gib < limits.min_shm_gib:
        return f"has {f.shm_gib:.1f} GiB free in /dev/shm, less than {limits.min_shm_gib:g}"
    for name, version in usual.items():
        if (own := f.versions.get(name, "none")) != version:
            return f"has {name} {own}, the other nodes {version}"
    if abs(clock_s) > CLOCKS_APART_S:
        return f"has a clock that is {clock_s:+.0f} s off the others'"
    return ""


def too_slow(host: str, compute: dict[str, float], rate: dict[str, float], limits: Limits) -> str:
    """How a node falls behind the others; empty if it does not. A pair is as slow as its slower node, so the best counts."""
    usual_s = statistics.median(compute.values())
    if limits.max_slowdown and compute[host] > limits.max_slowdown * usual_s:
        return f"calculates {compute[host] / usual_s:.1f} times slower than the median node"
    if host not in rate:
        return "" if len(compute) < 2 else "could send to no other node"
    if rate[host] == 0:
        return "could send to no other node"
    if rate[host] < limits.min_pair_gb_per_s:
        return f"sends {rate[host]:.2f} GB/s at best, less than {limits.min_pair_gb_per_s:g}"
    usual = statistics.median(rate.values())
    if limits.max_slowdown and rate[host] * limits.max_slowdown < usual:
        return f"sends {rate[host]:.3f} GB/s at best, the median node {usual:.3f}"
    return ""
