"""Seeded multi-turn tool dialogues in the demo's world. Dialogue `index` is a pure function of (seed, split, index)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from coalm_nemo.demo import phrases
from coalm_nemo.demo.values import Split, Value, ValueSource, is_held_out
from coalm_nemo.demo.world import (
    SERVICES,
    SLOT_KINDS,
    Call,
    Database,
    Record,
    Service,
    Tool,
    draw_search,
    fill_database,
    make_source,
)

TurnKind = Literal["ask", "search", "book", "detail", "refuse", "thanks"]
"""What the assistant does in a turn; only `search` and `book` call a tool."""


@dataclass
class Turn:
    """One exchange. `given` is what the user said in it, `state` all that holds after it."""

    kind: TurnKind
    user: str
    thought: str
    system: str
    given: Record = field(default_factory=dict)
    state: Record = field(default_factory=dict)
    call: Call | None = None
    observation: dict[str, Any] | None = None
    reply_thought: str = ""


@dataclass
class Dialogue:
    """A whole conversation about one service, and the database its calls were answered from."""

    split: Split
    service: Service
    database: Database
    tools: tuple[Tool, ...]
    """The tools on offer in the prompts: the service's own, sometimes one of another service, in random order."""
    turns: list[Turn]
    rng: random.Random
    """Goes on to decide what rows are made of this dialogue."""


def generate_dialogues(seed: int, count: int, split: Split, start: int = 0) -> Iterator[Dialogue]:
    """Dialogues number `start` to `start + count - 1` of a split."""
    for index in range(start, start + count):
        yield _DialogueBuilder(make_source(seed, split, index), split).build()


def draw_chore(rng: random.Random, split: Split) -> str:
    """Something no tool can do ("paint the fence"); training and held-out splits share no chore."""
    while True:
        chore = f"{rng.choice(phrases.CHORE_VERBS)} the {rng.choice(phrases.CHORE_OBJECTS)}"
        if is_held_out(chore) == (split != "train"):
            return chore


def join_fragments(rng: random.Random, opening: str, values: Record) -> str:
    """One user sentence: the opening, then every value in its fragment, in random order."""
    slots = list(values)
    rng.shuffle(slots)
    said = [rng.choice(phrases.FRAGMENTS[s]).format(v=values[s]) for s in slots]
    return " ".join([opening, *said]) + rng.choice((".", ".", " please."))


