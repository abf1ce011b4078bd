"""The command under torchrun and alone, W&B offline, and the dry run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coalm_nemo.config import build_config
from coalm_nemo.training.callbacks.metrics_file import read_steps
from recipes import load_recipe


def words(model: Path, rows: Path, run_dir: Path, steps: int = 2) -> list[str]:
    return [f"run.dir={run_dir}", f"model.hf_path={model}", f"data.train={rows}", f"train.steps={steps}"]


def test_torchrun_starts_the_ranks(tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, "-m", "coalm_nemo.cli", "train", *words(tiny_llama, rows_file, tmp_path), "parallel.tensor=2"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(read_steps(tmp_path / "metrics.jsonl")) == 2


def test_user_errors_of_ranks_are_printed_once(
    tiny_llama: Path, rows_file: Path, tmp_path: Path, ranks_pool: Any
) -> None:
    """Rank 0 finds the bad row while the others wait; all end with code 2 and one of them says why."""
    from tests.training.ranks_pool import output

    bad = tmp_path / "bad.jsonl"
    bad.write_text(rows_file.read_text() + '{"messages": [{"role": "user", "content": "hi"}]}\n')
    run = build_config(load_recipe("coalm_tiny"), [], words(tiny_llama, bad, tmp_path / "run"))
    assert ranks_pool.train(run, 2) == [2, 2]
    assert output(run).count("no assistant turn") == 1
    assert "bad.jsonl:49" in output(run)


def test_wandb_offline_keeps_one_run_over_a_resume(
    tiny_llama: Path, rows_file: Path, tmp_path: Path, ranks_pool: Any
) -> None:
    for steps in (1, 2):
        run = build_config(
            load_recipe("coalm_tiny"), [], [*words(tiny_llama, rows_file, tmp_path, steps), "logging.wandb=offline"]
        )
        assert ranks_pool.train(run, 1) == [0]
    ids = {p.name.rpartition("-")[2] for p in (tmp_path / "wandb").glob("offline-run-*")}
    assert ids == {(tmp_path / "wandb_run_id.txt").read_text().strip()}


def test_validation_loss_is_reported(tiny_llama: Path, rows_file: Path, tmp_path: Path, ranks_pool: Any) -> None:
    extra = ["data.validation_fraction=0.2", "train.eval_interval_steps=2", "parallel.pipeline=2"]
    run = build_config(load_recipe("coalm_tiny"), [], [*words(tiny_llama, rows_file, tmp_path, 4), *extra])
    assert ranks_pool.train(run, 2) == [0, 0]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    assert sorted(losses) == [2, 4] and losses[4] < losses[2]


def test_dry_run_explains_and_writes_nothing(
    tiny_llama: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from coalm_nemo.training.command import train_command

    overrides = [*words(tiny_llama, rows_file, tmp_path / "run"), "parallel.tensor=2", "parallel.pipeline=2"]
    assert train_command("coalm_tiny", [], overrides, nproc=4, dry_run=True) == 0
    out = capsys.readouterr().out
    assert "micro-batches a step: 8  (global batch 8 / (micro-batch 1 x DP 1))" in out
    assert not (tmp_path / "run").exists()


def test_random_weights_do_not_depend_on_the_layout(
    tiny_llama: Path, rows_file: Path, tmp_path: Path, ranks_pool: Any
) -> None:
    curves = []
    for name, nproc, extra in (("one", 1, []), ("four", 4, ["parallel.tensor=2", "parallel.pipeline=2"])):
        run = build_config(
            load_recipe("nano_base"),
            [],
            [
                *words(tiny_llama, rows_file, tmp_path / name),
                "train.seq_len_tokens=512",
                "model.init=random",
                "schedule.warmup_steps=0",
                *extra,
            ],
        )
        assert ranks_pool.train(run, nproc) == [0] * nproc
        curves.append([s["lm_loss"] for s in read_steps(tmp_path / name / "metrics.jsonl")])
    assert curves[0] == pytest.approx(curves[1], abs=2e-6)


def test_a_node_with_a_trouble_of_its_own_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 2, the first of the second node, does not find the model that the other node has."""
    from coalm_nemo.training.worker import run_worker

    run = build_config(
        load_recipe("coalm_tiny"), [], words(tmp_path / "not-here", tmp_path / "rows.jsonl", tmp_path / "run")
    )
    for rank, local, printed in ((2, 0, 1), (3, 1, 0)):
        for name, value in (("RANK", rank), ("LOCAL_RANK", local), ("WORLD_SIZE", 4)):
            monkeypatch.setenv(name, str(value))
        assert run_worker(run) == 2
        assert capsys.readouterr().err.count("not-here") == printed
