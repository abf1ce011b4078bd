"""Rows that are too long: the oldest turns of the history go first, a target is never cut.

With loss on the last turn only, whole exchanges are left out from the front, then turns of a history that is written
inside the prompt. With loss on all turns a dialogue becomes several rows, so that no target is lost with the history.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from coalm_nemo.data.chat_format import Message, Turn
from coalm_nemo.data.rows import Row

HISTORY_BEGIN = "[BEGIN OF CONVERSATION HISTORY]"
HISTORY_END = "[END OF CONVERSATION HISTORY]"

Render = Callable[[list[Message], list[dict[str, Any]] | None], list[Turn]]
Length = Callable[["Conversation"], int]


@dataclass(frozen=True)
class Conversation:
    """A row as it will be encoded: its turns, and which of its messages are targets."""

    row: Row
    messages: list[Message]
    turns: list[Turn]
    targets: frozenset[int]
    """Indices into `messages`."""


def shorten(conversation: Conversation, render: Render, length: Length, max_tokens: int) -> list[Conversation]:
    """Rows of at most `max_tokens` tokens that hold the conversation's targets, each target once; [] if none fits."""
    if len(conversation.targets) > 1:
        return _windows(conversation, render, length, max_tokens)
    last = len(conversation.messages) - 1
    starts = [s for s in _exchange_starts(conversation.messages) if s <= last]
    found = _longest_that_fits(
        [_cut(conversation, s, last, conversation.targets, render) for s in starts], length, max_tokens
    )
    if found is None:
        alone = _cut(conversation, starts[-1], last, conversation.targets, render)
        found = _longest_that_fits(_without_oldest_history(alone, render), length, max_tokens)
    return [found] if found is not None else []


def _exchange_starts(messages: list[Message]) -> list[int]:
    """Where a conversation may begin: its first message after the system's, and every user message."""
    first = int(messages[0]["role"] == "system")
    return sorted({first, *(i for i, m in enumerate(messages) if m["role"] == "user")})


def _cut(conversation: Conversation, start: int, stop: int, targets: frozenset[int], render: Render) -> Conversation:
    """Messages start..stop (inclusive) after the system message; `targets` are of the whole conversation."""
    system = conversation.messages[: int(conversation.messages[0]["role"] == "system")]
    shift = start - len(system)
    messages = system + conversation.messages[start : stop + 1]
    row = replace(conversation.row, messages=messages)
    kept = frozenset(t - shift for t in targets if start <= t <= stop)
    return Conversation(row, messages, render(messages, row.tools), kept)


def _longest_that_fits(candidates: list[Conversation], length: Length, max_tokens: int) -> Conversation | None:
    """The first that fits of `candidates`, which get shorter; in O(log n) lengths."""
    low, high = 0, len(candidates)
    while low < high:
        middle = (low + high) // 2
        if length(candidates[middle]) <= max_tokens:
            high = middle
        else:
            low = middle + 1
    return candidates[low] if low < len(candidates) else None


def _without_oldest_history(conversation: Conversation, render: Render) -> list[Conversation]:
    """The same prompt with one, two, ... of the oldest turns of its written history left out."""
    index = next((i for i, m in enumerate(conversation.messages) if HISTORY_BEGIN in (m.get("content") or "")), None)
    if index is None:
        return []
    result = []
    for content in _shorter_histories(conversation.messages[index]["content"]):
        messages = list(conversation.messages)
        messages[index] = {**messages[index], "content": content}
        row = replace(conversation.row, messages=messages)
        result.append(Conversation(row, messages, render(messages, row.tools), conversation.targets))
    return result


def _shorter_histories(content: str) -> list[str]:
    head, _, rest = content.partition(HISTORY_BEGIN)
    history, _, tail = rest.partition(HISTORY_END)
    lines = history.strip("\n").split("\n")
    starts = [i for i, line in enumerate(lines) if line.startswith("User:") and i > 0] + [len(lines)]
    return [
        head + HISTORY_BEGIN + "\n" + "".join(f"{line}\n" for line in lines[s:]) + HISTORY_END + tail for s in starts
    ]


def _windows(conversation: Conversation, render: Render, length: Length, max_tokens: int) -> list[Conversation]:
    """Greedy from the front: each window holds as many new targets as fit, then as much history as fits before them."""
    starts = _exchange_starts(conversation.messages)
    remaining = sorted(conversation.targets)
    result: list[Conversation] = []
    while remaining:
        first = max(s for s in starts if s <= remaining[0])
        ends = [_cut(conversation, first, t, frozenset(remaining), render) for t in reversed(remaining)]
        best = _longest_that_fits(ends, length, max_tokens)
        count = len(best.targets) if best is not None else 1
        if best is not None:
            fresh, stop = frozenset(remaining[:count]), remaining[count - 1]
            earlier = [_cut(conversation, s, stop, fresh, render) for s in starts if s <= first]
            window = _longest_that_fits(earlier, length, max_tokens) or best
            row_id = f"{conversation.row.row_id}/window{len(result)}"
            result.append(replace(window, row=replace(window.row, row_id=row_id)))
        remaining = remaining[count:]
    return result
