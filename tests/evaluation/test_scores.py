"""Sums, intervals and files: what must hold for any verdicts, and the bootstrap against drawing group by group."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coalm_nemo.evaluation.base import Benchmark, Prompt, Step, Verdict
from coalm_nemo.evaluation.runner import Outcome
from coalm_nemo.evaluation.scores import bootstrap, group_sums, interval, make_scores, score_table, write_results

points = st.tuples(st.integers(0, 5), st.integers(0, 5)).map(lambda p: (float(min(p)), float(max(p))))
some_verdicts = st.lists(
    st.builds(
        lambda group, counts: Verdict("", f"g{group}", counts),
        st.integers(0, 6), st.dictionaries(st.sampled_from(["a", "b", "c"]), points, max_size=3),
    ), min_size=1, max_size=25,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(some_verdicts)
def test_values_are_ratios_of_sums_within_their_intervals_bounds(verdicts: list[Verdict]) -> None:
    table = score_table(verdicts)
    for name, row in table.items():
        got = sum(v.counts[name][0] for v in verdicts if name in v.counts)
        of = sum(v.counts[name][1] for v in verdicts if name in v.counts)
        assert (row["points"], row["of"]) == (got, of)
        if of == 0:
            assert row["value"] is row["low"] is row["high"] is None
            continue
        assert row["value"] == pytest.approx(100 * got / of)
        assert row["low"] is not None and row["high"] is not None and 0 <= row["low"] <= row["high"] <= 100.0001
        if got in (0, of):
            assert row["low"] == pytest.approx(row["value"]) == row["high"]


@settings(max_examples=30, deadline=None)
@given(some_verdicts, st.randoms())
def test_the_order_of_items_within_a_group_changes_nothing(verdicts: list[Verdict], rng) -> None:  # type: ignore[no-untyped-def]
    groups = list(dict.fromkeys(v.group for v in verdicts))
    shuffled = list(verdicts)
    rng.shuffle(shuffled)
    shuffled.sort(key=lambda v: groups.index(v.group))
    one, other = score_table(sorted(verdicts, key=lambda v: groups.index(v.group))), score_table(shuffled)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name] == pytest.approx(other[name])


def test_the_interval_is_that_of_drawing_groups_by_hand() -> None:
    rng = np.random.default_rng(0)
    verdicts = [Verdict(str(i), f"g{i % 40}", {"m": (float(rng.random() < (i % 40) / 40), 1.0)}) for i in range(40 * 5)]
    low, high = interval(bootstrap(group_sums(verdicts, ["m"]), resamples=20_000)[:, 0])
    by_group = [sum(v.counts["m"][0] for v in verdicts if v.group == f"g{g}") for g in range(40)]
    drawn = [100 * np.mean([by_group[i] for i in rng.integers(0, 40, 40)]) / 5 for _ in range(20_000)]
    expected = np.percentile(drawn, [2.5, 97.5])
    assert [low, high] == pytest.approx(expected, abs=0.8)


def test_groups_stand_or_fall_together() -> None:
    """200 items in 10 groups of equal items are worth 10 observations: a far wider interval than 200 would have."""
    grouped = [Verdict(str(i), f"g{i % 10}", {"m": (float(i % 10 < 5), 1.0)}) for i in range(200)]
    apart = [Verdict(str(i), f"g{i}", {"m": (float(i % 10 < 5), 1.0)}) for i in range(200)]
    wide, narrow = score_table(grouped)["m"], score_table(apart)["m"]
    assert wide["value"] == narrow["value"] == 50
    assert wide["high"] - wide["low"] > 3 * (narrow["high"] - narrow["low"])  # type: ignore[operator]
    # The normal approximation of 10 coin throws: 1.96 x 50 / sqrt(10) = 31 each way.
    assert wide["high"] - wide["low"] == pytest.approx(62, abs=8)  # type: ignore[operator]


def outcome(name: str, right: bool) -> Outcome:
    prompt = Prompt([{"role": "user", "content": "half \ud83d a pair"}], "gold")
    verdict = Verdict(name, name, {"m": (float(right), 1.0)}, {1, 2}, ("a",), [] if right else ["wrong"], {"x": {3}})
    return Outcome(verdict, [Step(prompt, "answer ü")])


def test_the_files_hold_everything_and_are_whole(tmp_path: Path) -> None:
    benchmark = Benchmark("b", [], {"how": "so"}, lambda verdicts: {"bleu": 12.5}, ("m", "not there"))
    outcomes = [outcome("1", True), outcome("2", False)]
    scores = make_scores(benchmark, outcomes, {"name": "n", "fingerprint": "f"}, {"limit": None})
    write_results(tmp_path, scores, outcomes)
    read = json.loads((tmp_path / "scores.json").read_text())
    assert read == json.loads(json.dumps(scores))
    assert read["benchmark"] == "b" and read["protocol"] == {"how": "so"} and read["model"]["name"] == "n"
    assert read["counts"] == {"items": 2, "groups": 2, "answers": 2} and read["faults"] == {"wrong": 1}
    assert read["scores"]["m"]["value"] == 50 and read["scores"]["bleu"]["value"] == 12.5 and read["headline"] == ["m"]
    assert set(read["versions"]) >= {"python", "torch", "transformers"}
    lines = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["1", "2"] and lines[1]["faults"] == ["wrong"]
    assert (
        lines[0]["steps"][0]["answer"] == "answer ü"
        and lines[0]["gold"] == [1, 2]
        and lines[0]["counts"] == {"m": [1, 1]}
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["items.jsonl", "scores.json"]
