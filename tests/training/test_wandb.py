"""W&B: one run for all starts, and nothing that it does or fails to do is felt by the training."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coalm_nemo.config import RunConfig, build_config
from coalm_nemo.errors import UserError
from coalm_nemo.training.callbacks.base import RunEnd, RunStart, Sample, SamplesReport, SaveNote, StepReport
from coalm_nemo.training.callbacks.metrics_file import MetricsFile, read_steps
from coalm_nemo.training.callbacks.weights_and_biases import WeightsAndBiases, run_id, step_values
from coalm_nemo.training.wandb_sync import sync_command, unsent_pieces
from coalm_nemo.validate import Layout
from recipes import load_recipe
from tests.run_coalm import coalm
from tests.training.ranks_pool import output
from tests.training.wandb_server import WandbServer

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No account of whoever runs the tests is used or touched."""
    home = tmp_path_factory.mktemp("home")
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(home))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        yield server


@pytest.fixture
def black_hole(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listening.getsockname()[1]}")
        yield


def one_start(
    run_dir: Path, mode: str, first: int, last: int, *, timeout_s: float = 60.0, finish_s: float = 60.0, **more: Any
) -> list[str]:
    """Steps first+1 to last of a run, as the loop tells them; what was said on the console."""
    config = RunConfig()
    config.run.dir, config.logging.wandb, config.logging.wandb_timeout_s = str(run_dir), mode, timeout_s
    said: list[str] = []
    watchers = [
        WeightsAndBiases(run_dir, said.append, finish_s=finish_s, **more),
        MetricsFile(run_dir / "metrics.jsonl", said.append),
    ]
    for watcher in watchers[::-1]:  # as the worker has them: metrics first
        watcher.on_start(RunStart(config, Layout(1, 1, 1, False, 1, ()), 10, 10, 1.0, first, 10, 0))
    for number in range(first + 1, last + 1):
        for watcher in watchers:
            watcher.on_step(StepReport(number, 1.0 / number, 0.5, 1e-3, 10, 4, 100.0, 40.0, 0.1, number / 10))
    for watcher in watchers:
        watcher.on_end(RunEnd("finished", last, 1.0))
    return said


def losses(server: WandbServer, run_dir: Path) -> list[tuple[int, int]]:
    """(step, 1 / loss) of every line that the server has: both are the step's number."""
    return [(line["_step"], round(1 / line["lm loss"])) for line in server.history(run_id(run_dir))]


def test_requeues_online_and_offline_are_one_run(server: WandbServer, tmp_path: Path) -> None:
    """Offline twice, the second from a checkpoint that lies back; then online, which sends both first; then again."""
    assert one_start(tmp_path, "offline", 0, 5) == []
    assert one_start(tmp_path, "offline", 3, 8) == []
    assert not server.runs
    assert one_start(tmp_path, "online", 6, 11) == []
    assert list(server.runs) == [run_id(tmp_path)]
    assert losses(server, tmp_path) == [(n, n) for n in range(1, 12)]
    assert one_start(tmp_path, "online", 9, 13) == []
    assert one_start(tmp_path, "offline", 13, 15) == []
    assert coalm("wandb", "sync", tmp_path) == 0
    assert losses(server, tmp_path) == [(n, n) for n in range(1, 16)]
    assert list(server.runs) == [run_id(tmp_path)]
    config = server.run(run_id(tmp_path))["config"]
    assert {"run", "optimizer", "layout", "code", "environment"} <= set(config)
    assert config["environment"]["value"]["packages"]["torch"]


