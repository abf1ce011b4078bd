"""Jobs of the scripts in slurm/ on the test cluster: how they are submitted, watched and read."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coalm_nemo.training.callbacks.metrics_file import read_steps
from tests.slurm.cluster import Cluster

ROOT = Path(__file__).parents[2]
ENDED = re.compile(r"JobState=(?:COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL)")
SETTINGS = """
GPUS_PER_NODE=0
PYTHON={python}
MAX_STALLED_STARTS=2
STOP_RESERVE_S=15
LIMIT_EVERY_S=3
export LINGER_S=3 OMP_NUM_THREADS=1
"""


@dataclass
class Job:
    """A job of its own run directory. `submit` first."""

    cluster: Cluster
    directory: Path
    run_dir: Path = field(default_factory=Path)
    number: str = ""
    options: tuple[str, ...] = ("--nodes=2", "--ntasks-per-node=1", "--time=30", "--gpus-per-node=1")

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.run_dir == Path():
            self.run_dir = self.directory / "run"

    def submit(self, *words: str, script: str = "train_8b.sh", settings: str = "", **variables: str) -> Job:
        """With `python` replaced by the one that can be made to fail."""
        python = self.directory / "python"
        python.write_text(f'#!/bin/bash\nexec {sys.executable} {Path(__file__).parent / "faulty.py"} "$@"\n')
        python.chmod(0o755)
        path = self.directory / "cluster.env"
        path.write_text(SETTINGS.format(python=python) + settings)
        options = ["--parsable", f"--chdir={ROOT}", f"--output={self.directory}/%x-%j.log", *self.options]
        variables = {"RECIPE": "coalm_tiny", "RUN_DIR": str(self.run_dir), "CLUSTER_ENV": str(path)} | variables
        code, out = self.cluster.run(["sbatch", *options, f"slurm/{script}", *words], **variables)
        assert code == 0, out
        self.number = out.strip()
        return self

    def show(self) -> str:
        return self.cluster.run(["scontrol", "show", "job", self.number])[1]

    def log(self) -> str:
        found = re.search(r"StdOut=(\S+)", self.show())
        assert found
        return Path(found[1]).read_text() if Path(found[1]).exists() else ""

    def nodes(self) -> list[str]:
        """Where it runs; the batch script on the first."""
        found = re.search(r"\n\s+NodeList=(\S+)", self.show())
        assert found
        return self.cluster.run(["scontrol", "show", "hostnames", found[1]])[1].split()

    def wait_until(self, true: Callable[[], bool], timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while not true():
            assert time.monotonic() < deadline, self.show() + self.log()
            time.sleep(0.1)

    def outcome(self, timeout_s: float = 400) -> tuple[int, str]:
        """Exit code and log, once it has ended."""
        self.wait_until(lambda: bool(ENDED.search(self.show())), timeout_s)
        code = re.search(r"ExitCode=(\d+):", self.show())
        assert code
        return int(code[1]), self.log()

    def steps(self) -> list[dict[str, Any]]:
        path = self.cluster.inside(self.run_dir / "metrics.jsonl")
        try:
            return read_steps(path)
        except (FileNotFoundError, ValueError):  # not yet there, or being written
            return []

    def reached(self) -> int:
        return max((int(s["step"]) for s in self.steps()), default=0)

    def saved(self) -> list[int]:
        found = self.cluster.inside(self.run_dir).glob("checkpoints/step_*/manifest.json")
        return sorted(int(p.parent.name.removeprefix("step_")) for p in found)

    def starts(self) -> list[int]:
        """The step from which each start went on."""
        path = self.cluster.inside(self.run_dir / "events.jsonl")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [int(line["step"]) for line in lines if line["event"] == "start"]

    def ends(self) -> list[tuple[str, int]]:
        """How its starts ended, and at which step."""
        lines = self.cluster.inside(self.run_dir / "slurm_events.tsv").read_text().splitlines()
        return [(cells[2], int(cells[3])) for cells in (line.split("\t") for line in lines) if cells[2] != "start"]

    def causes(self) -> list[str]:
        return [what for what, _ in self.ends()]

    def losses(self) -> list[float]:
        steps = self.steps()
        assert [s["step"] for s in steps] == list(range(1, len(steps) + 1))
        return [s["lm_loss"] for s in steps]
