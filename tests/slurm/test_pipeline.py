"""slurm/pipeline.sh: one command from rows and a base to scores; again: nothing to do."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import ROOT, SETTINGS

pytestmark = pytest.mark.slurm
WORDS = "train.steps=4 batch.global_size=2 train.seq_len_tokens=256"


def test_the_chain_gives_scores_and_is_skipped_the_next_time(
    cluster: Cluster, tmp_path: Path, tiny_llama: Path
) -> None:
    import sys

    rows = tmp_path / "rows.jsonl"
    talk = [{"role": "user", "content": "A cat"}, {"role": "assistant", "content": "12 hotel"}]
    rows.write_text("".join(json.dumps({"messages": talk}) + "\n" for _ in range(8)))
    data = tmp_path / "data.yaml"
    data.write_text(f"seq_len_tokens: 256\nsources:\n  mine:\n    kind: chat\n    path: {rows}\n")
    (tmp_path / "cluster.env").write_text(SETTINGS.format(python=sys.executable))
    variables = {
        "CLUSTER_ENV": str(tmp_path / "cluster.env"), "OUT": str(tmp_path / "out"), "HF": str(tiny_llama),
        "DATA_CONFIG": str(data), "RECIPE": "coalm_tiny", "TRAIN_WORDS": WORDS, "SKIP_PREFLIGHT": "1",
        "TRAIN_SBATCH": "--ntasks-per-node=2 --time=10", "BENCHMARK": "demo",
        "EVAL_WORDS": "--limit 1 --device cpu",
    }  # fmt: skip

    def pipeline(verb: str) -> str:
        code, out = cluster.run(["bash", "slurm/pipeline.sh", verb], **variables)
        assert code == 0, out
        return out

    started = pipeline("start")
    assert started.count(": job ") == 5, started
    deadline = time.monotonic() + 300
    while (shown := pipeline("status")).count(" done") < 5 and "PENDING" in shown + "RUNNING" * ("RUNNING" in shown):
        assert time.monotonic() < deadline, shown
        time.sleep(1)
    logs = "".join(p.read_text()[-3000:] for p in sorted((tmp_path / "out" / "steps").glob("*.log")))
    scores = tmp_path / "out" / "eval" / "scores.json"
    deadline = time.monotonic() + 120
    while not scores.is_file():
        assert time.monotonic() < deadline, pipeline("status") + logs
        time.sleep(1)
    assert json.loads(scores.read_text())
    again = pipeline("start")
    assert again.count(": its result is there") == 5 and ": job " not in again
    assert f"scores: {scores}" in pipeline("status")


def test_what_depends_on_a_failed_step_is_cancelled(cluster: Cluster, tmp_path: Path, tiny_llama: Path) -> None:
    import sys

    (tmp_path / "cluster.env").write_text(SETTINGS.format(python=sys.executable))
    variables = {
        "CLUSTER_ENV": str(tmp_path / "cluster.env"), "OUT": str(tmp_path / "out"), "HF": str(tiny_llama),
        "DATA_CONFIG": str(tmp_path / "none.yaml"), "SKIP_PREFLIGHT": "1", "TRAIN_SBATCH": "--ntasks-per-node=1",
    }  # fmt: skip
    code, out = cluster.run(["bash", "slurm/pipeline.sh", "start"], **variables)
    assert code == 0, out
    deadline = time.monotonic() + 120
    while cluster.run(["squeue", "--noheader", "--name=coalm_data,coalm_train,coalm_export,coalm_eval"])[1]:
        assert time.monotonic() < deadline, cluster.run(["squeue"])[1]
        time.sleep(0.5)
    assert not (tmp_path / "out" / "run").exists()
    assert ROOT.is_dir() and "none.yaml" in "".join(p.read_text() for p in (tmp_path / "out/steps").glob("data*.log"))
