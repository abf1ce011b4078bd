"""Many items at once: their pending prompts go to the model together, and each answer back to the item that asked.

A model that can give answers as they come has `stream`; then each is kept the moment it is there. One that has only
`answer` is asked a round at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from coalm_nemo.evaluation.base import AnswerModel, Benchmark, Item, Prompt, Step, Verdict

AT_ONCE = 512
"""Items under way: enough that sorting their prompts by length leaves little padding, few enough to hold."""


@dataclass(frozen=True)
class Reply:
    """An answer, or why it is empty or not whole."""

    text: str
    fault: str = ""
    """prompt_too_long, endpoint_failed, cut_short; "" where all is well."""


@runtime_checkable
class StreamingModel(AnswerModel, Protocol):
    """A model whose answers can be had one by one, in whatever order they are ready."""

    def stream(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Reply]]:
        """(index into prompts, reply), each index once."""


@dataclass
class Outcome:
    """What came of an item, and every prompt with its answer."""

    verdict: Verdict
    steps: list[Step]


Advance = Callable[[int, int], None]
"""Told how many answers and how many verdicts have come since it was last called."""


@dataclass
class _Running:
    index: int
    item: Item
    prompt: Prompt
    steps: list[Step] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def run_items(
    items: Sequence[Callable[[], Item]],
    model: AnswerModel,
    *,
    at_once: int = AT_ONCE,
    advance: Advance = lambda answers, verdicts: None,
) -> list[Outcome]:
    """The outcome of every item, in the items' order. What an item raises is a bug of its benchmark and is passed on."""
    outcomes: list[Outcome | None] = [None] * len(items)
    running: list[_Running] = []
    next_item = 0
    while running or next_item < len(items):
        while len(running) < at_once and next_item < len(items):
            started = _start(next_item, items[next_item](), outcomes)
            running += [started] if started else []
            next_item += 1
            advance(0, started is None)
        still: list[_Running] = []
        for at, reply in replies(model, [r.prompt for r in running]):
            goes_on = _resume(running[at], reply, outcomes)
            still += [running[at]] if goes_on else []
            advance(1, not goes_on)
        running = sorted(still, key=lambda r: r.index)
    done = [o for o in outcomes if o is not None]
    _check(done, len(items))
    return done


def replies(model: AnswerModel, prompts: Sequence[Prompt]) -> Iterable[tuple[int, Reply]]:
    """Each prompt's reply, from either kind of model."""
    if isinstance(model, StreamingModel):
        return model.stream(prompts)
    answers = model.answer(prompts)
    if len(answers) != len(prompts):
        raise RuntimeError(f"{model.name} gave {len(answers)} answers to {len(prompts)} prompts")
    return ((i, Reply(a)) for i, a in enumerate(answers))


def in_order(stream: Iterable[tuple[int, Reply]]) -> list[str]:
    """The texts of a stream, in the prompts' order: `answer` of a streaming model."""
    return [reply.text for _, reply in sorted(stream, key=lambda pair: pair[0])]


def _start(index: int, item: Item, outcomes: list[Outcome | None]) -> _Running | None:
    try:
        return _Running(index, item, next(item))
    except StopIteration as end:  # an item that asks nothing
        outcomes[index] = Outcome(end.value, [])
        return None


def _resume(running: _Running, reply: Reply, outcomes: list[Outcome | None]) -> bool:
    """Send the reply; True where the item asks again."""
    running.steps.append(Step(running.prompt, reply.text))
    if reply.fault:
        running.faults.append(reply.fault)
    try:
        running.prompt = running.item.send(reply.text)
        return True
    except StopIteration as end:
        verdict: Verdict = end.value
        if any(points < of for points, of in verdict.counts.values()):
            verdict.faults += [f for f in dict.fromkeys(running.faults) if f not in verdict.faults]
        outcomes[running.index] = Outcome(verdict, running.steps)
        return False


def _check(outcomes: Sequence[Outcome], count: int) -> None:
    """Two items of one id could not be told apart when two evaluations are compared."""
    ids = [o.verdict.id for o in outcomes]
    if len(ids) != count or len(set(ids)) != count:
        repeated = next((i for i in ids if ids.count(i) > 1), "none")
        raise RuntimeError(f"{count} items gave {len(ids)} verdicts; repeated id: {repeated}")


def run_benchmark(
    benchmark: Benchmark, model: AnswerModel, *, at_once: int = AT_ONCE, quiet: bool = False
) -> list[Outcome]:
    """`run_items` with a bar on standard error."""
    with progress_bar(benchmark.name, len(benchmark.items), quiet) as advance:
        return run_items(benchmark.items, model, at_once=at_once, advance=advance)


@contextmanager
def progress_bar(name: str, items: int, quiet: bool) -> Iterator[Advance]:
    """Items done of all, answers so far, time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, answers = Console(stderr=True), 0
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[answers]} answers"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(name, total=items, answers=0)

        def advance(new_answers: int, new_verdicts: int) -> None:
            nonlocal answers
            answers += new_answers
            bar.update(task, advance=new_verdicts, answers=answers)

        yield advance


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]
