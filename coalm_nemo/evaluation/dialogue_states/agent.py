"""One turn of a ReAct agent as a generator of prompts: think, call, read the result, at most so many times; then speak."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from coalm_nemo.evaluation.base import Prompt
from coalm_nemo.evaluation.calls import Call
from coalm_nemo.evaluation.dialogue_states.answers import STOP, read_step
from coalm_nemo.evaluation.dialogue_states.prompts import AgentPrompt

MAX_CALLS = 5
"""A turn, as in AutoTOD and the paper's set-up; what a model calls beyond is not carried out."""
MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class Outcome:
    """What a tool gives back."""

    observation: str
    fault: str = ""
    """Why the call could not be carried out: unknown_function, unknown_argument, ...; such a call settles nothing."""


@dataclass(frozen=True)
class GoldTurn:
    """What a perfect model does in a turn."""

    actions: Sequence[str]
    """The lines after `Action: `."""
    words: Callable[[], str]
    """Asked for once the calls are made: it may repeat a reference number that one of them gave."""

    def step(self, number: int) -> str:
        if number < len(self.actions):
            return f"Thought: I call the function that this needs.\nAction: {self.actions[number]}"
        return f"Thought: I answer the user.\nSystem: {self.words()}"


@dataclass
class TurnResult:
    """What the model did in a turn."""

    lines: list[str]
    """For the history of later turns."""
    carried_out: list[Call] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    """Every call, the failed ones included."""
    words: str = ""
    faults: list[str] = field(default_factory=list)


def take_turn(
    prompt: AgentPrompt, history: Sequence[str], user: str, run: Callable[[Call], Outcome], gold: GoldTurn
) -> Generator[Prompt, str, TurnResult]:
    """One turn. A thought without a step is asked to go on once; a call that cannot be read ends the turn, unanswered."""
    result = TurnResult([f"User: {user}"])
    went_on = False
    while not result.words:
        messages = prompt.messages(history, result.lines)
        step = read_step((yield Prompt(messages, gold.step(len(result.calls)), None, MAX_NEW_TOKENS, STOP)))
        if step.thought:
            result.lines.append(f"Thought: {step.thought}")
        if step.only_thought and not went_on:
            went_on = True
            continue
        fault = step.fault or ("no_step" if step.only_thought else "")
        if not fault and len(result.calls) + len(step.calls) > MAX_CALLS:
            fault = "too_many_calls"
        if fault:
            result.faults.append(fault)
            break
        result.words = step.words
        _carry_out(result, step.calls, step.action, run)
    result.lines.append(f"System: {result.words}")
    return result


def _carry_out(result: TurnResult, calls: Sequence[Call], action: str, run: Callable[[Call], Outcome]) -> None:
    if calls:
        result.lines.append(f"Action: {action}")
    for call in calls:
        outcome = run(call)
        result.calls.append(call)
        result.faults += [outcome.fault] * bool(outcome.fault)
        if not outcome.fault:
            result.carried_out.append(call)
        result.lines.append(f"Observation: {outcome.observation}")


HistoryOf = Literal["own", "gold"]


def history_lines(result: TurnResult, user: str, gold_words: str, of: HistoryOf) -> list[str]:
    """What later turns see of a turn: what the model did and said, or only what was said in the file."""
    return result.lines if of == "own" else [f"User: {user}", f"System: {gold_words}"]
