"""API-Bank: what is counted, gold at its ceiling, damaged gold at exactly the expected scores, text scores, execution."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coalm_nemo.errors import UserError
from coalm_nemo.evaluation.apibank.benchmark import judge_call, load, without_fence
from coalm_nemo.evaluation.apibank.execution import ToolRunner
from coalm_nemo.evaluation.apibank.matching import match_call
from coalm_nemo.evaluation.apibank.samples import level_of_name, read_hammer
from coalm_nemo.evaluation.apibank.text_scores import COLUMNS, response_rouge_l, similarity
from coalm_nemo.evaluation.base import AnswerModel, Benchmark, Verdict
from coalm_nemo.evaluation.calls import Call, parse_calls
from coalm_nemo.evaluation.gold_model import DamagedGoldModel, GoldModel
from coalm_nemo.evaluation.options import EvalOptions
from coalm_nemo.evaluation.runner import Outcome, run_items
from tests.evaluation.api_bank_world import SHARED, read_all, times_of, write_world

needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs API-Bank's level-1 samples in ../shared/data/api-bank"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("apibank") / "checkout")


def benchmark(data: Path, limit: int | None = None, **extra: str) -> Benchmark:
    return load(EvalOptions(Path("unused"), data, limit, 0, extra))


def scored(data: Path, model: AnswerModel, **extra: str) -> tuple[dict[str, tuple[float, float]], list[Outcome]]:
    """Points and out-of by metric, added up here."""
    outcomes = run_items(benchmark(data, **extra).items, model)
    sums: dict[str, tuple[float, float]] = {}
    for outcome in outcomes:
        for name, (points, of) in outcome.verdict.counts.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = before[0] + points, before[1] + of
    return sums, outcomes


def test_gold_is_100_percent_on_every_metric_and_counts_are_the_benchmarks(world: Path) -> None:
    sums, outcomes = scored(world, GoldModel(), tools=str(world))
    for level, form in ((1, "l1"), (2, "l2"), (1, "l1_hammer")):
        times = times_of(read_all(world, level))
        assert len(times) < sum(times)  # there are calls that follow a call
        assert sums[f"{form}_call"] == (len(times), len(times))
        assert sums[f"{form}_call_official"] == (sum(times), sum(times))
    ceiling = {k: v for k, v in sums.items() if k not in ("l2_execution", "l2_execution_state")}
    assert all(points == pytest.approx(of) for points, of in ceiling.values())
    # ToolSearcher is not among this checkout's tools: its calls are not counted, and that is said.
    searched = [o for o in outcomes if "not among" in str(o.verdict.details.get("execution"))]
    assert len(searched) == 40 and sums["l2_execution"] == (len(times_of(read_all(world, 2))) - 40,) * 2
    assert not any(o.verdict.faults for o in outcomes)


@needs_shared
@pytest.mark.slow
def test_level_1_of_the_real_files() -> None:
    """399 in the benchmark's own count, 389 unique, in both forms; gold replayed is 100 % everywhere."""
    sums, outcomes = scored(SHARED, GoldModel())
    for form in ("l1", "l1_hammer"):
        assert sums[f"{form}_call"] == (389, 389) and sums[f"{form}_call_official"] == (399, 399)
        assert sums[f"{form}_argument_values"] == (881, 881)
    assert sums["l1_response_rouge_l"][1] == 375
    assert all(points == pytest.approx(of) for points, of in sums.values()) and not any(
        o.verdict.faults for o in outcomes
    )


