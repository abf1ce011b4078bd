"""MultiWOZ dialogues: data.json (releases 2.0 to 2.4) and release 2.2's files in SGD's layout."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coalm_nemo.data.sources.cra.dialogue import Dialogue, Frame, read_dialogues
from coalm_nemo.errors import UserError
from coalm_nemo.evaluation.dialogue_states.scores import GoldState
from coalm_nemo.evaluation.multiwoz.slots import DOMAINS, SLOTS, normalize

WHERE_FROM = (
    "MultiWOZ 2.4's directory with data.json and testListFile.json (data/MULTIWOZ2.4.zip of github.com/smartyfh/MultiWOZ2.4; "
    "2.1 and 2.2 are in github.com/budzianowski/multiwoz) beside attraction_db.json, hotel_db.json, restaurant_db.json and "
    "train_db.json"
)
SPLIT_LISTS = {"test": "testListFile", "val": "valListFile"}
REQUESTABLE = ("phone", "address", "postcode")
_BOOK = {"day": "bookday", "people": "bookpeople", "stay": "bookstay", "time": "booktime"}
_ALTERNATIVES = re.compile(r"[|<>]")


@dataclass(frozen=True)
class Goal:
    """What the user was told to find, in one domain."""

    constraints: Mapping[str, str]
    """Slot without its domain -> value."""
    requested: frozenset[str]
    """Of phone, address, postcode, trainid and reference: what Success asks for."""


@dataclass(frozen=True)
class Booking:
    """A booking that the file's system made in a turn."""

    domain: str
    key: str
    """Name or train number, where the file has it."""
    reference: str


@dataclass(frozen=True)
class WozTurn:
    user: str
    system: str
    state: GoldState
    """After the user's words. Values as in the file, in the order of its alternatives; slots without a value are absent."""
    booked: tuple[Booking, ...] = ()
    """New in this turn."""


@dataclass(frozen=True)
class WozDialogue:
    id: str
    """In lower case, without `.json`."""
    turns: tuple[WozTurn, ...]
    goals: Mapping[str, Goal] | None = None
    """By domain; release 2.2 has none."""


def read_split(directory: Path, split: str) -> list[WozDialogue]:
    """The dialogues of a split, in the order of the file that lists them. Raises UserError that says what is missing."""
    if (directory / "data.json").is_file():
        found = _read_data_json(directory, split)
    elif (directory / split).is_dir() or any(directory.glob("dialogues_*.json")):
        found = _read_sgd_layout(directory / split if (directory / split).is_dir() else directory)
    else:
        raise UserError(f"{directory} has neither data.json nor dialogues_*.json; it must be {WHERE_FROM}")
    if not found:
        raise UserError(f"the {split} split of {directory} has no dialogue")
    return found


