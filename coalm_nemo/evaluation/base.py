"""What every benchmark and every model have in common.

An item is a generator: it yields prompts, is sent the model's answers, and returns its verdict. A single question yields
once; an agent that queries a database yields once a step. The runner (`runner.py`) advances many items at once, so that
their prompts share batches, and knows nothing about benchmarks; a benchmark knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Message = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """One question to a model."""

    messages: Sequence[Message]
    """As the chat template takes them: {"role", "content"}."""
    gold: str
    """What a perfect model writes here; the `gold` model replays it. Never shown to any other model."""
    tools: Sequence[Mapping[str, Any]] | None = None
    """Function schemas for the chat template; None where the benchmark writes them into the text itself."""
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these."""


@dataclass(frozen=True)
class Step:
    """One prompt with its answer, as kept for reading."""

    prompt: Prompt
    answer: str


@dataclass
class Verdict:
    """What came of one item."""

    id: str
    group: str
    """What the bootstrap resamples: the dialogue. Items of one group stand or fall together."""
    counts: dict[str, tuple[float, float]]
    """Metric -> (points, out of). A score is 100 x the sum of points / the sum of "out of" over items."""
    gold: Any = None
    answer: Any = None
    """Gold and answer as they were parsed and compared."""
    faults: list[str] = field(default_factory=list)
    """snake_case reasons why points are missing: malformed_call, wrong_argument, no_call, ..."""
    details: dict[str, Any] = field(default_factory=dict)


Item = Generator[Prompt, str, Verdict]


@dataclass(frozen=True)
class Benchmark:
    """A set of items and how they are scored."""

    name: str
    items: Sequence[Callable[[], Item]]
    """Each starts one item anew."""
    protocol: Mapping[str, Any]
    """How exactly it is scored, in words and settings; goes into scores.json."""
    corpus_scores: Callable[[Sequence[Verdict]], Mapping[str, float]] = lambda verdicts: {}
    """Scores that are no ratio of sums (corpus BLEU): name -> value in percent."""
    headline: Sequence[str] = ()
    """The metrics that a table shows, in order."""


class AnswerModel(Protocol):
    """Whatever answers: a local checkpoint, an endpoint, the sharded model in training, or the gold answers."""

    name: str
    fingerprint: str
    """Changes whenever the answers may: a hash of weights and tokenizer, or an endpoint's model name. In the cache's key."""

    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        """One answer a prompt, in order, without control tokens."""
