"""Score a Hugging Face directory on the demo's held-out dialogues, greedily, with the generation of `coalm eval`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coalm_nemo.demo.answers import parse_action, parse_call_list, parse_state, same, same_call
from coalm_nemo.demo.rows import TaggedRow, held_out_rows, to_messages
from coalm_nemo.demo.values import Split

HELD_OUT: tuple[Split, ...] = ("combinations", "words", "names")
SPLIT_NAMES = {"combinations": "unseen combinations", "words": "unseen words", "names": "unseen real names"}
METRICS = {"calls": "call accuracy", "joint_goal": "joint goal accuracy", "refusals": "refusal accuracy"}
SCORED_KINDS = ("state", "action", "refusal", "single")
MAX_NEW_TOKENS = 96


@dataclass
class Tally:
    """Right answers out of all that were asked."""

    right: int = 0
    total: int = 0

    def add(self, verdict: bool) -> None:
        self.right += verdict
        self.total += 1

    @property
    def percent(self) -> float:
        return 100 * self.right / self.total if self.total else float("nan")


@dataclass
class SplitScore:
    """The figures of one held-out split."""

    calls: Tally = field(default_factory=Tally)
    """Name and every argument exactly right, over all turns that need a call."""
    joint_goal: Tally = field(default_factory=Tally)
    """Domain and every slot exactly right, over all turns in which the user gives slots."""
    refusals: Tally = field(default_factory=Tally)
    """No call made, over all requests that no listed tool fits."""
    no_false_refusals: Tally = field(default_factory=Tally)
    """A call made (right or wrong), over all turns that need one."""


@dataclass(frozen=True)
class ScoredItem:
    """One prompt, the gold answer, the model's, and the verdict."""

    split: Split
    kind: str
    prompt: str
    gold: str
    answer: str
    right: bool
    called: bool


def held_out_items(seed: int, dialogues: int, splits: Sequence[Split] = HELD_OUT) -> list[TaggedRow]:
    """The rows to score: states, actions, refusals and single-turn requests of every split."""
    return [r for split in splits for r in held_out_rows(seed, split, dialogues) if r.kind in SCORED_KINDS]


def score_directory(
    hf_dir: Path, items: Sequence[TaggedRow], items_path: Path | None = None, batch_size: int = 64
) -> dict[Split, SplitScore]:
    """Load the model, answer every item, and tally. `items_path` gets one JSON line an item."""
    answers = answer_rows(hf_dir, [to_messages(i.row)[:1] for i in items], batch_size)
    scored = [judge(item, answer) for item, answer in zip(items, answers, strict=True)]
    if items_path is not None:
        items_path.write_text("".join(json.dumps(vars(s)) + "\n" for s in scored), encoding="utf-8")
    return tally(scored)


def answer_rows(hf_dir: Path, chats: Sequence[list[dict[str, str]]], batch_size: int = 64) -> list[str]:
    """The model's greedy answers to the chats, in fp32 on the CPU: the same figures on every machine."""
    from coalm_nemo.evaluation.base import Prompt
    from coalm_nemo.evaluation.local_model import LocalModel

    model = LocalModel(hf_dir, batch_size=batch_size, dtype="fp32", device="cpu")
    return model.answer([Prompt(chat, gold="", max_new_tokens=MAX_NEW_TOKENS) for chat in chats])


def judge(item: TaggedRow, answer: str) -> ScoredItem:
    """Compare an answer with the gold one, each parsed."""
    gold = item.row["output"]
    if item.kind == "state":
        right, called = same(parse_state(answer), parse_state(gold)), False
    elif item.kind == "single":
        right, called = _judge_single(gold, answer)
    elif item.kind == "refusal":
        called = "Action:" in answer
        right = answer.startswith("System:") and not called
    else:
        gold_call, call = parse_action(gold), parse_action(answer)
        assert gold_call is not None
        right, called = same_call(call, gold_call), answer.startswith("Action:")
    return ScoredItem(
        item.split, item.kind, "\n\n".join((item.row["instruction"], item.row["input"])), gold, answer, right, called
    )


def _judge_single(gold: str, answer: str) -> tuple[bool, bool]:
    wanted, calls = parse_call_list(gold), parse_call_list(answer)
    assert wanted is not None
    if calls is None:
        return False, False
    right = len(calls) == len(wanted) and all(same_call(c, w) for c, w in zip(calls, wanted, strict=True))
    return right, bool(calls)


def needs_call(item: ScoredItem) -> bool:
    """Whether the gold answer is a call."""
    return item.kind == "action" or (item.kind == "single" and item.gold != "[]")


def tally(scored: Sequence[ScoredItem]) -> dict[Split, SplitScore]:
    """Add up the verdicts by split."""
    scores: dict[Split, SplitScore] = {}
    for item in scored:
        score = scores.setdefault(item.split, SplitScore())
        if item.kind == "state":
            score.joint_goal.add(item.right)
        elif needs_call(item):
            score.calls.add(item.right)
            score.no_false_refusals.add(item.called)
        else:
            score.refusals.add(item.right)
    return scores


def as_table(scores: dict[Split, SplitScore]) -> dict[str, dict[str, Any]]:
    """Percentages and counts, as JSON can hold them."""
    return {split: {name: _as_figures(t) for name, t in vars(s).items()} for split, s in scores.items()}


def _as_figures(t: Tally) -> dict[str, float | int]:
    return {"percent": round(t.percent, 1), "right": t.right, "total": t.total}
