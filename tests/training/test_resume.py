"""Stopped or killed at any step, on any layout, resumed on another: the uninterrupted run's losses."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from coalm_nemo.config import RunConfig, build_config
from coalm_nemo.errors import EXIT_NON_FINITE, EXIT_STOPPED, EXIT_USER_ERROR
from coalm_nemo.training.callbacks.metrics_file import read_steps
from recipes import load_recipe
from tests.training.ranks_pool import output

STEPS = 6
TP2_PP2 = (4, ["parallel.tensor=2", "parallel.pipeline=2"])
PP2_VP2 = (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"])
DP2 = (2, [])
SINGLE = (1, [])
CP2 = (2, ["parallel.context=2"])


def configure(model: Path, rows: Path, run_dir: Path, *words: str) -> RunConfig:
    return build_config(load_recipe("coalm_tiny"), [], [*words_for(model, rows, run_dir), *words])


def words_for(model: Path, rows: Path, run_dir: Path) -> list[str]:
    return [
        f"run.dir={run_dir}", f"model.hf_path={model}", f"data.train={rows}", f"train.steps={STEPS}",
        "schedule.name=linear", "schedule.warmup_steps=2", "checkpoint.save_interval_steps=1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(ranks_pool: Any, tiny_llama: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps on one rank, with a checkpoint after each."""
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    run = configure(tiny_llama, rows_file, run_dir, "checkpoint.keep_last=6")
    assert ranks_pool.train(run, 1) == [0]
    return run_dir


def assert_same_curve(run_dir: Path, other: Path) -> None:
    ours, theirs = (read_steps(d / "metrics.jsonl") for d in (run_dir, other))
    assert [s["step"] for s in ours] == [s["step"] for s in theirs]
    assert [s["lm_loss"] for s in ours] == pytest.approx([s["lm_loss"] for s in theirs], rel=0, abs=1e-6)
    assert [s["supervised_tokens"] for s in ours] == [s["supervised_tokens"] for s in theirs]
    assert [s["learning_rate"] for s in ours] == pytest.approx([s["learning_rate"] for s in theirs])


