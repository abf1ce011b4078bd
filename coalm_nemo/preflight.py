"""Looks at the nodes of an allocation before a run is trusted to them. Three steps, which slurm/lib.sh runs:

`look`, a task a rank: what each node has and how fast it is, and how fast it sends to its neighbours in a ring. Written to
files, so that a node which is broken in whatever way holds up nobody for long.
`judge`, one task: a line a node; who is broken or slow is named with the reason; the nodes to use are chosen.
`together`, a task a rank on the chosen nodes: an all-reduce over all of them.

Exit code 4: too few good nodes, or they do not work together.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from coalm_nemo.errors import EXIT_BAD_NODE, UserError
from coalm_nemo.preflight_judge import Limits, judge


def main(words: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m coalm_nemo.preflight", description=__doc__)
    steps = parser.add_subparsers(dest="step", required=True)
    look = steps.add_parser("look")
    look.add_argument("--run-dir", type=Path, required=True)
    judge = steps.add_parser("judge")
    judge.add_argument("--nodes", required=True, help="SLURM's list of the allocation's nodes")
    judge.add_argument("--wanted", type=int, required=True)
    for step in (look, judge):
        step.add_argument("--found", type=Path, required=True)
    for field in fields(Limits):
        judge.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    together = steps.add_parser("together")
    together.add_argument("--min-bus-gb-per-s", type=float, default=0.0)
    options = vars(parser.parse_args(words))
    return _told(_steps()[options.pop("step")], options)


def _steps() -> dict[str, Callable[..., None]]:
    from coalm_nemo.preflight_look import look
    from coalm_nemo.preflight_together import work_together

    return {"look": look, "judge": judge_nodes, "together": work_together}


def _told(step: Callable[..., None], options: dict[str, Any]) -> int:
    from coalm_nemo.training.ranks import ToldByRankZero

    try:
        step(**options)
    except ToldByRankZero:
        return EXIT_BAD_NODE
    except UserError as e:
        print(f"preflight: {e}", file=sys.stderr, flush=True)
        return EXIT_BAD_NODE
    return 0


def judge_nodes(found: Path, nodes: str, wanted: int, **limits: Any) -> None:
    """Print what was found, and write the nodes to use into `found`/nodes. Raises UserError if they are too few."""
    from coalm_nemo.preflight_look import read_findings

    hosts = expand(nodes)
    good, problems = judge(hosts, read_findings(found), Limits(**limits))
    for host, problem in problems.items():
        print(f"preflight: {host} is left out: it {problem}", flush=True)
    if len(good) < wanted:
        raise UserError(
            f"{len(good)} of {len(hosts)} nodes are good, and {wanted} are wanted; out: {', '.join(problems)}"
        )
    chosen = good[:wanted]
    spare = f", spare: {', '.join(good[wanted:])}" if good[wanted:] else ""
    print(f"preflight: {len(chosen)} nodes are used: {', '.join(chosen)}{spare}", flush=True)
    (found / "nodes").write_text(",".join(chosen) + "\n")


def expand(nodelist: str) -> list[str]:
    """SLURM's compact list, `gpu[07-09,12],login1`, by SLURM itself."""
    import subprocess

    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as e:
        raise UserError(f"scontrol cannot tell the nodes of '{nodelist}' ({e})") from e
    return done.stdout.split()


if __name__ == "__main__":
    sys.exit(main())
