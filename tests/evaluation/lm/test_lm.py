"""The harness on local tasks, offline: gold, a real model against its own likelihoods, base against tuned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coalm_nemo.errors import UserError
from coalm_nemo.evaluation.compare import compare, load_evaluation
from coalm_nemo.evaluation.lm.benchmark import PUBLIC_TASKS, outcomes_of, run, task_groups
from coalm_nemo.evaluation.model_source import ModelSource
from coalm_nemo.evaluation.options import EvalOptions
from tests.tiny_llama import make_tiny_llama

pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install 'coalm_nemo[eval]'")

QUESTIONS = [
    ("Grass is", ["green", "loud", "seven"], 0),
    ("Snow is", ["a song", "white"], 1),
    ("Ice is", ["cold", "hot"], 0),
    ("Two and two make", ["three", "four", "five"], 1),
    ("A train runs on", ["rails", "water"], 0),
    ("Fire is", ["cold", "hot"], 1),
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tasks")
    rows = [json.dumps({"question": q, "choices": c, "answer": a}) for q, c, a in QUESTIONS]
    (directory / "sense.jsonl").write_text("\n".join(rows) + "\n")
    (directory / "capitals.jsonl").write_text(
        json.dumps({"prompt": "The capital of Norway is", "target": "Oslo"}) + "\n"
    )
    return directory


@pytest.fixture(scope="module")
def runs(tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Gold and two small models, each evaluated."""
    base = tmp_path_factory.mktemp("runs")
    made = {name: str(make_tiny_llama(base / name, std=0.3, seed=seed)) for name, seed in (("one", 1), ("two", 2))}
    for name, model in {"gold": "gold", **made}.items():
        options = EvalOptions(base / f"scores_{name}", data=tasks)
        options.out.mkdir()
        assert run(options, ModelSource(model=model, batch_size=4, dtype="fp32", device="cpu")) == 0
    return {n: base / f"scores_{n}" for n in ("gold", *made)} | {f"model_{n}": Path(m) for n, m in made.items()}


def scores(out: Path) -> dict[str, Any]:
    return {k: v["value"] for k, v in json.loads((out / "scores.json").read_text())["scores"].items()}


def test_gold_answers_reach_the_ceiling(runs: dict[str, Path]) -> None:
    assert scores(runs["gold"]) == {"sense/acc": 100, "sense/acc_norm": 100, "capitals/exact_match": 100}


def test_choices_are_those_of_the_models_own_likelihoods(runs: dict[str, Path]) -> None:
    """Computed here with plain transformers: the sum over a choice's tokens, and the same by character."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(runs["model_one"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(runs["model_one"])
    right = {"sense/acc": 0, "sense/acc_norm": 0}
    for question, choices, gold in QUESTIONS:
        likelihoods = []
        for choice in choices:
            prefix = tokenizer.encode(question)
            ids = tokenizer.encode(f"{question} {choice}")
            with torch.inference_mode():
                logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            likelihoods.append(sum(logits[i - 1, ids[i]].item() for i in range(len(prefix), len(ids))))
        by_length = [x / len(c) for x, c in zip(likelihoods, choices, strict=True)]
        right["sense/acc"] += max(range(len(choices)), key=likelihoods.__getitem__) == gold
        right["sense/acc_norm"] += max(range(len(choices)), key=by_length.__getitem__) == gold
    found = scores(runs["one"])
    assert {k: found[k] for k in right} == {k: pytest.approx(100 * v / len(QUESTIONS)) for k, v in right.items()}
    assert found["capitals/exact_match"] == 0


def test_base_against_tuned(runs: dict[str, Path]) -> None:
    result = compare(load_evaluation(runs["one"]), load_evaluation(runs["two"]))
    one, two = scores(runs["one"]), scores(runs["two"])
    assert one != two, "two models that choose alike compare nothing"
    text = json.dumps(result)
    assert "sense/acc" in text and "capitals/exact_match" in text


def test_what_was_asked_is_kept_for_reading(runs: dict[str, Path]) -> None:
    items = [json.loads(line) for line in (runs["one"] / "items.jsonl").read_text().splitlines()]
    assert len(items) == len(QUESTIONS) + 1
    assert {i["id"] for i in items} >= {"sense/0", "capitals/0"}
    assert any("Grass is" in json.dumps(i["steps"]) for i in items)


@pytest.mark.parametrize(
    ("source", "extra", "data", "sentence"),
    [
        (ModelSource(endpoint="http://localhost:1/v1", model_name="x"), {}, True, "which a server does not give"),
        (ModelSource(model="gold"), {}, False, "needs --data"),
        (ModelSource(model="gold"), {"tasks": "mmlu"}, True, "needs --data: only local tasks"),
        (ModelSource(model="gold"), {"fewshot": "2"}, True, "have no examples to show"),
        (ModelSource(model="gold"), {"fewshot": "x"}, True, "it must be a number"),
        (ModelSource(model="gold"), {"shots": "2"}, True, "no option 'shots'"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(
    source: ModelSource, extra: dict[str, str], data: bool, sentence: str, tasks: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        run(EvalOptions(tmp_path, data=tasks if data else None, extra=extra), source)
    assert sentence in str(error.value)


def test_an_unknown_task_is_a_sentence(tmp_path: Path, tiny_llama: Path) -> None:
    options = EvalOptions(tmp_path, extra={"tasks": "no_such_task_at_all"})
    with pytest.raises(UserError, match="the harness could not run no_such_task_at_all"):
        run(options, ModelSource(model=str(tiny_llama), device="cpu"))


def test_the_default_tasks_exist_and_those_in_text_get_the_chat_template(tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    known = TaskManager().all_tasks
    assert set(PUBLIC_TASKS) <= set(known)
    assert task_groups(EvalOptions(tmp_path), []) == {
        False: ["mmlu", "hellaswag", "arc_challenge"], True: ["gsm8k", "ifeval"],
    }  # fmt: skip
    assert task_groups(EvalOptions(tmp_path, extra={"chat_template": "no"}), []).keys() == {False}


def test_subjects_filters_and_lists_of_verdicts() -> None:
    common = {"doc_id": 0, "arguments": [("p", {})], "target": "t", "resps": [["r"]], "filtered_resps": ["r"]}
    (mmlu,) = outcomes_of("mmlu_law", [{**common, "filter": "none", "metrics": ["acc"], "acc": 1.0}])
    assert mmlu.verdict.counts == {"mmlu_law/acc": (1.0, 1.0), "mmlu/acc": (1.0, 1.0)}
    strict = {**common, "filter": "strict-match", "metrics": ["exact_match"], "exact_match": 0.0}
    loose = {**common, "filter": "flexible-extract", "metrics": ["exact_match"], "exact_match": 1.0}
    (gsm,) = outcomes_of("gsm8k", [strict, loose])
    assert gsm.verdict.counts == {
        "gsm8k/exact_match,strict-match": (0.0, 1.0), "gsm8k/exact_match,flexible-extract": (1.0, 1.0),
    }  # fmt: skip
    listed = {
        **common,
        "filter": "none",
        "metrics": ["inst_level_strict_acc"],
        "inst_level_strict_acc": [True, False, True],
    }
    (ifeval,) = outcomes_of("ifeval", [listed])
    assert ifeval.verdict.counts == {"ifeval/inst_level_strict_acc": (2.0, 3.0)}