@pytest.mark.parametrize(
    ("first", "second"),
    [(TP2_PP2, SINGLE), (SINGLE, TP2_PP2), (PP2_VP2, DP2), (DP2, CP2), (TP2_PP2, PP2_VP2)],
    ids=["tp2pp2-single", "single-tp2pp2", "pp2vp2-dp2", "dp2-cp2", "tp2pp2-pp2vp2"],
)
def test_resume_on_another_layout(
    first: Any, second: Any, uninterrupted: Path, ranks_pool: Any, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    """The first part is a whole run of six steps whose last three are taken away, as a crash would."""
    base = ["checkpoint.keep_last=6"]
    assert ranks_pool.train(configure(tiny_llama, rows_file, tmp_path, *base, *first[1]), first[0]) == [0] * first[0]
    for step in (4, 5, 6):
        shutil.rmtree(tmp_path / "checkpoints" / f"step_{step:08d}")
    assert ranks_pool.train(configure(tiny_llama, rows_file, tmp_path, *base, *second[1]), second[0]) == [0] * second[0]
    assert_same_curve(tmp_path, uninterrupted)


def test_packed_rows_keep_their_order_over_a_change_of_layout(
    ranks_pool: Any, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    """Context parallelism pads rows inside a pack; which rows share a pack must not depend on it."""
    packed = ["data.packing=true", "batch.global_size=2", "checkpoint.keep_last=6"]
    assert ranks_pool.train(configure(tiny_llama, rows_file, tmp_path / "whole", *packed), 1) == [0]
    assert ranks_pool.train(configure(tiny_llama, rows_file, tmp_path / "cut", *packed), 1) == [0]
    for step in (4, 5, 6):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step_{step:08d}")
    run = configure(tiny_llama, rows_file, tmp_path / "cut", *packed, *CP2[1])
    assert ranks_pool.train(run, 2) == [0, 0]
    assert_same_curve(tmp_path / "cut", tmp_path / "whole")
    changed = configure(tiny_llama, rows_file, tmp_path / "cut", *packed, "train.steps=8", "data.pack_multiple=1")
    assert ranks_pool.train(changed, 1) == [EXIT_USER_ERROR]


def test_resume_from_an_asynchronous_save(
    uninterrupted: Path, ranks_pool: Any, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    words = ["checkpoint.async_save=true", "checkpoint.keep_last=6", "parallel.tensor=2"]
    assert ranks_pool.train(configure(tiny_llama, rows_file, tmp_path, *words), 2) == [0, 0]
    for step in (3, 4, 5, 6):
        shutil.rmtree(tmp_path / "checkpoints" / f"step_{step:08d}")
    assert ranks_pool.train(configure(tiny_llama, rows_file, tmp_path, *words), 2) == [0, 0]
    assert_same_curve(tmp_path, uninterrupted)


def test_bf16_resumes_exactly(ranks_pool: Any, tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    """bf16 keeps fp32 masters: without them in the checkpoint the resumed curve would drift."""
    words = ["precision.dtype=bf16", "checkpoint.keep_last=6"]
    for name in ("whole", "cut"):
        assert ranks_pool.train(configure(tiny_llama, rows_file, tmp_path / name, *words), 2) == [0, 0]
    for step in (3, 4, 5, 6):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step_{step:08d}")
    assert ranks_pool.train(configure(tiny_llama, rows_file, tmp_path / "cut", *words), 2) == [0, 0]
    assert_same_curve(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("harm", ["torn", "flipped", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    harm: str, uninterrupted: Path, ranks_pool: Any, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    victim = tmp_path / "checkpoints" / f"step_{STEPS:08d}" / "__0_0.distcp"
    damage(victim, harm)
    run = configure(tiny_llama, rows_file, tmp_path, "checkpoint.keep_last=6")
    assert ranks_pool.train(run, 1) == [0]
    assert "__0_0.distcp" in output(run)
    assert_same_curve(tmp_path, uninterrupted)


def damage(path: Path, harm: str) -> None:
    data = bytearray(path.read_bytes())
    if harm == "missing":
        path.unlink()
    elif harm == "torn":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


def test_no_sound_checkpoint_is_an_error_not_a_new_start(
    uninterrupted: Path, ranks_pool: Any, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "checkpoints").glob("step_*/common.pt"):
        path.write_bytes(b"")
    assert ranks_pool.train(configure(tiny_llama, rows_file, tmp_path), 1) == [EXIT_USER_ERROR]


def test_other_rows_than_the_checkpoint_saw_are_refused(
    uninterrupted: Path, ranks_pool: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    from tests.conftest import write_rows

    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    other = write_rows(tmp_path / "other.jsonl", 48, seed=7)
    assert ranks_pool.train(configure(tiny_llama, other, tmp_path), 1) == [EXIT_USER_ERROR]


def test_old_checkpoints_go_and_milestones_stay(
    ranks_pool: Any, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    words = ["checkpoint.keep_last=2", "checkpoint.milestone_interval_steps=2"]
    assert ranks_pool.train(configure(tiny_llama, rows_file, tmp_path, *words), 1) == [0]
    kept = sorted(int(p.name.removeprefix("step_")) for p in (tmp_path / "checkpoints").iterdir())
    assert kept == [2, 4, 5, 6]


def test_a_non_finite_loss_stops_the_run_and_keeps_the_row_ids(
    ranks_pool: Any, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    import json

    words = ["optimizer.lr=1e20", "schedule.name=constant", "schedule.warmup_steps=0"]
    assert ranks_pool.train(configure(tiny_llama, rows_file, tmp_path, *words), 2) == [EXIT_NON_FINITE] * 2
    (report,) = tmp_path.glob("non_finite_step_*.json")
    assert all(i.startswith("row") for i in json.loads(report.read_text())["row_ids"])


def start(words: list[str], nproc: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "coalm_nemo.cli", "train", "--recipe", "coalm_tiny", "--nproc", str(nproc), *words]
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not (run_dir / "checkpoints" / f"step_{step:08d}").is_dir():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_and_resumed_on_another_layout(
    uninterrupted: Path, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    words = words_for(tiny_llama, rows_file, tmp_path)
    process = start([*words, *TP2_PP2[1]], 4)
    wait_for_step(tmp_path, 2, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    again = start([*words, *PP2_VP2[1]], 2)
    assert again.wait(200) == 0, again.communicate()[0]
    assert_same_curve(tmp_path, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_signal_saves_and_the_same_command_goes_on(
    number: signal.Signals, uninterrupted: Path, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    words = [*words_for(tiny_llama, rows_file, tmp_path), "parallel.tensor=2"]
    process = start(words, 2)
    wait_for_step(tmp_path, 1, process)
    process.send_signal(number)
    out = process.communicate(timeout=120)[0]
    assert process.returncode == EXIT_STOPPED, out
    if number is not signal.SIGUSR1:
        return
    again = start(words, 2)
    assert again.wait(200) == 0, again.communicate()[0]
    assert_same_curve(tmp_path, uninterrupted)
