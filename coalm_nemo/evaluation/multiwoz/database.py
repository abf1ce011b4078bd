"""MultiWOZ's databases, indexed: a query is an intersection of sets, so that a train is found without reading 2,828."""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from coalm_nemo.errors import UserError
from coalm_nemo.evaluation.dialogue_states.fuzzy import partial_ratio
from coalm_nemo.evaluation.multiwoz.slots import DONTCARE, minutes, normalize

WITH_DATABASE = ("attraction", "hotel", "restaurant", "train")
SAME_NAME = 90
"""Least `partial_ratio` at which a name, food or station of a query is taken for one of the database, as in the standard
evaluation: "nandos" finds both Nandos."""
_FUZZY = {
    "attraction": ("name",),
    "hotel": ("name",),
    "restaurant": ("name", "food"),
    "train": ("departure", "destination"),
}
_HIDDEN = ("id", "location", "introduction", "signature", "takesbookings")
"""Fields that no dialogue speaks of; nested ones are left out too."""
_UNKNOWN = "?"
"""Meets every constraint, as in the standard evaluation."""

Record = Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Table:
    """One domain's records, each with its field names in lower case without spaces as `fields`."""

    domain: str
    records: Sequence[Record]
    """As they are shown: text fields with the file's own names."""
    fields: Sequence[Record]
    """Slot -> normalised value."""

    @property
    def key(self) -> str:
        return "trainID" if self.domain == "train" else "name"

    @cached_property
    def _by_value(self) -> dict[str, dict[str, frozenset[int]]]:
        found: dict[str, dict[str, set[int]]] = {}
        for number, record in enumerate(self.fields):
            for slot, value in record.items():
                found.setdefault(slot, {}).setdefault(value, set()).add(number)
        return {slot: {value: frozenset(ids) for value, ids in values.items()} for slot, values in found.items()}

    @cached_property
    def _by_time(self) -> dict[str, tuple[list[int], list[int]]]:
        """Times in order, and the records that have them."""
        ordered = {}
        for slot in ("leaveat", "arriveby"):
            times = sorted((minutes(r[slot]) or 0, n) for n, r in enumerate(self.fields) if slot in r)
            ordered[slot] = ([time for time, _ in times], [number for _, number in times])
        return ordered

    def query(self, constraints: Mapping[str, str]) -> list[int]:
        """Numbers of the records that meet all of `constraints` (slot without its domain -> value), in the file's order.

        `dontcare`, an empty value and a slot that no record has constrain nothing. A train leaves at `leaveat` or later and
        arrives at `arriveby` or earlier; a time that is none constrains nothing to leave and lets nothing arrive.
        """
        wanted = ((slot, normalize(slot, value)) for slot, value in constraints.items() if slot in self._by_value)
        return list(self._query(tuple(sorted((slot, value) for slot, value in wanted if value not in ("", DONTCARE)))))

    @lru_cache(maxsize=4096)  # noqa: B019  # a table lives as long as the process
    def _query(self, wanted: tuple[tuple[str, str], ...]) -> tuple[int, ...]:
        if not wanted:
            return tuple(range(len(self.records)))
        sets = sorted((self._meeting(slot, value) for slot, value in wanted), key=len)
        return tuple(sorted(frozenset.intersection(*sets)))

    @lru_cache(maxsize=4096)  # noqa: B019
    def _meeting(self, slot: str, value: str) -> frozenset[int]:
        if slot in ("leaveat", "arriveby"):
            times, numbers = self._by_time[slot]
            limit = minutes(value) or 0
            return frozenset(
                numbers[bisect_left(times, limit) :] if slot == "leaveat" else numbers[: bisect_right(times, limit)]
            )
        values = self._by_value[slot]
        met = [ids for held, ids in values.items() if held in (value, _UNKNOWN)]
        if slot in _FUZZY[self.domain]:
            met += [ids for held, ids in values.items() if held != value and partial_ratio(held, value) >= SAME_NAME]
        return frozenset().union(*met)

    def named(self, value: str) -> list[int]:
        """Records with exactly this name or train number; where there is none, those with one that is much like it."""
        wanted = normalize(self.key.lower(), value)
        exact = self._by_value[self.key.lower()].get(wanted, frozenset())
        return sorted(exact) or ([] if self.domain == "train" else self.query({"name": value}))


@dataclass(frozen=True)
class Database:
    tables: Mapping[str, Table]

    def query(self, domain: str, constraints: Mapping[str, str]) -> list[int]:
        """Empty for a domain without a database."""
        return self.tables[domain].query(constraints) if domain in self.tables else []


def read_database(directory: Path) -> Database:
    """attraction_db.json, hotel_db.json, restaurant_db.json, train_db.json. Raises UserError for a missing or broken one."""
    return Database({domain: _read_table(directory / f"{domain}_db.json", domain) for domain in WITH_DATABASE})


def _read_table(path: Path, domain: str) -> Table:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror or e}); MultiWOZ's release has it beside data.json") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not valid JSON ({e})") from e
    if not isinstance(raw, list) or not raw or not all(isinstance(record, dict) for record in raw):
        raise UserError(f"{path}: a MultiWOZ database is a JSON list of records")
    table = Table(domain, [_shown(record) for record in raw], [_fields(record) for record in raw])
    for number, record in enumerate(table.fields, 1):
        if table.key.lower() not in record:
            raise UserError(f"{path}: record {number} has no {table.key}")
    return table


def _shown(record: Mapping[str, Any]) -> Record:
    return {key: value for key, value in record.items() if isinstance(value, str) and value and key not in _HIDDEN}


def _fields(record: Mapping[str, Any]) -> Record:
    named = {key.lower().replace(" ", ""): value for key, value in record.items() if isinstance(value, str)}
    return {slot: value if value == _UNKNOWN else normalize(slot, value) for slot, value in named.items()}