def expected_counts(model: DamagedGoldModel, times: list[int]) -> dict[str, tuple[float, float]]:
    """From the log of what was done, and the files' own order of calls; no scoring code takes part."""
    assert len(model.log) == len(times)
    sums = {name: [0.0, 0.0] for name in ("call", "name", "arguments", "call_official", "argument_values")}
    for damage, n in zip(model.log, times, strict=True):
        there = not damage.dropped
        parts = {
            "call": (damage.sound, 1), "name": (there and not damage.misspelt, 1),
            "arguments": (there and not damage.changed, 1), "call_official": (damage.sound * n, n),
        }  # fmt: skip
        arguments = len(parse_calls(damage.prompt.gold).calls[0].arguments)
        for name, (points, of) in parts.items():
            sums[name][0] += points
            sums[name][1] += of
        sums["argument_values"][0] += arguments - len(damage.changed) if there else 0
        sums["argument_values"][1] += arguments
    return {name: (a, b) for name, (a, b) in sums.items()}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("form", "level", "prefix"), [("samples", "1", "l1"), ("samples", "2", "l2"), ("hammer", "1", "l1_hammer")]
)
def test_damaged_gold_has_exactly_the_expected_scores(
    world: Path, seed: int, form: str, level: str, prefix: str
) -> None:
    model = DamagedGoldModel(seed)
    sums, outcomes = scored(world, model, form=form, level=level, part="calls", text="off")
    times = times_of(read_all(world, int(level)))
    expected = expected_counts(model, times)
    assert {name: sums[f"{prefix}_{name}"] for name in expected} == expected
    assert 0.2 < expected["call"][0] / expected["call"][1] < 0.8
    for outcome, damage in zip(outcomes, model.log, strict=True):
        faults = (["no_call"] if damage.dropped else []) + (["wrong_name"] if damage.misspelt else [])
        assert outcome.verdict.faults == faults + (["wrong_argument"] if damage.changed and not damage.dropped else [])


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("form", ["samples", "hammer"])
def test_damaged_gold_of_the_real_files(form: str) -> None:
    model = DamagedGoldModel(5)
    sums, _ = scored(SHARED, model, form=form, part="calls", text="off")
    prefix = "l1" if form == "samples" else "l1_hammer"
    expected = expected_counts(model, times_of(read_all(SHARED, 1)) if form == "samples" else hammer_times())
    assert {name: sums[f"{prefix}_{name}"] for name in expected} == expected


def hammer_times() -> list[int]:
    """How often each distinct item is in Hammer's file, in the file's order."""
    seen: dict[str, int] = {}
    for item in json.loads((SHARED / "hammer_apibank_l1.json").read_text()):
        key = json.dumps(item)
        seen[key] = seen.get(key, 0) + 1
    return list(seen.values())


def by_libraries(answer: str, gold: str) -> list[float]:
    """The paper's columns straight from the libraries."""
    import jieba
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

    words = [" ".join(jieba.cut(t)) for t in (answer, gold)]
    rouge = Rouge().get_scores(*words)[0]
    bleu = sentence_bleu([list(gold)], list(answer), smoothing_function=SmoothingFunction().method3)
    return [100 * rouge[k]["f"] for k in ("rouge-1", "rouge-2", "rouge-l")] + [100 * bleu]


