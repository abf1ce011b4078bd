"""The demo's little world: five services with typed slots, and a database that a call really queries."""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from coalm_nemo.demo.values import Split, Value, ValueSource, is_held_out

Record = dict[str, Value]


@dataclass(frozen=True)
class Tool:
    """A function the assistant may call; every argument is required."""

    name: str
    arguments: tuple[str, ...]

    @property
    def signature(self) -> str:
        """`Name(argument, argument)`, as the prompts list it."""
        return f"{self.name}({', '.join(self.arguments)})"


@dataclass(frozen=True)
class Service:
    """One domain: a tool that searches, and mostly one that books what was found."""

    domain: str
    find: Tool
    book: Tool | None
    entity: str | None
    """The column that names a found record; it is the first argument of `book`."""
    details: tuple[str, ...]
    """Columns a search returns beside the entity, and a user may ask about."""

    @property
    def tools(self) -> tuple[Tool, ...]:
        return (self.find,) if self.book is None else (self.find, self.book)

    @property
    def book_slots(self) -> tuple[str, ...]:
        """What a user still has to say once something was found."""
        return () if self.book is None else self.book.arguments[1:]


SERVICES: dict[str, Service] = {
    s.domain: s
    for s in (
        Service(
            "tables",
            Tool("FindTables", ("city", "cuisine")),
            Tool("BookTable", ("name", "day", "time", "people")),
            "name",
            ("price", "phone"),
        ),
        Service(
            "trains",
            Tool("FindTrains", ("origin", "destination", "day")),
            Tool("BuyTickets", ("train", "tickets")),
            "train",
            ("leaves", "price"),
        ),
        Service(
            "hotels",
            Tool("FindHotels", ("city", "stars")),
            Tool("BookRoom", ("name", "date", "nights")),
            "name",
            ("price", "phone"),
        ),
        Service(
            "doctors",
            Tool("FindDoctors", ("specialty", "city")),
            Tool("BookVisit", ("doctor", "day", "time")),
            "doctor",
            ("phone", "floor"),
        ),
        Service("weather", Tool("GetWeather", ("city", "day")), None, None, ("sky", "degrees")),
    )
}
TOOLS: dict[str, Tool] = {t.name: t for s in SERVICES.values() for t in s.tools}
SERVICE_OF_TOOL: dict[str, Service] = {t.name: s for s in SERVICES.values() for t in s.tools}

SLOT_KINDS: dict[str, str] = {
    "city": "place", "cuisine": "cuisine", "day": "day", "time": "time", "people": "small", "origin": "place",
    "destination": "place", "tickets": "small", "stars": "stars", "date": "date", "nights": "small",
    "specialty": "specialty", "name": "venue", "train": "code", "doctor": "person", "price": "money",
    "phone": "phone", "leaves": "time", "floor": "small", "sky": "sky", "degrees": "money",
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A call of a tool with its arguments in the order of its signature."""

    name: str
    arguments: Mapping[str, Value]

    def render(self) -> str:
        """`Name(arg='text', n=2)`: strings as single-quoted Python literals, integers bare."""
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.arguments.items())})"


@dataclass
class Database:
    """Records by domain. A search returns the first match and how many there are; a booking needs a known entity."""

    records: dict[str, list[Record]] = field(default_factory=lambda: {d: [] for d in SERVICES})

    def execute(self, call: Call) -> dict[str, Any]:
        """Run a call. Raises ValueError for an unknown tool or wrong arguments."""
        tool = TOOLS.get(call.name)
        if tool is None or set(call.arguments) != set(tool.arguments):
            raise ValueError(f"no such call: {call.render()}")
        service = SERVICE_OF_TOOL[call.name]
        return self._search(service, call) if tool is service.find else self._book(service, call)

    def _search(self, service: Service, call: Call) -> dict[str, Any]:
        wanted = call.arguments.items()
        matches = [r for r in self.records[service.domain] if all(r[k] == v for k, v in wanted)]
        if not matches:
            return {"count": 0}
        columns = ([service.entity] if service.entity else []) + list(service.details)
        return {"count": len(matches)} | {c: matches[0][c] for c in columns}

    def _book(self, service: Service, call: Call) -> dict[str, Any]:
        entity = str(service.entity)
        if not any(r[entity] == call.arguments[entity] for r in self.records[service.domain]):
            return {"booked": False}
        return {"booked": True, "reference": 100 + zlib.crc32(call.render().encode()) % 900}


def combination_key(call: Call) -> str:
    """The canonical text of a search with all its values: what the "combinations" split holds out."""
    return call.render()


def draw_search(source: ValueSource, service: Service, keep: Record | None = None) -> Record | None:
    """Values for a search whose combination is on the split's side; `keep` fixes some of them.

    None if a hundred tries find none, as may be when all but a slot of few values is kept.
    """
    for _ in range(100):
        values = {s: (keep or {}).get(s, source.draw(SLOT_KINDS[s])) for s in service.find.arguments}
        places = [v for s, v in values.items() if SLOT_KINDS[s] == "place"]
        on_side = is_held_out(combination_key(Call(service.find.name, values))) == (source.split == "combinations")
        if len(set(places)) == len(places) and (on_side or source.split in ("words", "names")):
            return values
    return None


def fill_database(source: ValueSource, service: Service, goals: list[Record], others: int = 4) -> Database:
    """A database with one or two records for each goal in `goals`, and some others of the same service."""
    database = Database()
    for goal in goals:
        for _ in range(source.rng.choice((1, 1, 2, 3))):
            database.records[service.domain].append(_draw_record(source, service) | goal)
    for _ in range(others):
        database.records[service.domain].append(_draw_record(source, service))
    return database


def _draw_record(source: ValueSource, service: Service) -> Record:
    columns = service.find.arguments + ((service.entity,) if service.entity else ()) + service.details
    return {c: source.draw(SLOT_KINDS[c]) for c in columns}


def make_source(seed: int, split: Split, index: int) -> ValueSource:
    """The random source of one dialogue: a pure function of seed, split and index."""
    return ValueSource(random.Random(f"{seed}/{split}/{index}"), split)
