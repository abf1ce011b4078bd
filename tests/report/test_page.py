"""The page: whole, self-contained, small, and safe whatever data and models wrote."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coalm_nemo.config import RunConfig
from coalm_nemo.report.command import as_dict, page, read_all
from coalm_nemo.training.callbacks.base import Sample, SamplesReport, ScoresReport
from tests.report.conftest import MakeRun
from tests.run_coalm import coalm

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
VOID = {"meta", "img", "link", "br", "hr", "input", "line", "rect"}


class Reader(HTMLParser):
    """Elements, attributes, text and scripts; every element has to be closed in its turn."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID or tag == "rect":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.scripts if self.open and self.open[-1] == "script" else self.text).append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert not reader.open
    return reader


def write_scores(directory: Path, benchmark: str, model: str, **scores: float) -> Path:
    directory.mkdir(parents=True)
    table = {k: {"value": v, "low": v - 2, "high": v + 2, "points": v, "of": 100} for k, v in scores.items()}
    whole: dict[str, Any] = {
        "benchmark": benchmark, "model": {"name": model, "fingerprint": "f"}, "protocol": {"states": model},
        "versions": {}, "counts": {"items": 100}, "scores": table, "faults": {"no_call": 3},
    }  # fmt: skip
    (directory / "scores.json").write_text(json.dumps(whole))
    return directory


def text_of(*directories: Path) -> str:
    return page(*read_all(directories))


def test_every_part_of_a_run_is_shown(make_run: MakeRun) -> None:
    events = [
        SamplesReport(20, [Sample("Any trains?", "Where to?")]), ScoresReport(20, {"jga": 40.0}), "rank 3 is slow",
    ]  # fmt: skip
    run_dir = make_run(
        starts=((0, 17, None), (10, 40, "finished")),
        events=events,
        sources=("sgd", "hammer"),
        plan=("431 tokens/s/GPU",),
    )
    write_scores(run_dir / "eval" / "mwoz", "multiwoz", "ours", success=50.0, jga=31.0)
    shown = " ".join(read(text_of(run_dir)).text)
    for words in (
        "Curves", "Validation loss", "Gradient norm", "Loss by source", "hammer", "In training: jga", "planned",
        "Peak memory", "-5.0%", "431 tokens/s/GPU", "killed", "saves of", "Where to?", "multiwoz", "CoALM 8B",
        "compare the gain over the base", "rank 3 is slow", "What was run", "optimizer.lr", "megatron-core",
    ):  # fmt: skip
        assert words in shown, words


def test_nothing_that_was_written_by_others_becomes_markup(make_run: MakeRun, tmp_path: Path) -> None:
    config = RunConfig()
    config.logging.wandb_name, config.model.hf_path = EVIL, EVIL
    events = [SamplesReport(1, [Sample(EVIL, EVIL)]), ScoresReport(1, {EVIL: 1.0}), EVIL]
    run_dir = make_run("<b>run", config=config, events=events, sources=(EVIL, "b"), plan=(EVIL,))
    write_scores(run_dir / "<i>eval", EVIL, EVIL, **{EVIL: 3.0})
    plain = read(text_of(make_run("plain", sources=("a", "b"), events=[SamplesReport(1, [Sample("p", "a")])])))
    for directories in ((run_dir,), (run_dir, make_run("second", sources=(EVIL,)))):
        reader = read(text_of(*directories))
        assert set(reader.tags) <= set(plain.tags) | {"ul", "li", "ol", "sup", "i"}
        assert not [name for name, _ in reader.attributes if name.startswith("on")]
        assert any(EVIL in part for part in reader.text)
        assert all(json.loads(s) for s in reader.scripts[:-1])
        assert reader.scripts[-1] == plain.scripts[-1]


