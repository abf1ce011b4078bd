"""A small SGD-like set in text of our own: one service that finds a workshop and books a repair."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[3]
SGD = REPOSITORY / ".." / "shared/data/sgd"
MULTIWOZ = REPOSITORY / ".." / "shared/data/multiwoz"
needs_sgd = pytest.mark.skipif(not SGD.is_dir(), reason="needs Schema-Guided Dialogue in ../shared/data/sgd")
needs_multiwoz = pytest.mark.skipif(not MULTIWOZ.is_dir(), reason="needs MultiWOZ's schema in ../shared/data/multiwoz")


def slot(name: str, values: list[str] | None = None) -> dict[str, Any]:
    return {"name": name, "description": name, "is_categorical": bool(values), "possible_values": values or []}


SCHEMA: list[dict[str, Any]] = [
    {
        "service_name": "Workshops_1",
        "description": "Bicycle workshops",
        "slots": [
            slot("city"),
            slot("workshop_name"),
            slot("street_address"),
            slot("date"),
            slot("number_of_bikes", ["1", "2", "3"]),
            slot("open_late", ["True", "False"]),
            slot("size", ["small", "large"]),
        ],
        "intents": [
            {
                "name": "FindWorkshop",
                "description": "Find a bicycle workshop.",
                "is_transactional": False,
                "required_slots": ["city"],
                "optional_slots": {"open_late": "dontcare", "size": "dontcare"},
            },
            {
                "name": "BookRepair",
                "description": "Book a repair",
                "is_transactional": True,
                "required_slots": ["workshop_name", "date", "number_of_bikes"],
                "optional_slots": {"open_late": "False"},
            },
        ],
    }
]

MILL = {"city": "Ghent", "workshop_name": 'Mill\'s "Wheel"', "street_address": "1 Canal Row", "size": "small"}
OTHER = {"city": "Ghent", "workshop_name": "Spoke", "street_address": "7 Hill", "size": "large"}


def act(
    name: str, where: str = "", values: list[str] | None = None, canonical: list[str] | None = None
) -> dict[str, Any]:
    return {"act": name, "slot": where, "values": values or [], "canonical_values": canonical or values or []}


def user(text: str, intent: str, state: dict[str, list[str]], *acts: dict[str, Any]) -> dict[str, Any]:
    frame = {
        "service": "Workshops_1",
        "actions": list(acts),
        "slots": [],
        "state": {"active_intent": intent, "requested_slots": [], "slot_values": state},
    }
    return {"speaker": "USER", "utterance": text, "frames": [frame]}


def system(text: str, *acts: dict[str, Any], call: Any = None, results: Any = None) -> dict[str, Any]:
    frame: dict[str, Any] = {"service": "Workshops_1", "actions": list(acts), "slots": []}
    if call:
        frame |= {"service_call": {"method": call[0], "parameters": call[1]}, "service_results": results}
    return {"speaker": "SYSTEM", "utterance": text, "frames": [frame]}


def _dialogue() -> dict[str, Any]:
    name, city = MILL["workshop_name"], {"city": ["Gent"]}
    offer = [act("OFFER", "workshop_name", [name]), act("OFFER", "city", ["Ghent"])]
    booked = city | {"workshop_name": [name], "date": ["tomorrow"], "number_of_bikes": ["2"]}
    booking = {"workshop_name": name, "date": "2019-03-02", "number_of_bikes": "2", "open_late": "False"}
    confirm = [
        act("CONFIRM", "workshop_name", [name]),
        act("CONFIRM", "date", ["tomorrow"], ["2019-03-02"]),
        act("CONFIRM", "number_of_bikes", ["2"]),
        act("CONFIRM", "open_late", ["False"]),
    ]
    turns = [
        user("My chain broke.", "FindWorkshop", {}, act("INFORM_INTENT", "intent", ["FindWorkshop"])),
        system("Oh no. Where are you?", act("REQUEST", "city")),
        user("In Gent,\nof course.", "FindWorkshop", city, act("INFORM", "city", ["Gent"], ["Ghent"])),
        system(
            f"Try {name} in Ghent.",
            *offer,
            call=("FindWorkshop", {"city": "Ghent"}),
            results=[OTHER, MILL, OTHER, OTHER],
        ),
        user("Where is that?", "FindWorkshop", city, act("REQUEST", "street_address")),
        system("1 Canal Row.", act("INFORM", "street_address", ["1 Canal Row"])),
        user(
            "Book it for two bikes, tomorrow.",
            "BookRepair",
            booked,
            act("SELECT"),
            act("INFORM_INTENT", "intent", ["BookRepair"]),
            act("INFORM", "number_of_bikes", ["2"]),
            act("INFORM", "date", ["tomorrow"], ["2019-03-02"]),
        ),
        system(f"{name}, tomorrow, 2 bikes, by daylight. Right?", *confirm),
        user("Right.", "BookRepair", booked | {"open_late": ["False"]}, act("AFFIRM")),
        system("Done.", act("NOTIFY_SUCCESS"), call=("BookRepair", booking), results=[MILL | {"date": "2019-03-02"}]),
        user("Bye, thanks.", "BookRepair", booked, act("THANK_YOU"), act("GOODBYE")),
        system("Ride safely.", act("GOODBYE")),
    ]
    return {"dialogue_id": "w_1", "services": ["Workshops_1"], "turns": turns}


def dialogue() -> dict[str, Any]:
    """A fresh copy, to be changed at will: a search (turn 3), a question (5), a confirmation (7), a booking (9)."""
    return copy.deepcopy(_dialogue())


def with_another_service() -> list[dict[str, Any]]:
    """The schema with a service that the dialogue is not about; one of its functions has the name of one that it is."""
    other = copy.deepcopy(SCHEMA[0]) | {"service_name": "Ferries_1"}
    other["intents"][0]["required_slots"] = ["city", "date"]
    other["intents"][1]["name"] = "BookFerry"
    return [other, *copy.deepcopy(SCHEMA)]


def write(folder: Path, dialogues: list[Any], schema: Any = None, schema_name: str = "schema.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / schema_name).write_text(json.dumps(SCHEMA if schema is None else schema))
    (folder / "dialogues_001.json").write_text(json.dumps(dialogues))
    return folder
