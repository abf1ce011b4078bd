"""Scoring: gold answers score 100, spoiled ones do not, and nothing a model writes is ever run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coalm_nemo.demo.answers import parse_action, parse_call_list, parse_state
from coalm_nemo.demo.rows import TaggedRow
from coalm_nemo.demo.score import HELD_OUT, as_table, held_out_items, judge, score_directory, tally


@pytest.fixture(scope="module")
def items() -> list[TaggedRow]:
    return held_out_items(3, 30)


def percentages(items: list[TaggedRow], answers: list[str]) -> dict[str, dict[str, float]]:
    table = as_table(tally([judge(i, a) for i, a in zip(items, answers, strict=True)]))
    return {split: {k: v["percent"] for k, v in figures.items()} for split, figures in table.items()}


def test_gold_answers_score_100(items: list[TaggedRow]) -> None:
    figures = percentages(items, [i.row["output"] for i in items])
    assert set(figures) == set(HELD_OUT)
    assert all(v == 100 for split in figures.values() for v in split.values())


@pytest.mark.parametrize("answer", ["", "System:", "gibberish (", "Action: FindTables()", "[]"])
def test_one_answer_to_everything_gets_no_call_and_no_state_right(items: list[TaggedRow], answer: str) -> None:
    for figures in percentages(items, [answer] * len(items)).values():
        assert figures["calls"] == 0 and figures["joint_goal"] == 0


def test_a_changed_letter_is_wrong(items: list[TaggedRow]) -> None:
    spoiled = [i.row["output"].replace("a", "e").replace("o", "u") for i in items]
    for figures in percentages(items, spoiled).values():
        assert figures["calls"] < 5 and figures["joint_goal"] < 5


def test_calling_where_a_refusal_is_due_is_wrong(items: list[TaggedRow]) -> None:
    call, call_list = "Action: GetWeather(city='A', day='B')", '[{"name": "GetWeather", "arguments": {}}]'
    figures = percentages(items, [call_list if i.kind == "single" else call for i in items])
    assert all(f["refusals"] == 0 and f["no_false_refusals"] == 100 for f in figures.values())


def test_argument_order_is_free_and_types_are_not() -> None:
    row = {"instruction": "", "input": "", "output": "Action: F(a='x', n=2)"}
    item = TaggedRow("action", "words", row)
    assert judge(item, "Action: F(n=2, a='x')").right
    assert not judge(item, "Action: F(a='x', n='2')").right
    assert not judge(item, "Action: F(a='x', n=2, m=1)").right


@pytest.mark.parametrize("text", [
    "F(a='x')", "Action: F('x')", "Action: F(a=g())", "Action: F(a=__import__('os'))", "Action: F(**{'a': 1})",
    "Action: x.F(a=1)", "Action: F(a=1); G()", "Action: F(a=[1])", "Action: F(a=True)", "Action: F(a=1",
    "Action: " + "(" * 1000, "Action: F(a=-1)", "Action: F(a=1, a=2)",
])  # fmt: skip
def test_what_is_no_literal_call_is_none(text: str) -> None:
    assert parse_action(text) is None


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"name": "F"}]', '[{"name": 1, "arguments": {}}]', "[" * 2000])
def test_what_is_no_call_list_is_none(text: str) -> None:
    assert parse_call_list(text) is None


@pytest.mark.parametrize("text", ["{}", "System: []", 'System: {"domain": "x"}', "System: {", "no"])
def test_what_is_no_state_is_none(text: str) -> None:
    assert parse_state(text) is None


def test_score_a_directory(tokenizer: Any, tokenizer_dir: Path, items: list[TaggedRow], tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    scores = score_directory(tmp_path / "model", items[:8], tmp_path / "items.jsonl", batch_size=4)
    assert scores[items[0].split].joint_goal.percent == 0
    assert len((tmp_path / "items.jsonl").read_text().splitlines()) == 8
