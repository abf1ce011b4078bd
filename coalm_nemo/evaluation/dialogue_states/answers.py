"""A step of the agent as the model wrote it: a thought, then a call or words to the user, and perhaps more than was asked."""

from __future__ import annotations

import re
from dataclasses import dataclass

from coalm_nemo.evaluation.calls import Call, parse_calls

STOP = ("\nObservation", "\nUser:")
"""What comes after a step is not the model's to write."""

_LABEL = re.compile(r"^[ \t]*(Thought|Action|System|Observation|User)[ \t]?\d{0,3}[ \t]?:[ \t]*", re.MULTILINE)


@dataclass(frozen=True)
class StepAnswer:
    """One of calls, words and fault; or a thought alone, where the model stopped after it."""

    thought: str = ""
    calls: tuple[Call, ...] = ()
    words: str = ""
    fault: str = ""
    """Why a call could not be read (as in `Parsed.fault`), or `empty_answer`."""
    action: str = ""
    """The call as it was written, on one line."""

    @property
    def only_thought(self) -> bool:
        return not (self.calls or self.words or self.fault)


def read_step(text: str) -> StepAnswer:
    """The first action or words of an answer; what is made up after them (an observation, the user's next words) is cut.

    Words without a label are words to the user, and an unlabelled call in any spelling is a call.
    """
    parts = _labelled(text)
    thought = _line(next((value for label, value in parts if label == "Thought"), ""))
    label, value = next((part for part in parts if part[0] in ("Action", "System")), parts[0])
    if label == "System":
        return StepAnswer(thought, words=_line(value), fault="" if value else "empty_answer")
    if not value and not label:
        return StepAnswer(thought, fault="" if thought else "empty_answer")
    return _call_or_words(label, value, thought)


def _labelled(text: str) -> list[tuple[str, str]]:
    """(label, text) up to the first line that is not the model's; text before any label has the label ""."""
    marks = list(_LABEL.finditer(text))
    starts = [0, *(mark.end() for mark in marks)]
    ends = [*(mark.start() for mark in marks), len(text)]
    labels = ["", *(mark.group(1) for mark in marks)]
    parts: list[tuple[str, str]] = []
    for label, start, end in zip(labels, starts, ends, strict=True):
        if label in ("Observation", "User"):
            break
        parts.append((label, text[start:end].strip()))
    return parts


def _call_or_words(label: str, value: str, thought: str) -> StepAnswer:
    parsed = parse_calls(f"Action: {value}" if label else value)
    if parsed.calls:
        return StepAnswer(thought, parsed.calls, action=_line(value))
    if parsed.fault or label:
        return StepAnswer(thought, fault=parsed.fault or "malformed_call", action=_line(value))
    return StepAnswer(thought, words=_line(value))


def _line(text: str) -> str:
    return " ".join(text.split())
