"""From dialogues to CoALM-IT-style rows: instruction, input and output as in the released set, in a smaller world."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from coalm_nemo.demo import phrases
from coalm_nemo.demo.dialogues import Dialogue, Turn, draw_chore, generate_dialogues, join_fragments
from coalm_nemo.demo.values import Split
from coalm_nemo.demo.world import SERVICES, Call, Record, Service, Tool, draw_search, make_source

RowKind = Literal["state", "action", "refusal", "reply", "response", "single"]
"""State tracking; a call after a thought; a refusal after the same thought; other turns without a call; an answer from
an observation; a one-turn call list."""

Row = dict[str, str]
"""Alpaca: "instruction", "input", "output"."""

STATE_TASK = "Give the state as JSON."
STEP_TASK = "Take the next step."
ANSWER_TASK = "Answer from the observation."
SINGLE_TASK = "List the calls as JSON, [] if no tool fits."

TRAINING_SHARES: dict[RowKind, float] = {"state": 1.0, "action": 1.0, "refusal": 1.0, "reply": 0.4, "response": 0.25}
"""Share of the possible rows of each kind that training keeps: states are the hardest and get the most."""


@dataclass(frozen=True)
class TaggedRow:
    """A row, what kind it is, and the split its values come from."""

    kind: RowKind
    split: Split
    row: Row


def to_messages(row: Row) -> list[dict[str, str]]:
    """One user turn (instruction, blank line, input) and one assistant turn (output)."""
    return [
        {"role": "user", "content": f"{row['instruction']}\n\n{row['input']}"},
        {"role": "assistant", "content": row["output"]},
    ]


def render_state(service: Service, state: Record) -> str:
    """A dialogue state as the model writes it."""
    return "System: " + json.dumps({"domain": service.domain, "slot_values": state})


def render_calls(calls: list[Call]) -> str:
    """Single-turn calls as a JSON list."""
    return json.dumps([{"name": c.name, "arguments": dict(c.arguments)} for c in calls])


def list_tools(tools: tuple[Tool, ...]) -> str:
    """The line of a prompt that names the tools on offer."""
    return "Tools: " + ", ".join(t.signature for t in tools)


def dialogue_rows(dialogue: Dialogue) -> list[TaggedRow]:
    """Every row a dialogue gives: state and step of each turn, the answer after each observation."""
    rows: list[TaggedRow] = []

    def add(kind: RowKind, instruction: str, input_text: str, output: str) -> None:
        rows.append(TaggedRow(kind, dialogue.split, make_row(instruction, input_text, output)))

    tools = f"{STEP_TASK}\n{list_tools(dialogue.tools)}"
    for i, turn in enumerate(dialogue.turns):
        history = _history(dialogue.turns[:i]) + f"User: {turn.user}"
        if turn.given:
            add("state", STATE_TASK, history, render_state(dialogue.service, turn.state))
        prompt = f"{history}\nThought: {turn.thought}"
        if turn.call is not None:
            add("action", tools, prompt, f"Action: {turn.call.render()}")
            add("response", ANSWER_TASK, f"{_observed(turn)}\nThought: {turn.reply_thought}", f"System: {turn.system}")
        elif turn.kind == "detail":
            add("response", ANSWER_TASK, _detail_prompt(dialogue.turns[i - 1], turn), f"System: {turn.system}")
        else:
            add("refusal" if turn.kind == "refuse" else "reply", tools, prompt, f"System: {turn.system}")
    return rows


def make_row(instruction: str, input_text: str, output: str) -> Row:
    """A row with the columns of the released CoALM-IT."""
    return {"instruction": instruction, "input": input_text, "output": output}


def _history(turns: list[Turn]) -> str:
    return "".join(f"User: {t.user}\nSystem: {t.system}\n" for t in turns)


def _observed(turn: Turn) -> str:
    assert turn.call is not None
    return (
        f"User: {turn.user}\nThought: {turn.thought}\nAction: {turn.call.render()}\n"
        f"Observation: {json.dumps(turn.observation)}"
    )


def _detail_prompt(before: Turn, turn: Turn) -> str:
    return f"{_observed(before)}\nSystem: {before.system}\nUser: {turn.user}\nThought: {turn.thought}"


def single_rows(seed: int, count: int, split: Split) -> Iterator[TaggedRow]:
    """One-turn requests with short tool lists; three in ten are chores that no tool can do, and the answer is `[]`."""
    for index in range(count):
        source = make_source(seed, split, -1 - index)
        rng, service = source.rng, source.rng.choice(list(SERVICES.values()))
        if rng.random() < 0.3:
            query = rng.choice(phrases.CHORE_REQUESTS).format(c=draw_chore(rng, split))
            calls: list[Call] = []
        else:
            values = draw_search(source, service) or {}
            query = join_fragments(rng, rng.choice(phrases.OPENINGS[service.domain]), values)
            calls = [Call(service.find.name, values)]
        instruction = f"{SINGLE_TASK}\n{list_tools(_short_list(rng, service))}"
        yield TaggedRow("single", split, make_row(instruction, query, render_calls(calls)))


def _short_list(rng: random.Random, service: Service) -> tuple[Tool, ...]:
    """The service's search and one or two tools of other services, in random order."""
    others = [t for s in SERVICES.values() if s is not service for t in s.tools]
    tools = [service.find, *rng.sample(others, rng.randint(1, 2))]
    rng.shuffle(tools)
    return tuple(tools)


def training_rows(seed: int, dialogues: int) -> list[Row]:
    """Rows of `dialogues` training dialogues, thinned by kind, and of as many single-turn requests."""
    rows: list[Row] = []
    for dialogue in generate_dialogues(seed, dialogues, "train"):
        rows += [r.row for r in dialogue_rows(dialogue) if dialogue.rng.random() < TRAINING_SHARES[r.kind]]
    rows += [r.row for r in single_rows(seed, dialogues, "train")]
    random.Random(seed).shuffle(rows)
    return rows


def held_out_rows(seed: int, split: Split, dialogues: int) -> list[TaggedRow]:
    """All rows of `dialogues` dialogues of one held-out split, and of half as many single-turn requests."""
    rows = [r for d in generate_dialogues(seed, dialogues, split) for r in dialogue_rows(d)]
    return rows + list(single_rows(seed, dialogues // 2, split))


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
