"""Paired differences: what changed, how sure that is, and in words where two evaluations are not alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coalm_nemo.evaluation.base import Benchmark, Verdict
from coalm_nemo.evaluation.compare import compare, compare_published, load_evaluation
from coalm_nemo.evaluation.published import load_published
from coalm_nemo.evaluation.runner import Outcome
from coalm_nemo.evaluation.scores import make_scores, score_table, write_results
from tests.run_coalm import coalm


def written(path: Path, right: list[bool], name: str = "demo", protocol: str = "p", **more: Any) -> Path:
    """An evaluation with an item a verdict, two items a group."""
    path.mkdir()
    outcomes = [
        Outcome(Verdict(f"i{n}", f"g{n // 2}", {"m": (float(r), 1.0)} | more.get("counts", {})), [])
        for n, r in enumerate(right)
    ]
    benchmark = Benchmark(name, [], {"how": protocol}, more.get("corpus", lambda verdicts: {}))
    write_results(path, make_scores(benchmark, outcomes, {"name": path.name, "fingerprint": "f"}, {}), outcomes)
    return path


def test_pairing_finds_what_two_intervals_hide(tmp_path: Path) -> None:
    """B is A with 8 of 200 mended: certain, though the intervals of A and B overlap."""
    rng = np.random.default_rng(1)
    a = [bool(rng.random() < 0.5) for _ in range(200)]
    wrong = [i for i, right in enumerate(a) if not right][:8]
    b = [right or i in wrong for i, right in enumerate(a)]
    one, other = load_evaluation(written(tmp_path / "a", a)), load_evaluation(written(tmp_path / "b", b))
    (row,) = compare(one, other)["rows"]
    assert row["difference"] == pytest.approx(4.0) and 0 < row["low"] < 4 < row["high"]
    tables = [score_table(list(e.verdicts.values()))["m"] for e in (one, other)]
    assert tables[0]["high"] > tables[1]["low"]  # type: ignore[operator]
    (back,) = compare(other, one)["rows"]
    assert (back["difference"], back["low"], back["high"]) == pytest.approx((-4.0, -row["high"], -row["low"]))


def test_an_evaluation_against_itself_differs_by_nothing(tmp_path: Path) -> None:
    a = load_evaluation(written(tmp_path / "a", [True, False, True, True]))
    result = compare(a, a)
    assert result["rows"] == [{"metric": "m", "a": 75.0, "b": 75.0, "difference": 0.0, "low": 0.0, "high": 0.0}]
    assert result["notes"] == []


def test_what_is_not_alike_is_said(tmp_path: Path) -> None:
    corpus = {"corpus": lambda verdicts: {"bleu": 10.0}}
    a = load_evaluation(written(tmp_path / "a", [True] * 6, **corpus))
    b = load_evaluation(written(tmp_path / "b", [True] * 4, protocol="q", **corpus))
    result = compare(a, b)
    assert result["items"] == 4
    assert result["notes"][0] == "The item sets differ: 4 are compared, 2 are in A only and 0 in B only."
    assert result["notes"][1] == "The protocols differ in how: 'p' in A, 'q' in B."
    assert "bleu" in result["notes"][2]


def test_the_command_prints_and_gives_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = written(tmp_path / "a", [True, False]), written(tmp_path / "b", [True, True], protocol="q")
    assert coalm("eval", "compare", a, b) == 0
    shown = capsys.readouterr().out
    assert "+50.00" in shown and "The protocols differ" in shown
    assert coalm("eval", "compare", a, b, "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["difference"] == 50


@pytest.mark.parametrize(("words", "sentence"), [
    (["A"], "two evaluations"), (["A", "B", "A"], "two evaluations"), (["A", "B", "--published", "GPT-4o"], "A alone"),
    (["A", "none"], "holds no scores.json"), (["A", "other"], "only one benchmark"), (["A", "apart"], "no item in common"),
    (["A", "damaged"], "damaged"), (["A", "--published", "nobody"], "it has CoALM 8B"),
    (["A", "--published", "GPT-4o"], "no demo score"), (["bfcl", "--published", "GPT-4o"], "none of the metrics"),
])  # fmt: skip
def test_bad_input_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    written(tmp_path / "A", [True]), written(tmp_path / "B", [True])
    written(tmp_path / "other", [True], name="sgd"), written(tmp_path / "bfcl", [True], name="bfcl")
    apart = written(tmp_path / "apart", [True])
    (apart / "items.jsonl").write_text((apart / "items.jsonl").read_text().replace('"i0"', '"x0"'))
    (written(tmp_path / "damaged", [True]) / "items.jsonl").write_text('{"id": 1}\n')
    given = [str(tmp_path / w) if not w.startswith("--") and w not in ("GPT-4o", "nobody") else w for w in words]
    assert coalm("eval", "compare", *given) == 2
    error = capsys.readouterr().err.strip()
    assert sentence in error and "\n" not in error and "Traceback" not in error


def test_ours_against_the_published_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = {"l1_hammer_rouge_l_official": (0.9, 1.0)}
    path = written(tmp_path / "a", [True] * 4, name="api-bank", counts=counts)
    result = compare_published(load_evaluation(path), "coalm 8b")
    (row,) = result["rows"]
    assert row["a"] == 92.8 and row["b"] == pytest.approx(90) and row["difference"] == pytest.approx(-2.8)
    assert row["low"] == pytest.approx(-2.8) == row["high"] and any("389 are unique" in n for n in result["notes"])
    assert coalm("eval", "compare", path, "--published", "CoALM 8B") == 0
    assert "92.80" in capsys.readouterr().out


def test_the_published_table_is_whole() -> None:
    """Every metric is named, every figure a percentage, every note about something in the table."""
    table = load_published()
    assert len(table.models) == 12
    for row in table.models.values():
        for benchmark, figures in row.items():
            assert set(figures) <= set(table.metrics[benchmark])
            assert all(0 <= figure <= 100 for figure in figures.values())
    assert table.models["CoALM 70B"]["multiwoz"] == {"success": 69.4, "jga": 43.8}
    for note in table.notes:
        assert note["benchmark"] in (*table.metrics, "ablation_8b") and set(note["models"]) <= set(table.models)
    assert all(len(v) == 5 for v in table.ablation_8b.values())
