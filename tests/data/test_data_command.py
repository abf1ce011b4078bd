"""`coalm data` as it is typed: what it prints, its JSON forms, and what it says to bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coalm_nemo.errors import EXIT_USER_ERROR
from tests.conftest import write_rows
from tests.run_coalm import coalm

END = "<|eot_id|>"


@pytest.fixture
def shards(tiny_llama: Path, tmp_path: Path) -> Path:
    rows = write_rows(tmp_path / "rows.jsonl", 30)
    words = ["--source", f"chat={rows}", "--tokenizer", str(tiny_llama), "--seq-len-tokens", "128", "--workers", "1"]
    assert coalm("data", "build", *words, "--out", str(tmp_path / "set")) == 0
    return tmp_path / "set"


def test_build_prints_its_table(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert coalm("data", "stats", str(shards), "--picture", str(shards.parent / "p.png")) == 0
    printed = capsys.readouterr().out
    assert "all, blended" in printed
    assert "packs of 128 tokens" in printed
    assert (shards.parent / "p.png").read_bytes().startswith(b"\x89PNG")


def test_show_as_json(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert coalm("data", "show", str(shards), "--rows", "20", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 20
    raw = {r["id"]: r for r in map(json.loads, (shards.parent / "rows.jsonl").read_text().splitlines())}
    for row in rows:
        assert set(row) >= {"source", "prompt_text", "target_text", "token_ids", "loss_mask"}
        assert len(row["token_ids"]) == len(row["loss_mask"])
        assert row["target_text"] == raw[row["row_id"]]["output"] + END
        assert raw[row["row_id"]]["input"] in row["prompt_text"]


@pytest.mark.parametrize("words", [["--rows", "2"], ["--packs", "--rows", "1"], ["--rows", "500", "--source", "chat"]])
def test_show_prints_rows(shards: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert coalm("data", "show", str(shards), *words) == 0
    assert END in capsys.readouterr().out


def test_stats_as_json_is_the_manifest(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert coalm("data", "stats", str(shards), "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((shards / "manifest.json").read_text())


BAD_BUILDS: dict[str, tuple[list[str], str]] = {
    "no source": ([], "no source is given"),
    "not KIND=PATH": (["--source", "rows.jsonl"], "write KIND=PATH"),
    "unknown kind": (["--source", "hamer=rows.jsonl"], "did you mean 'hammer'"),
    "missing file": (["--source", "chat=no.jsonl"], "no.jsonl does not exist"),
    "no SGD there": (["--source", "sgd=."], "dialogues_"),
    "no such tools": (["--source", "sgd=.", "sources.sgd.tools=few"], "use one of all, dialogue"),
    "unknown option": (["--source", "chat=rows.jsonl", "sources.chat.maskings=2"], "unknown key 'maskings'"),
    "missing config": (["--config", "no.yaml"], "no.yaml does not exist"),
    "config of another kind": (["--config", "rows.jsonl"], "rows.jsonl"),
    "no tokenizer": (["--source", "chat=rows.jsonl", "--tokenizer", "."], "no tokenizer.json"),
    "length 0": (["--source", "chat=rows.jsonl", "--seq-len-tokens", "0"], "seq_len_tokens is 0"),
    "nothing fits": (["--source", "chat=rows.jsonl", "--seq-len-tokens", "5"], "no row is left"),
    "evaluation items missing": (["--source", "chat=rows.jsonl", "--against", "no.jsonl"], "no.jsonl does not exist"),
    "half a row": (["--source", "chat=half.jsonl"], "half.jsonl: record 1 is not valid JSON"),
    "pre-training text": (["--source", "chat=text.jsonl"], "plain text"),
    "a part that is none": (["--source", "released=rows.jsonl", "sources.released.parts=[cra]"], "cra"),
}


@pytest.mark.parametrize("case", BAD_BUILDS)
def test_bad_builds(
    case: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", 5)
    (tmp_path / "half.jsonl").write_text('{"instruction": "a", "outp')
    (tmp_path / "text.jsonl").write_text('{"text": "words"}\n')
    before = sorted(tmp_path.iterdir())
    words, sentence = BAD_BUILDS[case]
    tokenizer = [] if "--tokenizer" in words else ["--tokenizer", str(tiny_llama)]
    assert coalm("data", "build", *words, *tokenizer, "--out", "set") == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.strip().splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("verb", ["show", "stats"])
@pytest.mark.parametrize("content", [None, "{}", '{"kind": "coalm-shards", "format": 9}'])
def test_what_is_not_a_set(verb: str, content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if content:
        (tmp_path / "manifest.json").write_text(content)
    assert coalm("data", verb, str(tmp_path)) == EXIT_USER_ERROR
    assert str(tmp_path) in capsys.readouterr().err


def test_an_unknown_source_to_show(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert coalm("data", "show", str(shards), "--source", "sgd") == EXIT_USER_ERROR
    assert "no source 'sgd'; there are chat" in capsys.readouterr().err


def test_a_killed_worker_is_told(tiny_llama: Path, tmp_path: Path) -> None:
    """A worker that the kernel ends for want of memory looks like this."""
    rows = write_rows(tmp_path / "rows.jsonl", 30)
    script = (
        "import os, signal, sys\n"
        "from coalm_nemo.data import block_worker\n"
        "block_worker.BlockWorker.encode = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from coalm_nemo import cli\n"
        "cli.main()\n"
    )
    words: list[Any] = [
        "--source",
        f"chat={rows}",
        "--tokenizer",
        tiny_llama,
        "--out",
        tmp_path / "set",
        "--workers",
        "2",
    ]
    done = subprocess.run(
        [sys.executable, "-c", script, "data", "build", *map(str, words)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == EXIT_USER_ERROR
    assert "a worker process was killed" in done.stderr
    assert not any(p.name.startswith((".set", "set")) for p in tmp_path.iterdir())