def by_hand(answer: str, gold: str) -> list[float]:
    """ROUGE-1, -2, -L by their definitions over jieba's words; sets of n-grams as rouge-chinese has them."""
    import jieba

    a, g = (" ".join(jieba.cut(t)).split() for t in (answer, gold))
    figures = []
    for n in (1, 2):
        one, other = ({tuple(w[i : i + n]) for i in range(len(w) - n + 1)} for w in (a, g))
        figures.append(f_score(len(one & other), len(one), len(other)))
    row = [0] * (len(g) + 1)
    for word in a:
        diagonal = 0
        for j, wanted in enumerate(g, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == wanted else max(row[j], row[j - 1])
    return [*figures, f_score(row[-1], len(a), len(g))]


def f_score(common: int, answered: int, wanted: int) -> float:
    precision, recall = (common / n if n else 0.0 for n in (answered, wanted))
    return 200 * precision * recall / (precision + recall + 1e-8)


def test_rouge_and_bleu_are_those_of_the_libraries_and_of_the_definitions(world: Path) -> None:
    sums, outcomes = scored(world, DamagedGoldModel(1), form="hammer")
    wanted = [0.0] * 4
    for outcome in outcomes:
        answer, gold = outcome.steps[0].answer, outcome.steps[0].prompt.gold
        figures = by_libraries(answer, gold)
        assert figures[:3] == pytest.approx(by_hand(answer, gold), abs=1e-6)
        for i, figure in enumerate(figures):
            wanted[i] += figure * outcome.verdict.details["times"]
    for name, total in zip(COLUMNS, wanted, strict=True):
        points, of = sums[f"l1_hammer_{name}_official"]
        assert 100 * points / of == pytest.approx(total / of, abs=1e-3)
    assert 0.5 < sums["l1_hammer_rouge_l"][0] / sums["l1_hammer_rouge_l"][1] < 0.99


def test_response_rouge_l_is_that_of_the_package() -> None:
    from rouge import Rouge

    for a, g in (
        ("The alarm is set.", "The alarm is set for six."),
        ("No", "Yes indeed. It is"),
        ("a b c. d", "d. a b c"),
    ):
        assert response_rouge_l(a, g) == pytest.approx(100 * round(Rouge().get_scores(a, g)[0]["rouge-l"]["f"], 4))
    assert response_rouge_l("word " * 2000, "word " * 3) > 0  # as deep as it is long


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=200) | st.sampled_from([". . .", "\n\n", "。", "?", "...", " ", "!?。\n", "\x00", "[f(a=1)]"]))
def test_no_answer_breaks_the_scores(answer: str) -> None:
    gold = "[GetUserToken(username='a', password='b')]"
    for text in (answer, answer * 30):
        assert all(0 <= v <= 100 for v in similarity(text, gold).values())
        assert 0 <= response_rouge_l(text, "The alarm is set.") <= 100.01
        assert 0 <= match_call(parse_calls(text), Call("f", {"a": "1"})).values_right <= 1


@pytest.mark.parametrize(("answer", "call", "faults"), [
    ("[F(a='x', n='2')]", True, []), ("[F(n=2, a=' x ')]", True, []), ("[F(a='x', n=2.0)]", True, []),
    ('```\n[{"name": "F", "arguments": {"a": "x", "n": 2}}]\n```', True, []), ("Action: F(a='x', n=2)", True, []),
    ("[F(a='X', n='2')]", False, ["wrong_argument"]), ("[f(a='x', n='2')]", False, ["wrong_name"]),
    ("[F(a='x')]", False, ["missing_argument"]), ("[F(a='x', n='2', b='3')]", False, ["unknown_argument"]),
    ("[F(a='x', n='2'), F(a='x', n='2')]", False, ["several_calls"]), ("I cannot.", False, ["no_call"]),
    ("", False, ["no_call"]),
    ("[F('x', n=2)]", False, ["positional_argument"]), ("[F(a=__import__('os'), n=2)]", False, ["not_a_literal"]),
])  # fmt: skip
def test_verdicts(answer: str, call: bool, faults: list[str]) -> None:
    match = match_call(parse_calls(answer), Call("F", {"a": "x", "n": "2"}))
    assert (match.call, match.faults) == (call, faults)


@pytest.fixture(scope="module")
def tools(world: Path) -> Any:
    runner = ToolRunner(world, timeout_s=1.0)
    yield runner
    runner.close()


def recorded(output: Any) -> dict[str, Any]:
    return {"output": output, "exception": None}


