"""The model in training answers held-out calls and states: on every layout what transformers answers from its export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coalm_nemo.checkpoint.convert import export_checkpoint
from coalm_nemo.config import RunConfig, build_config
from coalm_nemo.data.chat import load_tokenizer
from coalm_nemo.data.rows import read_rows
from coalm_nemo.errors import EXIT_USER_ERROR
from coalm_nemo.training.in_training_eval import judge, kind_of, last_answer, scores, stop_tokens
from recipes import load_recipe
from tests.training.ranks_pool import output

CITIES = ("Oslo", "Turin", "Ghent", "Porto")
NEW_TOKENS = 48
STEPS = 90


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calls, states, and rows that are neither and do not count."""
    path = tmp_path_factory.mktemp("questions") / "rows.jsonl"
    rows = []
    for n, city in enumerate(CITIES):
        rows.append(("Call.", f"Weather in {city}?", f"Action: look(city='{city}')"))
        state = json.dumps({"domain": "weather", "slot_values": {"city": city}})
        rows.append(("State.", f"Weather in {city}!", f"System: {state}"))
        rows.append(("Talk.", f"Hello {n}", "System: Good day."))
    lines = [json.dumps({"instruction": i, "input": text, "output": o}) for i, text, o in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def configure(model: Path, rows: Path, run_dir: Path, *words: str) -> RunConfig:
    base = [
        f"run.dir={run_dir}", f"model.hf_path={model}", f"data.train={rows}", f"evaluation.data={rows}",
        "train.steps=1", "evaluation.every_steps=1", f"evaluation.max_new_tokens={NEW_TOKENS}", "batch.micro_size=2",
        "train.seq_len_tokens=192", "schedule.name=constant", "optimizer.lr=3e-3", "logging.console_interval_steps=100",
    ]  # fmt: skip
    return build_config(load_recipe("coalm_tiny"), [], [*base, *words])


def answers(run_dir: Path, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "answers" / f"step_{step:08d}.jsonl").read_text().splitlines()]


def hf_answers(directory: Path, rows: Path) -> list[str]:
    """Plain transformers, one prompt at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    texts = []
    for row in read_rows(rows):
        if kind_of(row.messages[-1]["content"]) is None:
            continue
        prompt = tokenizer.apply_chat_template(row.messages[:-1], tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS,
                eos_token_id=stop_tokens(tokenizer), pad_token_id=0,
            )  # fmt: skip
        texts.append(tokenizer.decode(out[0, ids.size(1) :], skip_special_tokens=True).strip())
    return texts


LAYOUTS = {
    "single": (1, []),
    "tp2_pp2_sp": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "pp2_vp2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "cp2_dp2": (4, ["parallel.context=2"]),
    "tp2_cp2_sp": (4, ["parallel.tensor=2", "parallel.context=2"]),
}


@pytest.fixture(scope="module")
def half_trained(ranks_pool: Any, questions: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers are partly the gold ones and partly its own, as an HF directory."""
    directory = tmp_path_factory.mktemp("half_trained")
    words = [f"train.steps={STEPS}", "evaluation.every_steps=0"]
    assert ranks_pool.train(configure(tiny_llama, questions, directory / "run", *words), 1) == [0]
    (newest,) = (directory / "run" / "checkpoints").glob("step_*")
    export_checkpoint(newest, directory / "exported")
    return directory / "exported"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_answers_are_those_of_the_exported_checkpoint(
    layout: str, ranks_pool: Any, questions: Path, half_trained: Path, tmp_path: Path
) -> None:
    nproc, words = LAYOUTS[layout]
    run = configure(half_trained, questions, tmp_path / "run", *words)
    assert ranks_pool.train(run, nproc) == [0] * nproc
    judged = answers(tmp_path / "run", 1)
    assert [j["kind"] for j in judged] == ["call", "state"] * len(CITIES)
    (newest,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    export_checkpoint(newest, tmp_path / "exported")
    expected = hf_answers(tmp_path / "exported", questions)
    assert [j["answer"] for j in judged] == expected
    assert len(set(expected)) > 2, "a model that says the same to everything compares nothing"


def test_a_model_that_learns_scores_more_and_the_log_has_it(
    ranks_pool: Any, questions: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    words = ["train.steps=160", "evaluation.every_steps=80", "checkpoint.save_final=false"]
    run = configure(tiny_llama, questions, tmp_path, *words)
    assert ranks_pool.train(run, 1) == [0]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "eval/call_accuracy" in line]
    assert [line["step"] for line in logged] == [80, 160]
    assert all(line["eval/calls"] == len(CITIES) and line["eval/states"] == len(CITIES) for line in logged)
    assert logged[-1]["eval/call_accuracy"] + logged[-1]["eval/jga"] > 0
    for line in logged:
        judged = answers(tmp_path, line["step"])
        right = [j["right"] for j in judged if j["kind"] == "call"]
        assert line["eval/call_accuracy"] == 100 * sum(right) / len(right)
        assert all(j["right"] == (j["answer"] == j["gold"]) for j in judged if j["answer"] == j["gold"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["evaluation.data=nowhere.jsonl"], "evaluation.data: nowhere.jsonl does not exist"),
        (["evaluation.data="], "evaluation.every_steps needs evaluation.data"),
        (["evaluation.data=TALK"], "no row's last answer is a call or a state"),
    ],
)
def test_a_set_that_cannot_be_asked_is_refused(
    words: list[str], sentence: str, ranks_pool: Any, questions: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    talk = tmp_path / "talk.jsonl"
    talk.write_text(json.dumps({"instruction": "Talk.", "input": "Hello", "output": "Good day."}) + "\n")
    run = configure(tiny_llama, questions, tmp_path / "run", *(w.replace("TALK", str(talk)) for w in words))
    assert ranks_pool.train(run, 2) == [EXIT_USER_ERROR] * 2
    assert sentence in output(run)


def test_the_last_supervised_run_is_the_answer() -> None:
    assert last_answer([5, 6, 7, 8, 9], [0, 1, 0, 1, 1]) == ([5, 6, 7], [8, 9])
    assert last_answer([5, 6, 7], [0, 1, 0]) == ([5], [6])
    assert last_answer([5, 6], [0, 0]) == ([], [])


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("Action: f(a=1)", "Action: f(a=1)", True),
        ("Action: f(a=1)", "[f(a=1)]", True),
        ("Action: f(a=1)", "Action: f(a='1')", False),
        ("Action: f(a=1)", "", False),
        ("[f(a=1), g()]", "[g(), f(a=1)]", True),
        ("[f(a=1), f(a=1)]", "[f(a=1)]", False),
        ("[f(a=1)]", "[f(a=1), f(a=1)]", False),
        ('System: {"slot_values": {"b": 1, "a": 2}}', 'System: {"slot_values": {"a": 2, "b": 1}}', True),
        ('System: {"domain": "x", "slot_values": {"a": 1}}', 'System: {"domain": "x", "slot_values": {}}', False),
        ('System: {"domain": "x", "slot_values": {"a": 1}}', "System: hello", False),
    ],
)  # fmt: skip
def test_what_is_right(gold: str, answer: str, right: bool) -> None:
    assert judge("", gold, answer).right is right


def test_scores_name_only_what_the_set_has() -> None:
    judged = [judge("", "[f(a=1)]", a) for a in ("[f(a=1)]", "[f(a=2)]", "no", "[f(a=1)]")]
    assert scores(judged) == {"call_accuracy": 50.0, "calls": 4}