def test_everything_sent_once(server: WandbServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_start(tmp_path, "offline", 0, 3)
    assert len(unsent_pieces(tmp_path)) == 1
    sync_command([tmp_path])
    sync_command([tmp_path])
    assert "everything is sent" in capsys.readouterr().out
    assert losses(server, tmp_path) == [(1, 1), (2, 2), (3, 3)]


def test_a_run_that_does_not_resume_is_another_one(server: WandbServer, tmp_path: Path) -> None:
    first = run_id(tmp_path)
    config = RunConfig()
    config.run.dir, config.logging.wandb, config.checkpoint.resume = str(tmp_path), "offline", False
    watcher = WeightsAndBiases(tmp_path, print)
    watcher.on_start(RunStart(config, Layout(1, 1, 1, False, 1, ()), 10, 10, 1.0, 0, 10, 0))
    watcher.on_end(RunEnd("stopped", 0, 1.0))
    assert run_id(tmp_path) != first


def test_a_server_that_never_answers(black_hole: None, tmp_path: Path) -> None:
    """Steps do not wait; the start goes over to offline, says so once, and loses no line."""
    started = time.monotonic()
    said = one_start(tmp_path, "online", 0, 50, timeout_s=3.0)
    assert len(said) == 1
    assert "cannot be reached" in said[0]
    assert "coalm wandb sync" in said[0]
    assert time.monotonic() - started < 60
    with WandbServer() as server:
        os.environ["WANDB_BASE_URL"] = server.url
        sync_command([tmp_path])
        assert losses(server, tmp_path) == [(n, n) for n in range(1, 51)]


def test_no_server_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the port that nobody listens on
    said = one_start(tmp_path, "online", 0, 5, timeout_s=4.0)
    assert [s for s in said if "offline" in s] == said
    assert len(said) == 1
    assert len(unsent_pieces(tmp_path)) == 1


def test_no_key(monkeypatch: pytest.MonkeyPatch, server: WandbServer, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    said = one_start(tmp_path, "online", 0, 3, timeout_s=20.0)
    assert len(said) == 1
    assert len(unsent_pieces(tmp_path)) == 1


def test_a_server_that_crashes_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The client's own service dies of this answer. Said once, and what was logged is on disk."""
    with WandbServer(broken=True) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        said = one_start(tmp_path, "online", 0, 5, finish_s=20.0)
    assert len(said) == 1
    assert "W&B" in said[0]
    assert [s["step"] for s in read_steps(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        ("raise SystemExit(1)", "without it"),
        ("import time; time.sleep(600)", "has not taken everything within 1 s"),
        ('print(\'{"ready": ""}\', flush=True); import os; os.kill(os.getpid(), 9)', "W&B"),
        ('print(\'{"ready": ""}\', flush=True); import time; time.sleep(600)', "has not taken everything within 1 s"),
    ],
)
def test_a_process_that_fails(tmp_path: Path, program: str, sentence: str) -> None:
    """Dead at once, hanging, killed, and one that never reads: 20000 steps go past it without waiting."""
    command = (sys.executable, "-c", program)
    said = one_start(tmp_path, "offline", 0, 20_000, timeout_s=0.5, finish_s=1.0, command=command)
    assert len(said) == 1, said
    assert sentence in said[0]
    assert len(read_steps(tmp_path / "metrics.jsonl")) == 20_000


def test_wandb_cannot_be_started(tmp_path: Path) -> None:
    said = one_start(tmp_path, "offline", 0, 3, command=(str(tmp_path / "no-python"),))
    assert len(said) == 1
    assert "goes on without it" in said[0]


def test_a_full_disk(tmp_path: Path) -> None:
    """W&B and metrics.jsonl on a disk of 64 KiB: the steps go on, and lines come back when there is room."""
    disk = tmp_path / "disk"
    with small_disk(disk, "64k"):
        run_dir = disk / "run"
        said: list[str] = []
        metrics = MetricsFile(run_dir / "metrics.jsonl", said.append)
        config = RunConfig()
        config.logging.wandb = "offline"
        wandb = WeightsAndBiases(run_dir, said.append, finish_s=20.0)
        start = RunStart(config, Layout(1, 1, 1, False, 1, ()), 10, 10, 1.0, 0, 10, 0)
        metrics.on_start(start)
        wandb.on_start(start)
        fill(disk / "ballast")
        for number in range(1, 101):
            report = StepReport(number, 1.0, 0.5, 1e-3, 10, 4, 100.0, 40.0, 0.1, number / 10)
            metrics.on_step(report)
            wandb.on_step(report)
        assert sum("cannot be written" in s for s in said) == 1
        (disk / "ballast").unlink()
        shutil.rmtree(run_dir / "wandb", ignore_errors=True)
        metrics.on_step(StepReport(101, 1.0, 0.5, 1e-3, 10, 4, 100.0, 40.0, 0.1, 1.0))
        assert [s["step"] for s in read_steps(run_dir / "metrics.jsonl")] == list(range(1, 102))
        wandb.on_end(RunEnd("finished", 101, 1.0))
        metrics.on_end(RunEnd("finished", 101, 1.0))


class small_disk:
    """A file system of its own; skips where this user may not mount one."""

    def __init__(self, place: Path, size: str) -> None:
        self.place, self.size = place, size

    def __enter__(self) -> None:
        self.place.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={self.size}", "tmpfs", str(self.place)]
        if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("a small file system cannot be mounted here")

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "-l", str(self.place)], check=True)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))


def test_names_are_megatrons() -> None:
    report = {"step": 3, "time": 9.0, "lm_loss": 2.0, "learning_rate": 0.1, "grad_norm": 1.0, "step_time_s": 4.0}
    report |= {"tokens_per_s": 5.0, "tflops_per_device": 6.0, "mfu_causal": None, "loss_by_source": {"sgd": 1.5}}
    assert step_values(report) == {
        "lm loss": 2.0, "learning-rate": 0.1, "grad-norm": 1.0, "iteration-time": 4.0,
        "throughput/tokens_per_sec": 5.0, "throughput/tflops/device": 6.0, "loss by source/sgd": 1.5,
    }  # fmt: skip


