"""What each fault costs a job on a real SLURM: `python -m benchmarks.slurm_faults [RESULTS.jsonl]`.

Runs tests/slurm/test_faults.py (five nodes in namespaces of this host) unless it is given the lines of such a run, and
writes benchmarks/results/slurm_faults.md.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "slurm_faults.md"
HEAD = """# Faults on SLURM

{date}; {version}, torch {torch}, {cores} cores, five nodes in namespaces of one host, two ranks (gloo) a job, 50 steps of a
four-layer Llama, a checkpoint every 5 steps. `python -m benchmarks.slurm_faults` repeats it (`.ci/install-slurm` first).

Each job completes by itself. Recovery: from the fault, its detection included, to the first step that was not done before
(for the time limit: from the last step before it; the mean). A new start alone takes ten to twenty seconds here, where other
work went on meanwhile, and SLURM holds a requeued job back for five. Difference: the largest one of any step's loss to the
uninterrupted run, of 150 steps for the time limit.

| fault | told as | starts | recovery s | steps repeated | loss difference | W&B runs |
|---|---|---|---|---|---|---|
"""


def main(words: list[str]) -> int:
    """Returns the exit code of the tests."""
    if words:
        return write(Path(words[0]))
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "faults.jsonl"
        command = [sys.executable, "-m", "pytest", "-q", "tests/slurm/test_faults.py"]
        code = subprocess.run(command, env=os.environ | {"COALM_FAULTS_OUT": str(out)}, check=False).returncode
        return code or write(out)


def write(lines: Path) -> int:
    """The table. Raises FileNotFoundError where the tests were skipped."""
    from importlib.metadata import version

    slurm = subprocess.run(["/usr/sbin/slurmctld", "-V"], capture_output=True, text=True, check=False).stdout.strip()
    text = HEAD.format(
        date=datetime.date.today(),
        version=slurm,
        torch=version("torch"),
        cores=f"{os.cpu_count()} {platform.machine()}",
    )
    for line in lines.read_text().splitlines():
        r = json.loads(line)
        recovery = f"{r['recovery_s']:.0f}" if r["starts"] > 1 else "goes on"
        text += (
            f"| {r['fault']} | {r['cause'] or 'a warning'} | {r['starts']} | {recovery} | {r['repeated_steps']} "
            f"| {r['worst_loss_difference']:.1g} | {r['wandb_runs']} |\n"
        )
    RESULT.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