def _read_data_json(directory: Path, split: str) -> list[WozDialogue]:
    path = directory / "data.json"
    raw = _read_json(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: MultiWOZ's data.json is a JSON object of dialogues, not {type(raw).__name__}")
    names = _names(directory, split, raw)
    absent = next((name for name in names if name not in raw), None)
    if absent is not None:
        raise UserError(
            f"{path} has no dialogue {absent}, which the {split} split lists; are both of the same release?"
        )
    return [_checked(path, name, raw[name]) for name in names]


def _names(directory: Path, split: str, raw: Mapping[str, Any]) -> list[str]:
    """A split's dialogues; `train` is what neither list has, `all` everything."""
    if split == "all":
        return list(raw)
    if split != "train":
        return _listed(directory, SPLIT_LISTS[split])
    others = {name for stem in SPLIT_LISTS.values() for name in _listed(directory, stem)}
    return [name for name in raw if name not in others]


def _listed(directory: Path, stem: str) -> list[str]:
    """The names in `stem`.json or .txt: a JSON list in some releases, one name a line in others."""
    places = [directory / f"{stem}{suffix}" for suffix in (".json", ".txt")]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise UserError(f"{directory} has no {stem}.json, which lists a split's dialogues; --data must be {WHERE_FROM}")
    text = _read_text(path)
    try:
        names = json.loads(text) if text.lstrip().startswith("[") else text.split()
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON ({e})") from e
    return [name if name.endswith(".json") else f"{name}.json" for name in map(str, names)]


def _checked(path: Path, name: str, raw: Any) -> WozDialogue:
    try:
        return _dialogue(name, raw)
    except KeyError as e:
        raise UserError(f"{path}: dialogue {name} lacks {e}") from e
    except (TypeError, AttributeError, ValueError) as e:
        raise UserError(f"{path}: dialogue {name} is not in MultiWOZ's layout ({e})") from e


def _dialogue(name: str, raw: Mapping[str, Any]) -> WozDialogue:
    log = raw["log"]
    turns, seen = [], set[Booking]()
    for number in range(0, len(log) - 1, 2):
        metadata = log[number + 1]["metadata"]
        if not isinstance(metadata, dict) or not metadata:
            raise ValueError(f"entry {number + 1} of its log is a system's and has no metadata")
        booked = [b for b in _bookings(metadata) if b not in seen]
        seen.update(booked)
        user, system = (" ".join(log[number + i]["text"].split()) for i in (0, 1))
        turns.append(WozTurn(user, system, _metadata_state(metadata), tuple(booked)))
    if not turns:
        raise ValueError("its log has no turn")
    goals = {d: _goal(raw["goal"][d]) for d in (*DOMAINS, "police") if raw["goal"].get(d)}
    return WozDialogue(_id(name), tuple(turns), goals)


def _id(name: str) -> str:
    return name.removesuffix(".json").lower()


def _metadata_state(metadata: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    state: dict[str, tuple[str, ...]] = {}
    for domain, slots in DOMAINS.items():
        held = metadata.get(domain, {})
        values = {name.lower(): value for name, value in held.get("semi", {}).items()}
        values |= {_BOOK[name]: value for name, value in held.get("book", {}).items() if name in _BOOK}
        state |= {f"{domain}-{slot}": _alternatives(slot, values.get(slot, "")) for slot in slots}
    return {slot: values for slot, values in state.items() if values}


def _alternatives(slot: str, value: Any) -> tuple[str, ...]:
    """`cheap|moderate` (2.0 to 2.2 write `cheap>moderate` too) -> both, in order; those that say nothing are left out."""
    texts = value if isinstance(value, list) else [value]
    parts = [part.strip() for text in texts for part in _ALTERNATIVES.split(str(text))]
    return tuple(dict.fromkeys(part for part in parts if normalize(slot, part)))


def _bookings(metadata: Mapping[str, Any]) -> list[Booking]:
    return [
        Booking(domain, str(entry.get("name") or entry.get("trainID") or ""), str(entry["reference"]))
        for domain in ("restaurant", "hotel", "train")
        for entry in metadata.get(domain, {}).get("book", {}).get("booked", [])
        if entry.get("reference")
    ]


def _goal(raw: Mapping[str, Any]) -> Goal:
    """As the standard evaluation reads it: the last version of what is wanted; a reference is wanted where one books."""
    asked = {str(name).lower() for name in raw.get("reqt", ())}
    requested = asked & {*REQUESTABLE, "trainid"} | ({"reference"} if raw.get("book") else set())
    constraints = {name.lower().replace(" ", ""): str(value) for name, value in raw.get("info", {}).items()}
    return Goal(constraints, frozenset(requested))


def _read_sgd_layout(directory: Path) -> list[WozDialogue]:
    files = sorted(directory.glob("dialogues_*.json"))
    return [_from_sgd_layout(dialogue, file) for file in files for dialogue in read_dialogues(file)]


def _from_sgd_layout(dialogue: Dialogue, file: Path) -> WozDialogue:
    """Its states stand at the user's turns, each with a frame for every service."""
    pairs = zip(dialogue.turns[::2], dialogue.turns[1::2], strict=False)
    turns = tuple(WozTurn(user.utterance, system.utterance, _frames_state(user.frames)) for user, system in pairs)
    if not turns or not any(frame.state is not None for turn in dialogue.turns for frame in turn.frames):
        raise UserError(f"{file}: dialogue {dialogue.dialogue_id} has no state at any turn, as release 2.2 would")
    return WozDialogue(_id(dialogue.dialogue_id), turns)


def _frames_state(frames: tuple[Frame, ...]) -> dict[str, tuple[str, ...]]:
    state: dict[str, tuple[str, ...]] = {}
    for frame in frames:
        for slot, values in (frame.state or {}).items():
            if slot in SLOTS and (found := _alternatives(slot.partition("-")[2], values)):
                state[slot] = found
    return state


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not valid JSON ({e})") from e


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror or e})") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text") from e
