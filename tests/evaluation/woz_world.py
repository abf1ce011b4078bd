"""A MultiWOZ of our own: small databases, and a data.json of 55 dialogues in the layout of releases 2.1 to 2.4."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coalm_nemo.evaluation.base import Item, Prompt, Verdict
from coalm_nemo.evaluation.multiwoz.slots import DOMAINS, TRACKED

REPOSITORY = Path(__file__).parents[2]
REAL_DATABASES = REPOSITORY / ".." / "shared/data/multiwoz"

RESTAURANTS = [
    ("the golden fork", "north", "thai", "cheap", "1 mill road", "01223000001", "cb11aa"),
    ("river table", "centre", "italian", "expensive", "2 bridge street", "01223000002", "cb12bb"),
    ("north table", "north", "italian", "moderate", "3 hill road", "01223000003", "cb13cc"),
    ("blue lotus", "centre", "thai", "cheap", "4 market square, old town", "01223000004", "cb14dd"),
]
HOTELS = [
    ("oak guest house", "east", "yes", "yes", "cheap", "4", "guesthouse", "01223000011", "cb21aa"),
    ("hotel meridian", "centre", "yes", "no", "expensive", "5", "hotel", "01223000012", "cb22bb"),
    ("rose cottage", "north", "no", "yes", "moderate", "3", "guesthouse", "01223000013", "cb23cc"),
    ("the station inn", "south", "yes", "yes", "moderate", "4", "hotel", "01223000014", "cb24dd"),
]
ATTRACTIONS = [
    ("old mill museum", "west", "museum", "free", "01223000021", "cb31aa"),
    ("king street college", "centre", "college", "?", "01223000022", "cb32bb"),
    ("lido", "east", "swimmingpool", "3 pounds", "01223000023", "cb33cc"),
    ("arts cinema", "centre", "cinema", "7 pounds", "01223000024", "cb34dd"),
]
TRAINS = [
    ("TR1001", "cambridge", "ely", "monday", "09:00", "09:17"),
    ("TR1002", "cambridge", "ely", "monday", "11:00", "11:17"),
    ("TR1003", "ely", "cambridge", "tuesday", "14:00", "14:17"),
    ("TR1004", "cambridge", "norwich", "friday", "06:30", "07:50"),
]
FIELDS = {
    "restaurant": (RESTAURANTS, ("name", "area", "food", "pricerange", "address", "phone", "postcode")),
    "hotel": (
        HOTELS,
        ("name", "area", "internet", "parking", "pricerange", "stars", "type", "phone", "postcode"),
    ),
    "attraction": (ATTRACTIONS, ("name", "area", "type", "entrance fee", "phone", "postcode")),
    "train": (TRAINS, ("trainID", "departure", "destination", "day", "leaveAt", "arriveBy")),
}
_BOOK = {"bookday": "day", "bookpeople": "people", "bookstay": "stay", "booktime": "time"}
_SEMI = {"leaveat": "leaveAt", "arriveby": "arriveBy"}


@dataclass(frozen=True)
class Made:
    """A dialogue to be written: goals by domain as data.json has them, and its turns."""

    name: str
    goals: dict[str, dict[str, Any]]
    turns: list[tuple[str, str, dict[str, str], dict[str, dict[str, str]]]]
    """(user, system, changes of the state, bookings made by domain)."""


def say(user: str, system: str, state: dict[str, str] | None = None, **booked: dict[str, str]) -> Any:
    return user, system, state or {}, booked


def write_databases(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for domain, (rows, names) in FIELDS.items():
        records = [{"id": str(number), **dict(zip(names, row, strict=True))} for number, row in enumerate(rows)]
        (folder / f"{domain}_db.json").write_text(json.dumps(records))


def write_data(folder: Path, dialogues: Sequence[Made], split_of: Callable[[Made], str] = lambda made: "test") -> Path:
    """The directory of a release, databases included."""
    write_databases(folder)
    (folder / "data.json").write_text(json.dumps({made.name: as_json(made) for made in dialogues}))
    for split, stem in (("test", "testListFile"), ("val", "valListFile")):
        names = [made.name for made in dialogues if split_of(made) == split]
        (folder / f"{stem}.json").write_text("\n".join(names) + "\n")
    return folder


def as_json(made: Made) -> dict[str, Any]:
    state: dict[str, str] = {}
    booked: dict[str, dict[str, str]] = {}
    log = []
    for user, system, changes, bookings in made.turns:
        state |= changes
        booked |= bookings
        log += [{"text": user, "metadata": {}}, {"text": system, "metadata": _metadata(state, booked)}]
    return {"goal": {**{domain: {} for domain in DOMAINS}, **made.goals, "message": ["..."]}, "log": log}


def _metadata(state: dict[str, str], booked: dict[str, dict[str, str]]) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for domain, slots in DOMAINS.items():
        values = {slot: state.get(f"{domain}-{slot}", "") for slot in slots}
        book = {_BOOK[slot]: value for slot, value in values.items() if slot in _BOOK}
        semi = {_SEMI.get(slot, slot): value for slot, value in values.items() if slot not in _BOOK}
        metadata[domain] = {"book": {"booked": [booked[domain]] if domain in booked else [], **book}, "semi": semi}
    return metadata


def drive(item: Item, answer: Callable[[Prompt], str]) -> Verdict:
    """Runs one item to its verdict."""
    prompt = next(item)
    while True:
        try:
            prompt = item.send(answer(prompt))
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def replay(prompt: Prompt) -> str:
    return prompt.gold


def scripted(answers: Iterable[str]) -> Callable[[Prompt], str]:
    remaining = iter(answers)
    return lambda prompt: next(remaining)


def totals(verdicts: Iterable[Verdict]) -> dict[str, tuple[float, float]]:
    """Metric -> (points, out of), over all items."""
    sums: dict[str, tuple[float, float]] = {}
    for verdict in verdicts:
        for metric, (points, out_of) in verdict.counts.items():
            had, of = sums.get(metric, (0.0, 0.0))
            sums[metric] = (had + points, of + out_of)
    return sums


VALUES: dict[str, tuple[str, ...]] = {
    "attraction-area": ("west", "dontcare"),
    "attraction-name": ("lido", "old mill museum|old mill"),
    "attraction-type": ("museum", "swimmingpool"),
    "hotel-area": ("east", "north|centre"),
    "hotel-bookday": ("monday", "sunday"),
    "hotel-bookpeople": ("2", "8"),
    "hotel-bookstay": ("3", "1"),
    "hotel-internet": ("yes", "dontcare"),
    "hotel-name": ("oak guest house", "rose cottage|the rose cottage"),
    "hotel-parking": ("yes", "no"),
    "hotel-pricerange": ("cheap", "moderate"),
    "hotel-stars": ("4", "dontcare"),
    "hotel-type": ("guesthouse", "hotel"),
    "restaurant-area": ("north", "dontcare"),
    "restaurant-bookday": ("friday", "tuesday"),
    "restaurant-bookpeople": ("5", "1"),
    "restaurant-booktime": ("18:30", "12:15"),
    "restaurant-food": ("thai", "italian|pizza"),
    "restaurant-name": ("blue lotus", "river table|north table"),
    "restaurant-pricerange": ("cheap", "dontcare"),
    "taxi-arriveby": ("10:00", "23:45"),
    "taxi-departure": ("lido", "rose cottage"),
    "taxi-destination": ("blue lotus", "ely|ely station"),
    "taxi-leaveat": ("09:15", "17:00"),
    "train-arriveby": ("11:30", "08:00"),
    "train-bookpeople": ("3", "7"),
    "train-day": ("monday", "friday"),
    "train-departure": ("cambridge", "ely"),
    "train-destination": ("ely", "norwich"),
    "train-leaveat": ("08:30", "dontcare"),
}


def generated() -> Iterator[Made]:
    """45 dialogues over every slot with every kind of value. Values are already in their normal form."""
    slots = list(TRACKED)
    assert set(slots) == set(VALUES)
    for number in range(45):
        turns = []
        chosen = [slots[(7 * number + 11 * place) % len(slots)] for place in range(9)]
        for turn in range(3):
            changes = {slot: VALUES[slot][(number + turn) % 2] for slot in chosen[3 * turn : 3 * turn + 2]}
            if turn == 2 and number % 3 == 0:
                changes[chosen[0]] = ""  # the user takes something back
            turns.append(say(f"user {turn} of {number}", f"system {turn} of {number}", changes))
        yield Made(f"GEN{number:04}.json", {}, turns)