def test_a_save_that_ends_late_is_logged_in_order(server: WandbServer, tmp_path: Path) -> None:
    config = RunConfig()
    config.logging.wandb = "online"
    watcher = WeightsAndBiases(tmp_path, print)
    watcher.on_start(RunStart(config, Layout(1, 1, 1, False, 1, ()), 10, 10, 1.0, 0, 10, 0))
    for number in (1, 2, 3):
        watcher.on_step(StepReport(number, 1.0, 0.5, 1e-3, 10, 4, 100.0, 40.0, 0.1, number / 10))
    watcher.on_save(SaveNote(2, "step_2", 4_000_000_000, 2.0))
    watcher.on_end(RunEnd("finished", 3, 1.0))
    last = server.history(run_id(tmp_path))[-1]
    assert (last["_step"], last["checkpoint/gigabytes_per_sec"]) == (3, 2.0)


def test_samples_are_a_table(tmp_path: Path) -> None:
    config = RunConfig()
    config.logging.wandb = "offline"
    said: list[str] = []
    watcher = WeightsAndBiases(tmp_path, said.append)
    watcher.on_start(RunStart(config, Layout(1, 1, 1, False, 1, ()), 10, 10, 1.0, 0, 10, 0))
    watcher.on_samples(SamplesReport(1, [Sample("Any trains?", "Where to?")]))
    watcher.on_end(RunEnd("finished", 1, 1.0))
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/samples*.json")
    written = json.loads(table.read_text())
    assert written == {"columns": ["step", "prompt", "answer"], "data": [[1, "Any trains?", "Where to?"]]}
    assert said == []


def test_an_outage_is_not_felt_by_a_real_run(
    ranks_pool: Any, black_hole: None, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    """The same losses, to the bit, with W&B out of reach as without it."""
    losses = []
    for name, words in (("without", []), ("outage", ["logging.wandb=online", "logging.wandb_timeout_s=1"])):
        places = [f"run.dir={tmp_path / name}", f"model.hf_path={tiny_llama}", f"data.train={rows_file}"]
        run = build_config(
            load_recipe("coalm_tiny"), [], [*places, "train.steps=3", "logging.wandb_finish_s=30", *words]
        )
        assert ranks_pool.train(run, 2) == [0, 0]
        losses.append([s["lm_loss"] for s in read_steps(tmp_path / name / "metrics.jsonl")])
        assert ("cannot be reached" in output(run)) == bool(words)
    assert losses[0] == losses[1]
    assert len(unsent_pieces(tmp_path / "outage")) == 1


def test_no_key_is_written_anywhere(
    ranks_pool: Any, tiny_llama: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole run on two ranks with keys in the environment: not one byte of them in what it leaves behind."""
    secrets = {"WANDB_API_KEY": KEY, "HF_TOKEN": "hf_AAAABBBBCCCCDDDDEEEE", "MY_PASSWORD": "correct-horse-battery"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    run_dir = tmp_path / "run"
    words = [f"run.dir={run_dir}", f"model.hf_path={tiny_llama}", f"data.train={rows_file}", "logging.wandb=offline"]
    run = build_config(load_recipe("coalm_tiny"), [], [*words, "train.steps=2", "checkpoint.save_interval_steps=1"])
    assert ranks_pool.train(run, 2) == [0, 0]
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert any(p.suffix == ".wandb" for p in files)
    assert any("checkpoints" in p.parts for p in files)
    for path in files:
        content = path.read_bytes()
        assert not [name for name, value in secrets.items() if value.encode() in content], path
    assert "warning" not in output(run)


def test_a_key_in_the_configuration_is_refused(tiny_llama: Path) -> None:
    from coalm_nemo.models.llama import load_llama_config
    from coalm_nemo.validate import check_run

    run = RunConfig()
    run.run.environment = {"WANDB_API_KEY": "secret"}
    with pytest.raises(UserError, match="export it in the shell"):
        check_run(run, load_llama_config(tiny_llama), 1)


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir()])
def test_nothing_to_sync(tmp_path: Path, make: Callable[[Path], None], capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "run")
    assert coalm("wandb", "sync", tmp_path / "run") == 2
    assert "has nothing for W&B" in capsys.readouterr().err


def test_sync_without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    one_start(tmp_path, "offline", 0, 2)
    monkeypatch.delenv("WANDB_API_KEY")
    assert coalm("wandb", "sync", tmp_path) == 2
    err = capsys.readouterr().err
    assert "WANDB_API_KEY" in err
    assert "Traceback" not in err
