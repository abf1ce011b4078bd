"""`coalm eval`: gold at 100 %, kept answers, an endpoint, and bad input as one sentence with exit code 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coalm_nemo import chat_client
from coalm_nemo.demo.benchmark import load as load_demo
from coalm_nemo.demo.pipeline import HELD_OUT_SEED, NANO_BASE
from coalm_nemo.demo.rows import to_messages
from coalm_nemo.demo.score import held_out_items, judge, tally
from coalm_nemo.errors import UserError
from coalm_nemo.evaluation.command import HELP
from coalm_nemo.evaluation.gold_model import GoldModel
from coalm_nemo.evaluation.options import EvalOptions, parse_extra
from coalm_nemo.evaluation.registry import BENCHMARKS, find_benchmark
from coalm_nemo.evaluation.runner import run_items
from tests.data.sources.writer_server import Reply, endpoint
from tests.run_coalm import coalm


def scores_of(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "scores.json").read_text()))


def kept(out: Path) -> list[str]:
    return (out / "generations.jsonl").read_text().splitlines()


def test_gold_on_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert coalm("eval", "demo", "--model", "gold", "--limit", 4, "--out", tmp_path / "out") == 0
    assert "100.00" in capsys.readouterr().out
    read = scores_of(tmp_path / "out")
    assert all(row["value"] == 100 for row in read["scores"].values()) and read["faults"] == {}
    assert read["counts"]["items"] == len((tmp_path / "out" / "items.jsonl").read_text().splitlines())
    assert coalm("eval", "demo", "--rescore", "--limit", 4, "--out", tmp_path / "out", "--json") == 0
    assert json.loads(capsys.readouterr().out) == scores_of(tmp_path / "out") == read


def test_a_model_s_answers_are_kept_and_scored_again_without_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    model, out = Path(shutil.copytree(NANO_BASE, tmp_path / "model")), tmp_path / "out"
    words = ["eval", "demo", "--out", out, "--limit", 1, "--device", "cpu"]
    assert coalm(*words, "--model", model) == 0
    first, answers = scores_of(out), kept(out)
    assert first["settings"]["dtype"] == "fp32" and first["model"]["name"] == str(model) and len(answers) > 3
    assert coalm(*words, "--model", model) == 0 and kept(out) == answers  # nothing is generated again
    shutil.rmtree(model)
    (out / "scores.json").unlink()
    assert coalm(*words, "--rescore") == 0 and scores_of(out) == first
    capsys.readouterr()
    assert coalm("eval", "demo", "--out", out, "--limit", 2, "--rescore") == 2
    assert "have no kept answer" in capsys.readouterr().err


def test_another_model_into_the_same_directory_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert coalm("eval", "demo", "--model", "gold", "--limit", 1, "--out", tmp_path) == 0
    assert coalm("eval", "demo", "--model", NANO_BASE, "--device", "cpu", "--limit", 1, "--out", tmp_path) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert scores_of(tmp_path)["model"]["name"] == "gold"


def test_an_endpoint_and_a_shared_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_client, "FIRST_DELAY_S", 0.01)
    gold = {json.dumps(to_messages(i.row)[:1]): i.row["output"] for i in held_out_items(HELD_OUT_SEED, 2)}
    with endpoint(lambda request: Reply(gold[json.dumps(request["messages"])])) as server:
        words = [
            "eval",
            "demo",
            "--endpoint",
            server.url,
            "--model-name",
            "m",
            "--limit",
            2,
            "--cache",
            tmp_path / "cache",
        ]
        assert coalm(*words, "--out", tmp_path / "one") == 0
        asked = len(server.requests)
        assert coalm(*words, "--out", tmp_path / "two") == 0
        assert len(server.requests) == asked > 10
    one, two = scores_of(tmp_path / "one"), scores_of(tmp_path / "two")
    assert one == two and all(row["value"] == 100 for row in one["scores"].values())
    assert not (tmp_path / "one" / "generations.jsonl").exists()


def test_the_demo_benchmark_has_the_items_and_the_verdicts_of_the_demo() -> None:
    benchmark = load_demo(EvalOptions(Path("unused"), limit=12))
    rows = held_out_items(HELD_OUT_SEED, 12)
    outcomes = run_items(benchmark.items, GoldModel())
    assert [list(o.steps[0].prompt.messages) for o in outcomes] == [to_messages(r.row)[:1] for r in rows]
    spoilt = [r.row["output"].replace("a", "e") for r in rows]
    by_split = tally([judge(r, a) for r, a in zip(rows, spoilt, strict=True)])
    sums: dict[str, float] = {}
    for item, answer in zip(benchmark.items, spoilt, strict=True):
        running = item()
        next(running)
        with pytest.raises(StopIteration) as end:
            running.send(answer)
        for name, (points, _) in end.value.value.counts.items():
            sums[name] = sums.get(name, 0) + points
    for split, score in by_split.items():
        for metric in ("calls", "joint_goal", "refusals"):
            assert sums.get(f"{metric}_{split}", 0) == getattr(score, metric).right


def test_every_benchmark_is_there_and_described() -> None:
    assert set(HELP) == set(BENCHMARKS)
    for name in BENCHMARKS:
        load, run = find_benchmark(name)
        assert (load is None) != (run is None), name


BAD = {
    "no model": (["demo", "--out", "OUT"], "either --model HF_DIR"),
    "two models": (
        ["demo", "--out", "OUT", "--model", "gold", "--endpoint", "http://h/v1", "--model-name", "m"],
        "either",
    ),
    "no name": (["demo", "--out", "OUT", "--endpoint", "http://h/v1"], "needs --model-name"),
    "name too many": (["demo", "--out", "OUT", "--model", "gold", "--model-name", "m"], "goes with --endpoint"),
    "no directory": (["demo", "--out", "OUT", "--model", "nowhere"], "not a directory"),
    "empty directory": (["demo", "--out", "OUT", "--model", "EMPTY"], "config.json|tokenizer|model files"),
    "no URL": (
        ["demo", "--out", "OUT", "--endpoint", "localhost", "--model-name", "m"],
        "--endpoint is not a base URL",
    ),
    "key in URL": (["demo", "--out", "OUT", "--endpoint", "http://k@h/v1", "--model-name", "m"], "key belongs in"),
    "dtype": (["demo", "--out", "OUT", "--model", "gold", "--dtype", "fp4"], "auto, bf16 or fp32"),
    "batch": (["demo", "--out", "OUT", "--model", "gold", "--batch-size", "0"], "at least 1"),
    "temperature": (["demo", "--out", "OUT", "--model", "gold", "--temperature", "-1"], "not be negative"),
    "device": (["demo", "--out", "OUT", "--model", "MODEL", "--device", "abacus"], "write cpu, cuda"),
    "rate": (["demo", "--out", "OUT", "--model", "gold", "--requests-per-minute", "-1"], "not be negative"),
    "out is a file": (["demo", "--out", "FILE", "--model", "gold"], "cannot be written"),
    "option": (["demo", "--out", "OUT", "--model", "gold", "--option", "colour"], "key=value"),
    "unknown option": (["demo", "--out", "OUT", "--model", "gold", "--option", "a=b"], "no option 'a'; it has none"),
    "option twice": (["demo", "--out", "OUT", "--model", "gold", "--option", "a=b", "--option", "a=c"], "twice"),
    "data": (["demo", "--out", "OUT", "--model", "gold", "--data", "EMPTY"], "leave --data away"),
    "no data": (["api-bank", "--out", "OUT", "--model", "gold"], "--data is missing"),
    "rescore nothing": (["demo", "--out", "OUT", "--rescore"], "holds no evaluation"),
    "rescore with model": (["demo", "--out", "OUT", "--rescore", "--model", "gold"], "leave --model"),
    "damaged run": (["demo", "--out", "DAMAGED", "--model", "gold", "--limit", "1"], "run.json is damaged"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, sentence = BAD[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.json").write_text('{"benchmark": 1')
    (tmp_path / "file").write_text("")
    places = {"OUT": "out", "EMPTY": "empty", "FILE": "file", "DAMAGED": "damaged"}
    given = [str(tmp_path / places[w]) if w in places else str(NANO_BASE) if w == "MODEL" else w for w in words]
    assert coalm("eval", *given) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("coalm: ") and "\n" not in error and "Traceback" not in error
    import re

    assert re.search(sentence, error), error
    assert not list(tmp_path.rglob("scores.json"))


@pytest.mark.parametrize(
    "words", [["nothing"], ["demo", "--model", "gold"], ["demo", "--limit", "0", "--out", "o", "--model", "gold"]]
)
def test_what_the_command_line_itself_refuses(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert coalm("eval", *words) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_unknown_benchmark_is_named() -> None:
    with pytest.raises(UserError, match="no benchmark 'x'; there are multiwoz"):
        find_benchmark("x")


def test_options_are_read_as_asked(tmp_path: Path) -> None:
    options = EvalOptions(tmp_path, extra=parse_extra(["a=1.5", "b=x=y", f"c={tmp_path}"]))
    assert options.number("a", 0) == 1.5 and options.text("b") == "x=y" and options.path("c") == tmp_path
    assert options.number("none", 3) == 3 and options.path("none") is None and options.choice("none", ("p", "q")) == "p"
    options.only(["a", "b", "c"])
    for wrong in (lambda: options.number("b", 0), lambda: options.choice("b", ("p",)), lambda: options.path("b")):
        with pytest.raises(UserError):
            wrong()
