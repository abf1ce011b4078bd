"""`coalm train` under srun: two nodes, two ranks each, and nothing but SLURM's variables to find one another."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from coalm_nemo.config import build_config
from coalm_nemo.errors import EXIT_STOPPED, EXIT_USER_ERROR
from coalm_nemo.training.callbacks.metrics_file import read_steps
from coalm_nemo.training.ranks import first_slurm_host
from recipes import load_recipe
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm

STEPS = 12
SRUN = ["srun", "-N2", "-n4", "--ntasks-per-node=2"]
TRAIN = [sys.executable, "-m", "coalm_nemo.cli", "train", "--recipe", "coalm_tiny"]
TP2_PP2 = ["parallel.tensor=2", "parallel.pipeline=2"]
WHO = "from coalm_nemo.training.ranks import *; r = ranks_from_environment(); export_rendezvous(r); print(r)"

# The usual way to save before the time is up: the shell gets the signal a minute early and passes it on to srun, which
# hands it to the ranks. The first `wait` ends at the signal, the second one has srun's exit code.
BATCH = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=2 --time=10 --signal=B:USR1@60
srun {command} &
step=$!
trap 'kill -USR1 $step' USR1
wait $step
wait $step
"""


def words_for(model: Path, rows: Path, run_dir: Path) -> list[str]:
    return [
        f"run.dir={run_dir}",
        f"model.hf_path={model}",
        f"data.train={rows}",
        f"train.steps={STEPS}",
        "batch.global_size=4",
    ]


@pytest.fixture(scope="module")
def single_losses(
    ranks_pool: Any, tiny_llama: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    """The losses of the same run in one process."""
    run_dir = tmp_path_factory.mktemp("single")
    run = build_config(load_recipe("coalm_tiny"), [], words_for(tiny_llama, rows_file, run_dir))
    assert ranks_pool.train(run, 1) == [0]
    return losses(run_dir)


def losses(run_dir: Path) -> list[float]:
    steps = read_steps(run_dir / "metrics.jsonl")
    assert [s["step"] for s in steps] == list(range(1, STEPS + 1))
    return [s["lm_loss"] for s in steps]


def test_srun_gives_the_ranks(
    cluster: Cluster, single_losses: list[float], tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    """Tensor parallelism within a node, the pipeline between the two."""
    code, out = cluster.run([*SRUN, *TRAIN, *words_for(tiny_llama, rows_file, tmp_path), *TP2_PP2])
    assert code == 0, out
    assert "4 ranks / (TP 2 x PP 2 x CP 1)" in out
    assert losses(tmp_path) == pytest.approx(single_losses, rel=0, abs=2e-6)


def test_the_signal_before_the_time_limit_saves_and_the_same_script_goes_on(
    cluster: Cluster, single_losses: list[float], tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    script = tmp_path / "train.sh"
    command = [*TRAIN, *words_for(tiny_llama, rows_file, tmp_path / "run"), *TP2_PP2]
    script.write_text(BATCH.format(command=" ".join(command)))
    job = submit(cluster, script)
    wait_for_first_step(cluster, job, tmp_path / "run" / "metrics.jsonl")
    assert cluster.run(["scancel", "--batch", "--signal=USR1", job])[0] == 0
    code, out = outcome(cluster, job)
    assert (code, codes_of_tasks(out)) == (EXIT_STOPPED, {EXIT_STOPPED: 4}), out
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    code, out = outcome(cluster, submit(cluster, script))
    assert code == 0, out
    assert f"resuming after step {int(saved.name.removeprefix('step_'))}:" in out
    assert losses(tmp_path / "run") == pytest.approx(single_losses, rel=0, abs=2e-6)


def test_a_bad_row_is_told_once(cluster: Cluster, tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(rows_file.read_text() + '{"messages": [{"role": "user", "content": "hi"}]}\n')
    code, out = cluster.run([*SRUN, *TRAIN, *words_for(tiny_llama, bad, tmp_path / "run"), *TP2_PP2])
    assert (code, codes_of_tasks(out)) == (EXIT_USER_ERROR, {EXIT_USER_ERROR: 4}), out
    assert out.count("no assistant turn") == out.count("bad.jsonl:49") == 1
    assert "Traceback" not in out


def test_only_a_task_of_a_step_is_a_rank(cluster: Cluster, tmp_path: Path) -> None:
    """A batch script's own process has SLURM_PROCID and SLURM_NTASKS=4 too."""
    script = tmp_path / "who.sh"
    command = f'{sys.executable} -c "{WHO}"'
    script.write_text(
        f"#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=2\n{command}\nsrun -n1 -N1 {command}\nsrun {command}\n"
    )
    code, out = outcome(cluster, submit(cluster, script))
    assert code == 0, out
    single = "Ranks(rank=0, local_rank=0, world_size=1, source='single')"
    four = [f"Ranks(rank={r}, local_rank={r % 2}, world_size=4, source='slurm')" for r in range(4)]
    lines = out.splitlines()
    assert lines[:2] == [single] * 2 and sorted(lines[2:]) == four


def test_a_node_name_that_does_not_resolve_ends_the_run(cluster: Cluster) -> None:
    """Not the silence of a rendezvous that tries again until its timeout of hours."""
    meet = "from coalm_nemo.training.ranks import *; meet(ranks_from_environment(), 86400)"
    code, out = cluster.run([*SRUN, sys.executable, "-c", meet], timeout_s=60, MASTER_ADDR="nowhere")
    assert code != 0 and "node2 cannot resolve 'nowhere'" in out


@pytest.mark.parametrize("nodelist", ["node7", "gpu[07-09,12],login1", "a1,b[2-3]", "rack[1-2]n[03,05]"])
def test_the_first_host_is_slurms(cluster: Cluster, nodelist: str) -> None:
    code, out = cluster.run(["scontrol", "show", "hostnames", nodelist])
    assert code == 0 and out.split()[0] == first_slurm_host(nodelist)


def submit(cluster: Cluster, script: Path) -> str:
    """The job's number."""
    code, out = cluster.run(["sbatch", "--parsable", f"--output={script.parent}/%j.out", str(script)])
    assert code == 0, out
    return out.strip()


def wait_for_first_step(cluster: Cluster, job: str, metrics: Path) -> None:
    deadline = time.monotonic() + 180
    while not (metrics.is_file() and metrics.read_text()):
        assert time.monotonic() < deadline, show(cluster, job)
        time.sleep(0.02)


def outcome(cluster: Cluster, job: str) -> tuple[int, str]:
    """Exit code and output of a job, once it has ended."""
    deadline = time.monotonic() + 240
    while not (ended := re.search(r"JobState=(?:COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL)", show(cluster, job))):
        assert time.monotonic() < deadline, show(cluster, job)
        time.sleep(0.4)
    shown = show(cluster, job)
    code, output = re.search(r"ExitCode=(\d+):", shown), re.search(r"StdOut=(\S+)", shown)
    assert ended and code and output
    return int(code[1]), Path(output[1]).read_text()


def show(cluster: Cluster, job: str) -> str:
    return cluster.run(["scontrol", "show", "job", job])[1]


def codes_of_tasks(output: str) -> dict[int, int]:
    """Exit code -> how many tasks, from srun's lines: `srun: error: node1: tasks 0-1: Exited with exit code 75`."""
    counts: dict[int, int] = {}
    for tasks, code in re.findall(r"tasks? ([\d,-]+): Exited with exit code (\d+)", output):
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", tasks):
            counts[int(code)] = counts.get(int(code), 0) + int(last or first) - int(first) + 1
    return counts