def test_execution_on_fresh_databases_every_time(tools: ToolRunner) -> None:
    assert "needs_package" in tools.broken and set(tools.tools) == {
        "AddAlarm",
        "Calculator",
        "CheckToken",
        "GetUserToken",
    }
    gold = Call("AddAlarm", {"token": "token3xyz", "time": "2023-04-11 06:30:00", "rings": "2"})
    for _ in range(2):  # the tool itself complains where an alarm of before is there
        assert tools.compare(gold, gold, recorded("success")) == {
            "correct": True, "same": True, "gold": True, "gold_error": "", "error": "",
        }  # fmt: skip
    later = Call("AddAlarm", {**gold.arguments, "time": "2023-04-12 06:30:00"})
    reply = tools.compare(later, gold, recorded("success"))
    assert reply["correct"] and not reply["same"]  # this tool's own check looks at the output alone
    for wrong in (
        Call("AddAlarm", {**gold.arguments, "token": "x"}), Call("AddAlarm", {**gold.arguments, "rings": "two"}),
        Call("AddAlarm", {"token": "token3xyz"}), Call("AddAlarm", {**gold.arguments, "more": "1"}),
        Call("Calculator", {"formula": "1+1"}), Call("nobody", {}), Call("", {}),
    ):  # fmt: skip
        reply = tools.compare(wrong, gold, recorded("success"))
        assert reply["gold"] and not reply["correct"] and not reply["same"]


def test_a_call_that_hangs_or_ends_the_process_is_a_failed_call(tools: ToolRunner) -> None:
    gold = Call("Calculator", {"formula": "1+2"})
    assert tools.compare(Call("Calculator", {"formula": "forever"}), gold, recorded(3))["error"] == "execution_timeout"
    assert "ended" in tools.compare(Call("Calculator", {"formula": "die"}), gold, recorded(3))["error"]
    assert tools.compare(Call("Calculator", {"formula": "2+1"}), gold, recorded(3))["correct"]


