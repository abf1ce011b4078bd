"""MultiWOZ 2.2 -> CRA rows: calls derived from states, results looked up. Dialogues and databases are our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coalm_nemo.data.rows import Row
from coalm_nemo.data.sources.base import Dropped
from coalm_nemo.data.sources.cra.derived import search
from coalm_nemo.data.sources.cra.schema import read_schema
from coalm_nemo.data.sources.multiwoz import MultiwozSource
from coalm_nemo.errors import UserError
from tests.data.sources.cra_world import MULTIWOZ, needs_multiwoz, slot, write

HOTEL_SLOTS = {"hotel-pricerange": "dontcare", "hotel-stars": "dontcare", "hotel-parking": "dontcare"}
SCHEMA = [
    {
        "service_name": "hotel",
        "slots": [
            slot("hotel-pricerange", ["cheap", "expensive"]),
            slot("hotel-stars", ["3", "4"]),
            slot("hotel-parking", ["yes", "no"]),
            slot("hotel-bookday", ["monday"]),
            slot("hotel-name"),
        ],
        "intents": [
            {
                "name": name,
                "description": "search for a hotel",
                "is_transactional": name == "book_hotel",
                "required_slots": [],
                "optional_slots": HOTEL_SLOTS | {"hotel-bookday": "dontcare"},
            }
            for name in ("find_hotel", "book_hotel")
        ],
    },
    {
        "service_name": "train",
        "slots": [slot("train-departure"), slot("train-leaveat")],
        "intents": [
            {
                "name": "find_train",
                "description": "search for a train",
                "is_transactional": False,
                "required_slots": [],
                "optional_slots": {"train-departure": "dontcare", "train-leaveat": "dontcare"},
            }
        ],
    },
]
HOTELS = [
    {"name": "lamp inn", "pricerange": "cheap", "stars": "3", "parking": "yes", "id": "0", "location": [1, 2]},
    {"name": "old gate", "pricerange": "cheap", "stars": "4", "parking": "no", "id": "1", "price": {"single": "5"}},
]
TRAINS = [
    {"trainID": "TR1", "departure": "ely", "leaveAt": "09:11"},
    {"trainID": "TR2", "departure": "ely", "leaveAt": "10:11"},
]


def user(text: str, *frames: tuple[str, str, dict[str, list[str]]]) -> dict[str, Any]:
    made = [
        {"service": service, "state": {"active_intent": intent, "requested_slots": [], "slot_values": values}}
        for service, intent, values in frames
    ]
    return {"speaker": "USER", "utterance": text, "frames": made}


def system(text: str) -> dict[str, Any]:
    return {"speaker": "SYSTEM", "utterance": text, "frames": []}


CHEAP = {"hotel-pricerange": ["cheap", "low cost"]}
PARKING = CHEAP | {"hotel-parking": ["yes"]}
BOOKED = PARKING | {"hotel-bookday": ["monday"]}
ELY = {"train-departure": ["ely"], "train-leaveat": ["10:00"]}
DIALOGUE = {
    "dialogue_id": "M1.json",
    "services": ["hotel", "train"],
    "turns": [
        user("Hi, a cheap hotel please.", ("hotel", "find_hotel", CHEAP), ("train", "NONE", {})),
        system("The old gate is cheap, and so is the lamp inn."),
        user("I come by car.", ("hotel", "find_hotel", PARKING), ("train", "NONE", {})),
        system("Then the Lamp Inn it is."),
        user("Book it for monday.", ("hotel", "book_hotel", BOOKED), ("train", "NONE", {})),
        system("Booked, reference 7."),
        user("And a train from Ely after 10:00.", ("hotel", "NONE", BOOKED), ("train", "find_train", ELY)),
        system("TR2 leaves at 10:11."),
        user("Thanks, bye.", ("hotel", "NONE", BOOKED), ("train", "NONE", ELY)),
        system("Bye."),
    ],
}


@pytest.fixture
def databases(tmp_path: Path) -> Path:
    folder = tmp_path / "db"
    folder.mkdir()
    (folder / "hotel_db.json").write_text(json.dumps(HOTELS))
    (folder / "train_db.json").write_text(json.dumps(TRAINS))
    return folder


def make(folder: Path, dialogue: Any = DIALOGUE, **options: Any) -> dict[str, Row | Dropped]:
    source = MultiwozSource(str(write(folder / "mwz", [dialogue], SCHEMA)), **options)
    return {row.row_id: row for block in source.blocks() for row in source.rows(block, 0)}


def target(row: Row | Dropped) -> str:
    assert isinstance(row, Row), row
    return str(row.messages[1]["content"])


def test_a_changed_state_becomes_a_search(tmp_path: Path, databases: Path) -> None:
    rows = make(tmp_path, database=str(databases))
    assert target(rows["M1.json/1/action"]) == "Action: find_hotel(pricerange='cheap')"
    assert target(rows["M1.json/3/action"]) == "Action: find_hotel(pricerange='cheap', parking='yes')"
    assert target(rows["M1.json/7/action"]) == "Action: find_train(departure='ely', leaveat='10:00')"
    assert "M1.json/9/action" not in rows and isinstance(rows["M1.json/9/response"], Row)
    source = MultiwozSource(str(tmp_path / "mwz"), database=str(databases))
    assert source.counts(next(source.blocks()))["calls"] == 4


def test_results_come_from_the_database(tmp_path: Path, databases: Path) -> None:
    row = make(tmp_path, database=str(databases))["M1.json/3/response"]
    assert isinstance(row, Row)
    lines = row.messages[0]["content"].rsplit("Observation: ", 1)[1].split("\n")
    assert json.loads(lines[0]) == {
        "total": 1,
        "results": [{"name": "lamp inn", "pricerange": "cheap", "stars": "3", "parking": "yes"}],
    }
    assert "lamp inn" in lines[1]


def test_bookings_have_no_result_and_take_their_answer_along(tmp_path: Path, databases: Path) -> None:
    rows = make(tmp_path, database=str(databases))
    assert rows["M1.json/5/action"] == Dropped("no_result_for_booking", "M1.json/5/action")
    assert rows["M1.json/5/response"] == Dropped("call_dropped", "M1.json/5/response")


def test_without_a_database_no_call_can_be_made(tmp_path: Path, databases: Path) -> None:
    assert make(tmp_path)["M1.json/1/action"] == Dropped("no_database", "M1.json/1/action")
    (databases / "train_db.json").unlink()
    rows = make(tmp_path, database=str(databases))
    assert rows["M1.json/7/action"] == Dropped("no_database", "M1.json/7/action")
    with pytest.raises(UserError, match="not a directory"):
        make(tmp_path, database=str(tmp_path / "nowhere"))


def test_of_two_changed_domains_the_one_with_more_changes_is_called(tmp_path: Path, databases: Path) -> None:
    turns = [
        user(
            "A cheap hotel, and a train from Ely at 10:00.",
            ("hotel", "find_hotel", CHEAP),
            ("train", "find_train", ELY),
        ),
        system("TR2 goes then."),
    ]
    rows = make(tmp_path, DIALOGUE | {"turns": turns}, database=str(databases))
    assert target(rows["M1.json/1/action"]).startswith("Action: find_train")
    assert rows["M1.json/1/action2"] == Dropped("second_call_in_turn", "M1.json/1/action2")


def test_a_value_that_nobody_said_goes(tmp_path: Path, databases: Path) -> None:
    turns = [user("A train please.", ("train", "find_train", ELY)), system("TR2.")]
    rows = make(tmp_path, DIALOGUE | {"turns": turns}, database=str(databases))
    assert rows["M1.json/1/action"] == Dropped("argument_not_grounded", "M1.json/1/action")


@pytest.mark.parametrize(
    ("parameters", "names"),
    [
        ({"leaveat": "9:30"}, ["TR2"]),
        ({"leaveat": "09:00", "departure": "ELY"}, ["TR1", "TR2"]),
        ({"departure": "dontcare"}, ["TR1", "TR2"]),
        ({"departure": "norwich"}, []),
        ({"colour": "red"}, []),
    ],
)
def test_search(parameters: dict[str, str], names: list[str], databases: Path) -> None:
    assert [record["trainID"] for record in search(str(databases), "train", parameters)] == names


def test_tools_of_the_dialogue_are_of_the_services_it_wants_something_of(tmp_path: Path, databases: Path) -> None:
    hotels_only = DIALOGUE | {"turns": DIALOGUE["turns"][:6]}  # every turn has a frame of the train, without intent
    for dialogue, trains in ((DIALOGUE, True), (hotels_only, False)):
        rows = make(tmp_path, dialogue, database=str(databases), tools="dialogue")
        found = [
            row.messages[0]["content"] for row in rows.values() if isinstance(row, Row) and row.part == "cra_action"
        ]
        assert found and all("find_hotel(" in prompt for prompt in found)
        assert all(("find_train(" in prompt) == trains for prompt in found)


def test_the_schema_may_have_its_other_name_and_must_fit(tmp_path: Path) -> None:
    folder = write(tmp_path / "train", [DIALOGUE], SCHEMA, "schema_2.2.json")
    assert MultiwozSource(str(tmp_path)).files()[0].name == "schema_2.2.json"
    (folder / "dialogues_001.json").write_text(
        json.dumps([{**DIALOGUE, "turns": [user("x", ("boat", "NONE", {})), system("y")]}])
    )
    source = MultiwozSource(str(tmp_path))
    with pytest.raises(UserError, match=r"dialogue M1\.json: service boat"):
        list(source.rows(next(source.blocks()), 0))


@needs_multiwoz
def test_the_published_schema_and_databases(tmp_path: Path) -> None:
    schema = read_schema(MULTIWOZ / "schema_2.2.json", MultiwozSource("").rename)
    assert {"find_hotel", "find_train", "book_taxi"} <= schema.names
    assert search(str(MULTIWOZ), "hotel", {"pricerange": "cheap", "type": "guest house", "area": "centre"})
    trains = search(str(MULTIWOZ), "train", {"destination": "cambridge", "day": "monday", "arriveby": "08:00"})
    assert trains and all(record["arriveBy"] <= "08:00" for record in trains)
