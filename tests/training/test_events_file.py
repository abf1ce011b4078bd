"""events.jsonl: starts, saves and ends of all starts; how far each had come; what it ran on, without a secret."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coalm_nemo.config import RunConfig
from coalm_nemo.provenance import PACKAGES, SECRET, VARIABLES, code_version, environment
from coalm_nemo.training.callbacks.base import RunEnd, RunStart, SaveNote
from coalm_nemo.training.callbacks.events_file import EventsFile, count_starts
from coalm_nemo.training.callbacks.line_file import LineFile, last_lines, read_lines
from coalm_nemo.validate import Layout


def one_start(run_dir: Path, first: int) -> None:
    events = EventsFile(run_dir)
    events.on_start(RunStart(RunConfig(), Layout(2, 1, 4, False, 1, ()), 10, 10, 1.0, first, 10, 0))
    events.on_save(SaveNote(first + 1, "step", 100, 0.5))
    events.on_warning("slow")
    events.on_end(RunEnd("stopped", first + 2, 3.0))


def test_every_start_stays(tmp_path: Path) -> None:
    one_start(tmp_path, 0)
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 7, "lm_loss": 1.0, "time": 5.0}\n{"step": 8, "validation_loss": 1}\n'
    )
    one_start(tmp_path, 3)
    events = list(read_lines(tmp_path / "events.jsonl"))
    assert [e["event"] for e in events] == ["start", "save", "warning", "end"] * 2
    assert count_starts(tmp_path) == 2
    assert [e["reached"] for e in events if e["event"] == "start"] == [{}, {"step": 7, "time": 5.0}]
    assert events[4]["layout"]["world_size"] == 2


def test_the_environment_has_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "SLURM_JWT", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "do-not-write")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    found = environment()
    assert "do-not-write" not in json.dumps(found)
    assert found["variables"]["SLURM_JOB_ID"] == "4711"
    assert "torch" in found["packages"]
    assert not [name for name in (*VARIABLES, *PACKAGES) if SECRET.search(name)]


def test_the_code_version(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e", *words], check=True)

    assert code_version(tmp_path) == {"commit": "", "dirty": False}
    (tmp_path / "pyproject.toml").write_text("a")
    git("init", "-q")
    git("add", "pyproject.toml")
    git("commit", "-qm", "one")
    git("remote", "add", "origin", "https://user:secret@host/repository")
    clean = code_version(tmp_path)
    assert (len(clean["commit"]), clean["dirty"]) == (40, False)
    (tmp_path / "pyproject.toml").write_text("b")
    assert code_version(tmp_path) == {"commit": clean["commit"], "dirty": True}


LINES = st.lists(st.dictionaries(st.text(max_size=5), st.one_of(st.integers(), st.text(max_size=20)), max_size=3))


@settings(max_examples=60, deadline=None)
@given(LINES, LINES, st.integers(0, 30))
def test_lines_come_back_whatever_was_cut(
    tmp_path_factory: pytest.TempPathFactory, first: list[dict], second: list[dict], cut: int
) -> None:
    """Written, cut off within the last line, and gone on with."""
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    write(path, first)
    content = path.read_bytes()
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    path.write_bytes(content[: max(last, len(content) - cut)])
    whole = first if cut == 0 else first[:-1]
    write(path, second)
    assert list(read_lines(path)) == [*whole, *second]
    assert last_lines(path) == [*whole, *second]


def write(path: Path, lines: list[dict]) -> None:
    file = LineFile(path)
    for line in lines:
        file.write(line)
    file.close()
