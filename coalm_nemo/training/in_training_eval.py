"""Calls and states of a small held-out set, answered by the model while it trains and compared with the gold ones."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from coalm_nemo.config import RunConfig
from coalm_nemo.data.chat import END_OF_TURN, ChatEncoder, load_tokenizer
from coalm_nemo.data.rows import read_rows
from coalm_nemo.data.shards import ShardSet, is_shard_set
from coalm_nemo.errors import UserError
from coalm_nemo.evaluation.calls import Call, parse_calls, parse_state, same_call
from coalm_nemo.evaluation.literals import same_value
from coalm_nemo.training.callbacks.base import Sample, SamplesReport, ScoresReport

if TYPE_CHECKING:
    from coalm_nemo.training.setup import Trainee

SHOWN = 5
"""Answers that the watchers are shown each time; all of them are in the run directory."""


@dataclass(frozen=True)
class HeldOut:
    """The set as every rank holds it."""

    prompts: list[list[int]]
    golds: list[list[int]]
    """Each answer's tokens, its end-of-turn token included."""
    stops: list[int]

    @staticmethod
    def none() -> HeldOut:
        return HeldOut([], [], [])

    def __bool__(self) -> bool:
        return bool(self.prompts)

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Judged:
    """One answer."""

    kind: str
    """call | state"""
    prompt: str
    gold: str
    answer: str
    right: bool


def read_held_out(run: RunConfig, hf_source: Path) -> HeldOut:
    """The first `evaluation.rows` rows of `evaluation.data` whose last answer is a call or a state.

    Raises UserError where there are none, or where a prompt leaves no room within `train.seq_len_tokens`.
    """
    path, tokenizer = Path(run.evaluation.data), load_tokenizer(hf_source)
    if not path.exists():
        raise UserError(f"evaluation.data: {path} does not exist; it is rows or a built set, as data.validation is")
    prompts: list[list[int]] = []
    golds: list[list[int]] = []
    for ids, mask in _encoded(path, tokenizer):
        prompt, gold = last_answer(ids, mask)
        if not prompt or kind_of(_text(tokenizer, gold)) is None:
            continue
        if len(prompt) >= run.train.seq_len_tokens:
            raise UserError(f"{path}: a prompt of {len(prompt)} tokens leaves no room in train.seq_len_tokens")
        prompts.append(prompt)
        golds.append(gold)
        if len(prompts) == run.evaluation.rows:
            break
    if not prompts:
        raise UserError(f"{path}: no row's last answer is a call or a state ('Action: f(a=1)', 'System: {{...}}')")
    return HeldOut(prompts, golds, stop_tokens(tokenizer))


def _encoded(path: Path, tokenizer: Any) -> Any:
    if is_shard_set(path):
        rows = ShardSet.load(path)
        return ((list(map(int, ids)), list(map(int, mask))) for ids, mask in map(rows.row, range(len(rows))))
    encoder = ChatEncoder(tokenizer)
    return (encoder.encode(row) for row in read_rows(path))


def last_answer(ids: Sequence[int], mask: Sequence[int]) -> tuple[list[int], list[int]]:
    """(tokens before the last supervised run, that run); both empty where nothing is supervised."""
    end = max((i for i, m in enumerate(mask) if m), default=-1) + 1
    start = end
    while start and mask[start - 1]:
        start -= 1
    return list(ids[:start]), list(ids[start:end])


def stop_tokens(tokenizer: Any) -> list[int]:
    """What ends an answer."""
    known = tokenizer.get_vocab()
    ends = {known[t] for t in END_OF_TURN if t in known}
    return sorted(ends | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()))


def kind_of(gold: str) -> str | None:
    """What a gold answer is: a call, a state, or neither."""
    if parse_calls(gold).calls:
        return "call"
    return "state" if parse_state(gold) is not None else None


def judge(prompt: str, gold: str, answer: str) -> Judged:
    """Every call with its name and all arguments, in any order; or every slot of the state."""
    kind = kind_of(gold)
    assert kind is not None
    right = same_value(parse_state(answer), parse_state(gold)) if kind == "state" else same_calls(answer, gold)
    return Judged(kind, prompt, gold, answer, right)


def same_calls(answer: str, gold: str) -> bool:
    """The same calls, as often, in any order."""
    left: list[Call] = list(parse_calls(gold).calls)
    calls = parse_calls(answer).calls
    for call in calls:
        match = next((other for other in left if same_call(call, other)), None)
        if match is None:
            return False
        left.remove(match)
    return bool(calls) and not left


class InTrainingEval:
    """Answers the set on all ranks; rank 0 judges and writes the answers to DIR/answers/step_N.jsonl."""

    def __init__(self, held_out: HeldOut, run: RunConfig, hf_source: Path, multiple: int, device: torch.device) -> None:
        self.held_out, self.run, self.hf_source = held_out, run, hf_source
        self.multiple, self.device = multiple, device
        self.tokenizer: Any = None

    def due(self, step: int, total_steps: int) -> bool:
        """Every so many steps, and at the end."""
        return step == total_steps or step % self.run.evaluation.every_steps == 0

    def answer(self, trainee: Trainee) -> list[list[int]]:
        """Token ids of the answers. Every rank has to call it."""
        from coalm_nemo.training.greedy import Geometry, greedy_answers

        geometry = Geometry(self.run.batch.micro_size, self.multiple, self.run.train.seq_len_tokens)
        return greedy_answers(
            trainee.chunks, self.held_out.prompts, self.held_out.golds, stops=frozenset(self.held_out.stops),
            max_new_tokens=self.run.evaluation.max_new_tokens, geometry=geometry, device=self.device,
        )  # fmt: skip

    def report(self, step: int, answers: Sequence[list[int]]) -> tuple[ScoresReport, SamplesReport]:
        """Scores in percent, and a few answers to show. Only on rank 0."""
        self.tokenizer = self.tokenizer or load_tokenizer(self.hf_source)
        texts = [[_text(self.tokenizer, ids) for ids in part] for part in (self.held_out.golds, answers)]
        prompts = [self.tokenizer.decode(ids) for ids in self.held_out.prompts]
        judged = [judge(p, g, a) for p, g, a in zip(prompts, *texts, strict=True)]
        self._write(step, judged)
        shown = [Sample(j.prompt, j.answer) for j in judged[:SHOWN]]
        return ScoresReport(step, scores(judged)), SamplesReport(step, shown)

    def _write(self, step: int, judged: Sequence[Judged]) -> None:
        path = Path(self.run.run.dir) / "answers" / f"step_{step:08d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".partial")
        aside.write_text("".join(json.dumps(asdict(j), ensure_ascii=False) + "\n" for j in judged), encoding="utf-8")
        os.replace(aside, path)


def scores(judged: Sequence[Judged]) -> dict[str, float]:
    """Percent right among the calls and among the states, and how many there are; a kind that the set lacks is left out."""
    result: dict[str, float] = {}
    for kind, name in (("call", "call_accuracy"), ("state", "jga")):
        verdicts = [j.right for j in judged if j.kind == kind]
        if verdicts:
            result[name] = 100 * sum(verdicts) / len(verdicts)
            result[f"{kind}s"] = len(verdicts)
    return result


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
