"""Kept generations: a killed evaluation goes on, a torn line is passed over, scoring needs no model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coalm_nemo.errors import UserError
from coalm_nemo.evaluation.base import Prompt
from coalm_nemo.evaluation.cache import CachedModel, GenerationCache, KeptAnswersOnly, prompt_key
from coalm_nemo.evaluation.runner import Reply, in_order

PROMPTS = [Prompt([{"role": "user", "content": f"question {n}"}], f"gold {n}") for n in range(20)]


class Counting:
    """Counts what it is asked; the reply names the question."""

    name, fingerprint = "counting", "c0"

    def __init__(self, fault: str = "") -> None:
        self.asked: list[str] = []
        self.fault = fault

    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        return in_order(self.stream(prompts))

    def stream(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Reply]]:
        for i, prompt in reversed(list(enumerate(prompts))):
            self.asked.append(prompt.messages[0]["content"])
            yield i, Reply(f"to {prompt.messages[0]['content']} ü\n\ud83d"[:-1], self.fault)


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    first, second = Counting(), Counting()
    file = tmp_path / "deep" / "kept.jsonl"
    once = CachedModel(first, GenerationCache(file), {"t": 0}).answer(PROMPTS + PROMPTS[:5])
    assert len(first.asked) == 20  # equal prompts of one batch are one generation
    assert CachedModel(second, GenerationCache(file), {"t": 0}).answer(PROMPTS + PROMPTS[:5]) == once
    assert second.asked == []
    rescored = CachedModel(KeptAnswersOnly("counting", "c0"), GenerationCache(file), {"t": 0})  # type: ignore[arg-type]
    assert rescored.answer(PROMPTS) == once[:20]
    with pytest.raises(UserError, match="1 prompts have no kept answer"):
        rescored.answer([replace(PROMPTS[0], max_new_tokens=3)])


def test_the_key_holds_all_that_the_answer_depends_on_and_not_the_gold_answer() -> None:
    base = PROMPTS[0]
    others = [
        replace(base, messages=[{"role": "system", "content": "question 0"}]), replace(base, tools=[{"name": "f"}]),
        replace(base, max_new_tokens=1), replace(base, stop=("x",)),
    ]  # fmt: skip
    keys = [prompt_key("f", {"t": 0}, p) for p in [base, *others]]
    keys += [prompt_key("g", {"t": 0}, base), prompt_key("f", {"t": 1}, base)]
    assert len(set(keys)) == len(keys)
    assert prompt_key("f", {"t": 0}, replace(base, gold="other")) == keys[0]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_a_kill_leaves_whole_answers_count_and_the_file_stays_usable(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    file = tmp_path_factory.mktemp("kept") / "kept.jsonl"
    whole = CachedModel(Counting(), GenerationCache(file), {}).answer(PROMPTS)
    raw = file.read_bytes()
    cut = data.draw(st.integers(0, len(raw)))
    file.write_bytes(raw[:cut])
    again = Counting()
    assert CachedModel(again, GenerationCache(file), {}).answer(PROMPTS) == whole
    lines = raw[:cut].count(b"\n") + (raw[cut : cut + 1] == b"\n")
    assert len(again.asked) == 20 - lines
    third = Counting()
    assert CachedModel(third, GenerationCache(file), {}).answer(PROMPTS) == whole and not third.asked


def test_a_reply_that_failed_for_the_moment_is_asked_again_and_one_that_was_too_long_is_not(tmp_path: Path) -> None:
    for fault, asked in (("endpoint_failed", 20), ("prompt_too_long", 0)):
        file = tmp_path / f"{fault}.jsonl"
        CachedModel(Counting(fault), GenerationCache(file), {}).answer(PROMPTS)
        again = Counting()
        replies = dict(CachedModel(again, GenerationCache(file), {}).stream(PROMPTS))
        assert len(again.asked) == asked
        assert all(r.fault == ("" if asked else fault) for r in replies.values())


@pytest.mark.parametrize("line", [b"[]", b"{}", b'{"key": 1}', b"\xff\xfe", b"nonsense", b"[" * 50_000])
def test_lines_that_are_no_answers_are_passed_over(tmp_path: Path, line: bytes) -> None:
    file = tmp_path / "kept.jsonl"
    file.write_bytes(line + b"\n" + json.dumps({"key": "k", "answer": "a"}).encode() + b"\n" + line)
    assert GenerationCache(file).replies == {"k": Reply("a")}


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be opened"):
        GenerationCache(tmp_path / "file" / "kept.jsonl")


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_where_it_was(tmp_path: Path) -> None:
    """The command itself, killed while it generates: what it had is used, and the scores are those of an unbroken run."""
    from coalm_nemo.demo.pipeline import NANO_BASE

    words = ["eval", "demo", "--model", str(NANO_BASE), "--limit", "2", "--batch-size", "4", "--device", "cpu", "--out"]
    command = [sys.executable, "-m", "coalm_nemo.cli", *words]
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    process = subprocess.Popen([*command, str(broken)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    kept = broken / "generations.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end and not (kept.exists() and kept.read_bytes().count(b"\n") >= 4):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = kept.read_bytes()
    assert before.count(b"\n") >= 4 and not (broken / "scores.json").exists()
    for out in (broken, unbroken):
        subprocess.run([*command, str(out)], check=True, stdout=subprocess.DEVNULL)
    assert kept.read_bytes().startswith(before)
    whole = (unbroken / "generations.jsonl").read_bytes()
    assert kept.read_bytes().count(b'"answer"') == whole.count(b'"answer"')
    assert json.loads((broken / "scores.json").read_text()) == json.loads((unbroken / "scores.json").read_text())