class _DialogueBuilder:
    """Plays one dialogue turn by turn. It has at most one extra (change of mind, detail, refusal): rows stay short."""

    def __init__(self, source: ValueSource, split: Split) -> None:
        self.source, self.rng, self.split = source, source.rng, split
        self.service = self.rng.choice(list(SERVICES.values()))
        self.turns: list[Turn] = []
        self.state: Record = {}
        self.found: dict[str, Any] = {}
        self.asked = ""
        self.extra = self.rng.choice(("change", "rethink", "detail", "refuse", "none"))

    def build(self) -> Dialogue:
        first, final, changed = self._draw_goals()
        known = [first, final] if self.rng.random() < 0.9 or self.extra != "rethink" else [final]
        self.database = fill_database(self.source, self.service, known)
        self._ask_for(first, changed, final)
        if self.extra == "rethink":
            self._change(changed, final)
        if self.extra == "detail":
            self._detail()
        if self.service.book and self.found["count"] and len(self.turns) <= 3 and self.rng.random() < 0.8:
            self._book()
        self._close()
        return Dialogue(self.split, self.service, self.database, self._offer(), self.turns, self.rng)

    def _draw_goals(self) -> tuple[Record, Record, str]:
        """The search the user begins with, the one he ends with, and the slot in which they differ, if they do."""
        while True:
            goal = draw_search(self.source, self.service)
            assert goal is not None
            changed = self.rng.choice(list(goal))
            if self.extra not in ("change", "rethink"):
                return goal, goal, changed
            final = draw_search(self.source, self.service, {k: v for k, v in goal.items() if k != changed})
            if final is not None and final[changed] != goal[changed]:
                return goal, final, changed

    def _offer(self) -> tuple[Tool, ...]:
        others = [t for s in SERVICES.values() if s is not self.service for t in s.tools]
        tools = [*self.service.tools, *self.rng.sample(others, self.rng.choice((0, 0, 1)))]
        self.rng.shuffle(tools)
        return tuple(tools)

    def _ask_for(self, goal: Record, changed: str, final: Record) -> None:
        """The user gives the search's slots over one to three turns; with "change" he corrects one on the way."""
        slots = list(goal)
        self.rng.shuffle(slots)
        wants_change = self.extra == "change"
        said = self.rng.randint(1, len(slots) - 1 if wants_change else len(slots))
        if wants_change:
            slots.sort(key=lambda s: s != changed)
        given = {s: goal[s] for s in slots[:said]}
        opening = self.rng.choice(phrases.OPENINGS[self.service.domain])
        self._inform(join_fragments(self.rng, opening, given), given, self.service.find)
        if wants_change:
            self._change(changed, final)
        while self._missing(self.service.find):
            slot = self.asked
            given = {slot: (final if wants_change else goal)[slot]}
            self._inform(self._answer(slot, given[slot]), given, self.service.find)

    def _change(self, slot: str, final: Record) -> None:
        text = self.rng.choice(phrases.CHANGES).format(s=slot, v=final[slot])
        self._inform(text, {slot: final[slot]}, self.service.find)

    def _answer(self, slot: str, value: Value) -> str:
        fragment = self.rng.choice(phrases.FRAGMENTS[slot]).format(v=value)
        text = self.rng.choice(phrases.ANSWERS).format(f=fragment, v=value)
        return text[0].upper() + text[1:]

    def _book(self) -> None:
        """The user accepts what was found and gives the booking's slots over one or two turns."""
        entity = str(self.service.entity)
        slots = list(self.service.book_slots)
        self.rng.shuffle(slots)
        values = {s: self.source.draw(SLOT_KINDS[s]) for s in slots}
        said = len(slots) - (len(self.turns) < 3 and self.rng.random() < 0.5)  # a long dialogue gets no further turn
        given = {s: values[s] for s in slots[:said]}
        opening = self.rng.choice(phrases.BOOKINGS[self.service.domain])
        text = join_fragments(self.rng, opening, given)
        book = self.service.book
        assert book is not None
        self._inform(text, given | {entity: self.found[entity]}, book)
        while self._missing(book):
            slot = self.asked
            self._inform(self._answer(slot, values[slot]), {slot: values[slot]}, book)

    def _missing(self, tool: Tool) -> list[str]:
        return [a for a in tool.arguments if a not in self.state]

    def _inform(self, user: str, given: Record, tool: Tool) -> None:
        """Add a turn in which the user gives slots; the assistant asks for the next slot, or calls the tool."""
        self.state = _ordered(self.service, self.state | given)
        missing = self._missing(tool)
        if missing:
            self.asked = missing[0]
            thought = self._thought(phrases.ASK_THOUGHT.format(s=self.asked))
            system = self.rng.choice(phrases.ASKS).format(s=self.asked)
            self.turns.append(Turn("ask", user, thought, system, given, self.state))
            return
        self.asked = ""
        call = Call(tool.name, {a: self.state[a] for a in tool.arguments})
        observation = self.database.execute(call)
        searching = tool is self.service.find
        thought = self._thought(phrases.SEARCH_THOUGHT if searching else phrases.BOOK_THOUGHT)
        system = self._found(observation) if searching else self._booked(observation)
        self.turns.append(
            Turn(
                "search" if searching else "book",
                user,
                thought,
                system,
                given,
                self.state,
                call,
                observation,
                phrases.FOUND_THOUGHT,
            )
        )

    def _thought(self, plain: str) -> str:
        return phrases.NEUTRAL_THOUGHT if self.rng.random() < 0.6 else plain

    def _found(self, observation: dict[str, Any]) -> str:
        self.found = observation
        if not observation["count"]:
            return self.rng.choice(phrases.NOTHING_FOUND)
        return self.rng.choice(phrases.FOUND[self.service.domain]).format(**observation)

    def _booked(self, observation: dict[str, Any]) -> str:
        return self.rng.choice(phrases.BOOKED).format(**observation) if observation["booked"] else phrases.NOT_BOOKED

    def _detail(self) -> None:
        detail = self.rng.choice(self.service.details)
        user = self.rng.choice(phrases.DETAIL_QUESTIONS[detail])
        system = phrases.DETAIL_ANSWERS[detail].format(v=self.found[detail])
        self.turns.append(Turn("detail", user, phrases.DETAIL_THOUGHT, system, {}, self.state))

    def _close(self) -> None:
        if self.extra == "refuse" and len(self.turns) <= 3:
            chore = draw_chore(self.rng, self.split)
            user = self.rng.choice(phrases.CHORE_REQUESTS).format(c=chore)
            system = self.rng.choice(phrases.REFUSALS).format(c=chore)
            self.turns.append(Turn("refuse", user, phrases.NEUTRAL_THOUGHT, system, {}, self.state))
        elif len(self.turns) <= 3 and self.rng.random() < 0.4:
            user, system = self.rng.choice(phrases.THANKS), self.rng.choice(phrases.FAREWELLS)
            self.turns.append(Turn("thanks", user, phrases.NEUTRAL_THOUGHT, system, {}, self.state))


def _ordered(service: Service, state: Record) -> Record:
    """The state with its slots in the order of the tools' signatures."""
    return {a: state[a] for t in service.tools for a in t.arguments if a in state}
