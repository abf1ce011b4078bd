"""Calls for dialogues that have none: MultiWOZ 2.2 annotates states, so a changed state becomes a search and its result
is looked up. The outcome is a dialogue like SGD's, with acts, calls and results, for the same code to turn into rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from coalm_nemo.data.sources.cra.checks import tokens
from coalm_nemo.data.sources.cra.dialogue import NO_INTENT, Act, Dialogue, Frame, SourceTurn
from coalm_nemo.data.sources.cra.observe import Record
from coalm_nemo.data.sources.cra.schema import DONTCARE, Function, Schema
from coalm_nemo.errors import UserError

_UNSEEN = ("id", "introduction", "location", "signature")
"""Keys of database records that no dialogue speaks of."""


@dataclass(frozen=True)
class Candidate:
    """A domain whose state a user turn changed, as the call that it would be."""

    function: Function
    parameters: Mapping[str, str]
    changes: int


def without_booking(schema: Schema) -> Schema:
    """Searches without the slots of bookings (bookday, bookpeople), which no database can be searched for."""
    functions = {}
    for key, function in schema.functions.items():
        if function.name.startswith("find_"):
            optional = {slot: default for slot, default in function.optional.items() if not slot.startswith("book")}
            function = replace(function, optional=optional)
        functions[key] = function
    return Schema(functions, schema.slots)


def candidates(user: Sequence[Frame], states: Mapping[str, Mapping[str, list[str]]], schema: Schema) -> list[Candidate]:
    """Domains changed by a turn, the one with most changes first. `states` are those of the turn before."""
    found = []
    for frame in user:
        function = schema.functions.get((frame.service, frame.intent))
        if function is None or not frame.state:
            continue
        changed = [slot for slot in _changed(frame, states) if slot in function.arguments]
        if changed:
            first = {slot: values[0] for slot, values in frame.state.items() if values and slot in function.arguments}
            found.append(Candidate(function, first, len(changed)))
    return sorted(found, key=lambda candidate: -candidate.changes)


def _changed(frame: Frame, states: Mapping[str, Mapping[str, list[str]]]) -> list[str]:
    """Slots with a new value; a further spelling of the same value is none."""
    before = states.get(frame.service, {})
    return [
        slot for slot, values in (frame.state or {}).items() if values and not set(values) & set(before.get(slot, ()))
    ]


def with_calls(dialogue: Dialogue, schema: Schema, database: str) -> tuple[Dialogue, dict[int, tuple[str, ...]]]:
    """The dialogue with acts, calls and results; and the calls left out, as reasons by the system turn's number."""
    turns: list[SourceTurn] = []
    left_out: dict[int, tuple[str, ...]] = {}
    states: dict[str, Mapping[str, list[str]]] = {}
    intents: dict[str, str] = {}
    results: tuple[Record, ...] = ()
    active = next(iter(schema.slots))
    for number in range(1, len(dialogue.turns), 2):
        user, system = dialogue.turns[number - 1], dialogue.turns[number]
        _check_services(user.frames, schema)
        wanted = candidates(user.frames, states, schema)
        frames = tuple(_user_frame(frame, states, intents) for frame in user.frames if frame.intent != NO_INTENT)
        active = wanted[0].function.service if wanted else frames[0].service if frames else active
        fault = _fault(wanted[0], database) if wanted else ""
        answer = Frame(active, ())
        if wanted and not fault:
            results = tuple(search(database, active, wanted[0].parameters))
            answer = replace(answer, method=wanted[0].function.name, parameters=wanted[0].parameters, results=results)
        answer = replace(answer, acts=named(results, system.utterance))
        left_out[number] = ((fault,) if fault else ()) + ("second_call_in_turn",) * (len(wanted) - 1)
        turns += [replace(user, frames=frames or (Frame(active, ()),)), replace(system, frames=(answer,))]
        states |= {frame.service: frame.state or {} for frame in user.frames}
        intents |= {frame.service: frame.intent for frame in user.frames}
    return Dialogue(dialogue.dialogue_id, tuple(turns)), left_out


def _check_services(frames: Sequence[Frame], schema: Schema) -> None:
    for frame in frames:
        if frame.service not in schema.slots:
            raise UserError(f"service {frame.service} is not in the schema; is schema.json of the same release?")


def _user_frame(frame: Frame, states: Mapping[str, Mapping[str, list[str]]], intents: Mapping[str, str]) -> Frame:
    """Acts as SGD would have them: a new intent, new values, questions."""
    new = (Act("INFORM_INTENT", "intent", (frame.intent,), (frame.intent,)),) * (
        frame.intent != intents.get(frame.service)
    )
    values = [(slot, (frame.state or {})[slot][0]) for slot in _changed(frame, states)]
    informed = tuple(Act("INFORM", slot, (value,), (value,)) for slot, value in values)
    asked = tuple(Act("REQUEST", slot, (), ()) for slot in frame.requested)
    return replace(frame, acts=(*new, *informed, *asked))


def _fault(candidate: Candidate, database: str) -> str:
    if candidate.function.transactional:
        return "no_result_for_booking"
    return "" if database and _records(database, candidate.function.service) is not None else "no_database"


def named(results: Sequence[Record], utterance: str) -> tuple[Act, ...]:
    """The results that the system's words name, as an offer."""
    said = tokens(utterance)
    slot = "trainID" if results and "trainID" in results[0] else "name"
    names = tuple(dict.fromkeys(r[slot] for r in results if slot in r and tokens(r[slot]) in said))
    return (Act("OFFER", slot, names, names),) if names else ()


def search(database: str, domain: str, parameters: Mapping[str, str]) -> list[Record]:
    """Records of `<domain>_db.json` that meet every constraint. A train that leaves later or arrives earlier meets it."""
    records = _records(database, domain) or []
    return [record for record in records if all(_meets(record, slot, value) for slot, value in parameters.items())]


def _meets(record: Record, slot: str, value: str) -> bool:
    held = next((record[key] for key in record if _bare(key) == _bare(slot)), None)
    if value == DONTCARE or held is None:
        return value == DONTCARE
    if slot == "leaveat":
        return held.zfill(5) >= value.zfill(5)
    if slot == "arriveby":
        return held.zfill(5) <= value.zfill(5)
    return _bare(held) == _bare(value)


def _bare(text: str) -> str:
    """Letters and digits only: `guest house` is `guesthouse`."""
    return "".join(character for character in text.casefold() if character.isalnum())


@lru_cache(maxsize=32)
def _records(database: str, domain: str) -> list[Record] | None:
    """Text fields of the database's records; None where the domain has no database."""
    path = Path(database) / f"{domain}_db.json"
    if not Path(database).is_dir():
        raise UserError(
            f"database {database} is not a directory; it should hold hotel_db.json, train_db.json and so on"
        )
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON ({e})") from e
    if not isinstance(raw, list) or not all(isinstance(record, dict) for record in raw):
        raise UserError(f"{path}: a MultiWOZ database is a JSON list of records")
    return [_text_fields(record) for record in raw]


def _text_fields(record: dict[str, Any]) -> Record:
    return {key: value for key, value in record.items() if isinstance(value, str) and value and key not in _UNSEEN}
