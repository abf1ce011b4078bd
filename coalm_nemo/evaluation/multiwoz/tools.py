"""The agent's tools: searches over the databases, bookings with a reference number that the same booking always gets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from coalm_nemo.data.sources.cra.observe import MAX_RECORDS, observation
from coalm_nemo.evaluation.calls import Call
from coalm_nemo.evaluation.dialogue_states.agent import Outcome
from coalm_nemo.evaluation.multiwoz.database import Database, Record
from coalm_nemo.evaluation.multiwoz.slots import DOMAINS, DONTCARE, normalize

TAKE_BACK = "none"
"""An argument with this value forgets what was said of it before."""


@dataclass(frozen=True)
class Tool:
    name: str
    domain: str
    arguments: tuple[str, ...]
    needed: tuple[str, ...] = ()
    """What a booking cannot do without."""

    @property
    def books(self) -> bool:
        return self.name.startswith("book_")

    @property
    def signature(self) -> str:
        """In the spelling of our rows from MultiWOZ 2.2, whose schema has `dontcare` as every default."""
        return f"{self.name}({', '.join(f'{name}={DONTCARE!r}' for name in self.arguments)})"


def _search(domain: str) -> Tool:
    return Tool(f"find_{domain}", domain, tuple(slot for slot in DOMAINS[domain] if not slot.startswith("book")))


TOOLS: dict[str, Tool] = {
    tool.name: tool
    for tool in (
        _search("restaurant"),
        Tool(
            "book_restaurant", "restaurant", ("name", "bookday", "bookpeople", "booktime"),
            ("bookday", "bookpeople", "booktime"),
        ),
        _search("hotel"),
        Tool(
            "book_hotel", "hotel", ("name", "bookday", "bookpeople", "bookstay"),
            ("bookday", "bookpeople", "bookstay"),
        ),
        _search("attraction"),
        _search("train"),
        Tool("book_train", "train", ("trainid", "bookpeople"), ("bookpeople",)),
        Tool("book_taxi", "taxi", DOMAINS["taxi"], ("departure", "destination")),
        _search("hospital"),
        Tool("find_police", "police", ()),
    )
}  # fmt: skip

SIGNATURES = "\n".join(tool.signature for tool in TOOLS.values())
RULES = (
    "Pass only what the user has settled: 'dontcare' where the user says that anything will do, 'none' for what the user "
    "takes back. Search again whenever the user adds or changes a detail; call a booking as soon as the user gives a detail "
    "of it, with all of its details so far, and it says which are missing. A booking without a name or train takes the "
    "first result of the last search."
)
VALUE_RULES = "Times are written HH:MM on the 24-hour clock, days as weekdays in full."

PLACES: dict[str, Record] = {
    "hospital": {
        "name": "Addenbrookes Hospital",
        "address": "Hills Road, Cambridge",
        "phone": "01223245151",
        "postcode": "cb20qq",
    },
    "police": {
        "name": "Parkside Police Station",
        "address": "Parkside, Cambridge",
        "phone": "01223358966",
        "postcode": "cb11jg",
    },
}
"""The one hospital and the one police station of MultiWOZ, which come without a database."""
_COLOURS = ("black", "white", "red", "yellow", "blue", "grey")
_CARS = ("toyota", "skoda", "bmw", "honda", "ford", "audi", "lexus", "volvo", "volkswagen", "tesla")


@dataclass
class Toolbox:
    """The tools of one dialogue: what they found last and what they booked."""

    database: Database
    last: dict[str, Sequence[int]] = field(default_factory=dict)
    """Domain -> records of its last search."""
    references: dict[str, list[str]] = field(default_factory=dict)
    """Domain -> reference numbers given; for a taxi its phone number."""

    def run(self, call: Call) -> Outcome:
        """Carries out a call. One that is not to be had says why, as an observation."""
        tool = TOOLS.get(call.name)
        if tool is None:
            return _refused("unknown_function", f"there is no function {call.name}")
        unknown = [name for name in call.arguments if name not in tool.arguments]
        if unknown:
            return _refused("unknown_argument", f"{tool.name} has no argument {unknown[0]}")
        if any(isinstance(value, list | dict) for value in call.arguments.values()):
            return _refused("argument_type", "every argument is one text or number")
        given = {name: normalize(name, argument_text(value)) for name, value in call.arguments.items()}
        given = {name: value for name, value in given.items() if value}
        return Outcome(self._book(tool, given) if tool.books else self._find(tool, given))

    def _find(self, tool: Tool, given: Mapping[str, str]) -> str:
        if tool.domain in PLACES:
            return observation([PLACES[tool.domain]], 1, "")
        table = self.database.tables[tool.domain]
        found = table.query(given)
        self.last[tool.domain] = found
        return observation([table.records[number] for number in found[:MAX_RECORDS]], len(found), "")

    def _book(self, tool: Tool, given: Mapping[str, str]) -> str:
        missing = [name for name in tool.needed if given.get(name, DONTCARE) == DONTCARE]
        if tool.name == "book_taxi" and not {"leaveat", "arriveby"} & {*given}:
            missing.append("leaveat or arriveby")
        if missing:
            return json.dumps({"status": "missing", "missing": missing})
        if tool.name == "book_taxi":
            return self._order_taxi(given)
        table = self.database.tables[tool.domain]
        wanted = given.get(table.key.lower(), DONTCARE)
        found = list(self.last.get(tool.domain, ())) if wanted == DONTCARE else table.named(wanted)
        if not found:
            return json.dumps({"status": "failure", "reason": f"which {tool.domain}? none is found"})
        booked = table.records[found[0]][table.key]
        reference = _reference(tool.domain, booked, given)
        self.references.setdefault(tool.domain, []).append(reference)
        return json.dumps({"status": "success", table.key: booked, "reference": reference}, ensure_ascii=False)

    def _order_taxi(self, given: Mapping[str, str]) -> str:
        seed = _digest("taxi", "", given)
        phone = f"07{seed % 10**9:09}"
        self.references.setdefault("taxi", []).append(phone)
        car = f"{_COLOURS[seed % len(_COLOURS)]} {_CARS[seed // 7 % len(_CARS)]}"
        return json.dumps({"status": "success", "type": car, "phone": phone})


def argument_text(value: Any) -> str:
    """A call's argument as a slot's value: True is yes, 2.0 is 2."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return TAKE_BACK
    return f"{value:g}" if isinstance(value, float) else str(value)


def _refused(fault: str, why: str) -> Outcome:
    return Outcome(json.dumps({"error": why}), fault)


def _digest(domain: str, key: str, given: Mapping[str, str]) -> int:
    text = json.dumps([domain, key, sorted(given.items())])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _reference(domain: str, key: str, given: Mapping[str, str]) -> str:
    """Seven letters or digits and a digit, much as MultiWOZ's own."""
    letters, number = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789", _digest(domain, key, given)
    return "".join(letters[number >> 5 * place & 31] for place in range(7)) + str(number % 10)