def test_no_network(make_run: MakeRun) -> None:
    reader = read(text_of(make_run()))
    assert not [v for name, v in reader.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert not {"link", "iframe", "object", "img"} & set(reader.tags)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'") in reader.attributes


def test_a_long_run_makes_a_small_page(make_run: MakeRun) -> None:
    few = len(text_of(make_run("few", ((0, 2_000, None),), sources=("a", "b"))))
    many = len(text_of(make_run("many", ((0, 20_000, None),), sources=("a", "b"))))
    assert many < 1.3 * few < 1_000_000


def test_runs_side_by_side(make_run: MakeRun) -> None:
    other = RunConfig()
    other.optimizer.lr = 3e-4
    first, second = make_run("first"), make_run("second", config=other)
    text = text_of(first, second)
    reader = read(text)
    assert "optimizer.lr" in "".join(reader.text)
    charts = [json.loads(s) for s in reader.scripts[:-1]]
    assert [line["name"] for line in charts[0]["lines"]] == ["first", "second"]
    assert "first · second" in "".join(reader.text)


def test_the_same_name_twice(make_run: MakeRun) -> None:
    runs, _ = read_all([make_run("a/run"), make_run("b/run"), make_run("x/a/run")])
    assert [run.name for run in runs] == ["a", "b", "x/a"]


def test_base_and_tuned_without_a_run(tmp_path: Path) -> None:
    base = write_scores(tmp_path / "base", "multiwoz", "Llama", success=20.0, jga=26.0)
    tuned = write_scores(tmp_path / "tuned", "multiwoz", "CoALM", success=51.5, jga=25.5)
    shown = read(text_of(base, tuned)).text
    assert "+31.50" in shown
    assert "-0.50" in shown
    assert "What was run" not in shown


def test_the_command(make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run()
    assert coalm("report", run_dir) == 0
    assert (run_dir / "report.html").read_text().startswith("<!doctype html>")
    assert coalm("report", run_dir, "--out", tmp_path / "new" / "page.html") == 0
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["page.html"]
    capsys.readouterr()
    assert coalm("report", run_dir, run_dir, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"][0]["status"] == "finished"
    assert found["runs"][0]["last"]["lm_loss"] == 0.05
    assert found["runs"][0]["starts"][0]["repeated_steps"] == 0


@pytest.mark.parametrize("what", ["missing", "file", "empty", "scores", "list", "yaml", "out"])
def test_bad_input(what: str, make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, more = make_run(), []
    target = {"missing": tmp_path / "none", "file": run_dir / "run.yaml", "empty": tmp_path / "empty"}.get(
        what, run_dir
    )
    (tmp_path / "empty").mkdir()
    if what in ("scores", "list"):
        write_scores(run_dir / "eval", "sgd", "m", jga=1.0)
        (run_dir / "eval" / "scores.json").write_text('{"benchmark": "sgd"' if what == "scores" else "[1]")
    if what == "yaml":
        (run_dir / "run.yaml").write_text("a: [")
    if what == "out":
        more = ["--out", run_dir / "run.yaml" / "page.html"]
    assert coalm("report", target, *more) == 2
    said = capsys.readouterr().err
    assert said.startswith("coalm: ")
    assert said.count("\n") == 1


NESTED = st.sampled_from(
    ["blend", "sgd", "tokens", "rows", "fill", "gpus", "packages", "commit", "dirty", "share_of_supervised", "prompt", "time",
     "step", "content_sha256", "answer"]
)  # fmt: skip
ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 60) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NESTED, inner, max_size=3),
    max_leaves=6,
)
KEYS = (
    "step", "time", "lm_loss", "loss_by_source", "tokens_per_s", "predicted_tokens_per_s", "scores", "samples", "data",
    "plan", "code", "environment", "layout", "seconds", "size_bytes", "status", "sentence", "total_steps", "reached",
)  # fmt: skip
EVENT_KINDS = st.sampled_from(["start", "end", "save", "scores", "samples", "warning", "?"])
LINES = st.lists(st.dictionaries(st.sampled_from(KEYS), ANY, max_size=6), max_size=8)


@settings(max_examples=100, deadline=None)
@given(LINES, st.lists(st.tuples(EVENT_KINDS, st.floats(1e9, 2e9), LINES.filter(bool)), max_size=6))
def test_whatever_lines_there_are(
    tmp_path_factory: pytest.TempPathFactory, metrics: list[Any], events: list[tuple[str, float, Any]]
) -> None:
    """Lines of another version, or damaged ones that are still JSON: a page, never a traceback."""
    run_dir = tmp_path_factory.mktemp("fuzz")
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    written = [{**lines[0], "event": kind, "time": at} for kind, at, lines in events]
    (run_dir / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    runs, scores = read_all([run_dir])
    read(page(runs, scores))
    json.dumps(as_dict(runs, scores))