def test_the_tools_see_no_key(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    (tmp_path / "init_database").mkdir()
    (tmp_path / "apis").mkdir()
    (tmp_path / "apis" / "__init__.py").write_text("import os\nassert 'OPENAI_API_KEY' not in os.environ\n")
    (tmp_path / "apis" / "api.py").write_text("class API: pass\n")
    ToolRunner(tmp_path).close()


def test_damaged_gold_executed(world: Path) -> None:
    """An undamaged call always passes; a misspelt or dropped one never does."""
    model = DamagedGoldModel(2, change=0.0)
    sums, outcomes = scored(world, model, form="samples", level="1", part="calls", text="off", tools=str(world))
    right = sum(d.sound for d in model.log)
    assert sums["l1_execution"] == sums["l1_execution_state"] == (right, len(model.log)) and right < len(model.log)
    assert {f for o in outcomes for f in o.verdict.faults} == {"no_call", "wrong_name", "execution_differs"}


def test_a_gold_call_that_the_tools_do_not_reproduce_is_named(world: Path, tmp_path: Path) -> None:
    import shutil

    other = Path(shutil.copytree(world, tmp_path / "other"))
    accounts = json.loads((other / "init_database" / "Account.json").read_text())
    for account in accounts.values():
        account["password"] = "changed"
    (other / "init_database" / "Account.json").write_text(json.dumps(accounts))
    sums, outcomes = scored(world, GoldModel(), form="samples", level="1", part="calls", text="off", tools=str(other))
    missing = sums["l1_execution"][1] - sums["l1_execution"][0]
    assert missing == 40 == sum(o.verdict.faults == ["gold_not_reproducible"] for o in outcomes)


def test_limit_takes_whole_dialogues_of_each_form(world: Path) -> None:
    groups: dict[str, set[str]] = {}
    for outcome in run_items(benchmark(world, 3, text="off").items, GoldModel()):
        groups.setdefault(outcome.verdict.group.split("/d")[0].split("/hammer")[0], set()).add(outcome.verdict.group)
    assert sum(map(len, groups.values())) == 9


def test_prompts_show_the_functions_and_never_the_answer(world: Path) -> None:
    for outcome in run_items(benchmark(world, text="off").items, GoldModel()):
        prompt = outcome.steps[0].prompt
        text = str(prompt.messages[0]["content"])
        assert prompt.gold not in text or outcome.verdict.id.startswith("l2")
        if "hammer" in outcome.verdict.id:
            assert text.startswith("[BEGIN OF QUERY]")
        elif outcome.verdict.id.startswith("l2"):
            assert "ToolSearcher" in text and '"Calculator"' not in text
        else:
            assert '"GetUserToken"' in text


@pytest.mark.parametrize(("text", "bare"), [
    ("```\n[1]\n```", "[1]"), ("```json\n[1]\n```", "[1]"), ("```[1]```", "[1]"), ("[1]", "[1]"), ("``` ```", ""),
    ("```", "```"),
])  # fmt: skip
def test_fences(text: str, bare: str) -> None:
    assert without_fence(text) == bare


@pytest.mark.parametrize(("name", "level"), [
    ("hammer_apibank_l1.json", 1), ("level-2-api.json", 2), ("lv1.json", 1), ("api_bank.json", None), ("l12.json", None),
])  # fmt: skip
def test_the_level_in_a_name(name: str, level: int | None) -> None:
    assert level_of_name(Path(name)) == level


BAD: Sequence[tuple[str, dict[str, str], str]] = [
    ("none", {}, "does not exist"), ("empty", {}, "none of the questions"), ("hammer", {}, "does not say the level"),
    ("hammer", {"level": "1", "form": "other"}, "must be one of all, samples, hammer"), ("list", {"level": "1"}, "JSON list"),
    ("two", {"level": "1"}, "2 gold calls"), ("turn", {}, "d.jsonl:1 is not a turn"),
    ("no_list", {}, "all_apis.csv is neither"),
    ("world", {"colour": "red"}, "no option 'colour'"), ("world", {"tools": "/nowhere"}, "no such file"),
    ("world", {"tools": "EMPTY"}, "has no apis/"), ("world", {"tools": "WORLD", "tools_timeout_s": "0"}, "above 0"),
    ("world", {"tools": "WORLD", "tools_python": "/bin/false"}, "cannot be started"),
    ("world", {"tools": "WORLD", "tools_timeout_s": "soon"}, "must be a number"), ("damaged_list", {}, "all_apis.csv:2"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "extra", "sentence"), BAD, ids=[f"{b[0]}-{n}" for n, b in enumerate(BAD)])
def test_bad_input_is_one_sentence(
    world: Path, tmp_path: Path, data: str, extra: dict[str, str], sentence: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "hammer").write_text((world / "hammer_apibank_l1.json").read_text())
    (tmp_path / "list").write_text('[{"instruction": 1}]')
    two = "[{'name': 'f', 'arguments': {}}, {'name': 'f', 'arguments': {}}]".replace("'", '"')
    (tmp_path / "two").write_text(json.dumps([{"instruction": "i", "input": "", "output": two}]))
    for name in ("turn", "no_list", "damaged_list"):
        folder = tmp_path / name / "level-1-given-desc"
        folder.mkdir(parents=True)
        (folder / "d.jsonl").write_text('{"role": "Cook", "text": "x"}\n')
    (tmp_path / "turn" / "all_apis.csv").write_text((world / "all_apis.csv").read_text())
    (tmp_path / "damaged_list" / "all_apis.csv").write_text("类名,api_info,input_parameters\nF,x = = 1,()\n")
    given = {k: v.replace("EMPTY", str(tmp_path / "empty")).replace("WORLD", str(world)) for k, v in extra.items()}
    with pytest.raises(UserError, match=sentence) as error:
        benchmark(world if data == "world" else tmp_path / data, **given)
    assert "\n" not in str(error.value)


def test_the_text_scores_name_their_extra_where_it_is_missing(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "rouge_chinese", None)
    with pytest.raises(UserError, match=r"coalm_nemo\[eval\]"):
        benchmark(world)
    assert benchmark(world, text="off").items


def test_judging_needs_no_model(world: Path) -> None:
    from coalm_nemo.evaluation.apibank.benchmark import Scoring

    question = read_hammer(world / "hammer_apibank_l1.json", 1)[0]
    assert question.call is not None
    verdict = judge_call(question, question.call, question.gold, Scoring(text=False))
    assert isinstance(verdict, Verdict) and verdict.counts["l1_hammer_call"] == (1.0, 1.0)
