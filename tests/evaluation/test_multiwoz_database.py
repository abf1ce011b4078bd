"""MultiWOZ's databases, tools and what responses mention; the real databases where they are at hand."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coalm_nemo.evaluation.calls import Call
from coalm_nemo.evaluation.multiwoz.database import Database, read_database
from coalm_nemo.evaluation.multiwoz.inform import active_domains
from coalm_nemo.evaluation.multiwoz.mentions import MentionFinder
from coalm_nemo.evaluation.multiwoz.slots import minutes, normalize
from coalm_nemo.evaluation.multiwoz.tools import SIGNATURES, Toolbox
from tests.evaluation.woz_world import REAL_DATABASES, write_databases

needs_databases = pytest.mark.skipif(not REAL_DATABASES.is_dir(), reason="needs MultiWOZ in ../shared/data/multiwoz")
TIME = st.builds("{:02}:{:02}".format, st.integers(0, 24), st.integers(0, 59))


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Database:
    folder = tmp_path_factory.mktemp("databases")
    write_databases(folder)
    return read_database(folder)


@pytest.fixture(scope="module")
def real() -> Database:
    return read_database(REAL_DATABASES)


@pytest.mark.parametrize(
    ("domain", "constraints", "found"),
    [
        ("restaurant", {}, [0, 1, 2, 3]),
        ("restaurant", {"food": "Thai", "area": "dontcare"}, [0, 3]),
        ("restaurant", {"food": "thai", "area": "center"}, [3]),
        ("restaurant", {"name": "table"}, [1, 2]),
        ("hotel", {"internet": "free", "type": "guest houses"}, [0]),
        ("hotel", {"bookday": "monday", "stars": "four"}, [0, 3]),
        ("attraction", {"type": "zoo"}, []),
        ("train", {"departure": "cambridge", "leaveat": "09:00"}, [0, 1]),
        ("train", {"departure": "cambridge", "leaveat": "9:01 am"}, [1]),
        ("train", {"arriveby": "11:17", "day": "Mon"}, [0, 1]),
        ("train", {"arriveby": "07:49"}, []),
        ("taxi", {"departure": "lido"}, []),
    ],
)
def test_queries(database: Database, domain: str, constraints: dict[str, str], found: list[int]) -> None:
    assert database.query(domain, constraints) == found


@needs_databases
@settings(deadline=None)
@given(st.data(), TIME, TIME)
def test_the_index_finds_what_reading_every_train_finds(
    real: Database, data: st.DataObject, leave: str, arrive: str
) -> None:
    table = real.tables["train"]
    like = table.fields[data.draw(st.integers(0, len(table.fields) - 1))]
    slots = data.draw(st.sets(st.sampled_from(["day", "departure", "destination"])))
    wanted = {slot: like[slot] for slot in slots} | {"leaveat": leave, "arriveby": arrive}
    expected = [
        number
        for number, train in enumerate(table.fields)
        if all(train[slot] == like[slot] for slot in slots)
        and (minutes(train["leaveat"]) or 0) >= (minutes(leave) or 0)
        and (minutes(train["arriveby"]) or 0) <= (minutes(arrive) or 0)
    ]
    assert real.query("train", wanted) == expected


@needs_databases
def test_every_name_and_attribute_of_the_real_databases_is_found_in_a_sentence(real: Database) -> None:
    finder = MentionFinder(real)
    for domain, table in real.tables.items():
        for number, record in list(enumerate(table.records))[:200]:
            for key in {"name", "phone", "postcode", "address", "trainID"} & set(record):
                found = finder.find(f"Well, it is {record[key]}.", {})
                told = {(m.kind, m.domain) for m in found if number in m.records}
                assert (key.lower(), domain) in told, (domain, record[key])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("How about the Golden Fork?", {("name", "restaurant")}),
        ("It's at 4 Market Square, CB1 4DD.", {("address", "restaurant"), ("postcode", "restaurant")}),
        ("Their phone is 01223 000004.", {("phone", "restaurant")}),
        ("Oak Guesthouse", {("name", "hotel")}),
        ("Take tr 1003.", {("trainid", "train")}),
        ("Addenbrookes is on Hills Road, Cambridge; call 01223245151.", {("address", "hospital"), ("phone", "hospital")}),
        ("Your code is AB12CD34.", {("reference", "hotel")}),
        ("The place has a table by the river, call 0199.", set()),
    ],
)  # fmt: skip
def test_mentions(database: Database, words: str, told: set[tuple[str, str]]) -> None:
    found = MentionFinder(database).find(words, {"hotel": ["AB12CD34"]})
    assert {(mention.kind, mention.domain) for mention in found} == told


def test_delexicalized_text(database: Database) -> None:
    text = "The Golden Fork, 01223 000001, at 18:30; reference AB12CD34, CB1 1AA."
    assert MentionFinder(database).delexicalized(text).split() == [
        "[name]", "[phone]", ",", "at", "[time]", ";", "reference", "[reference]", ",", "[postcode]", ".",
    ]  # fmt: skip


def test_tools(database: Database) -> None:
    box = Toolbox(database)

    def run(function: str, **arguments: object) -> dict:
        return json.loads(box.run(Call(function, dict(arguments))).observation)

    assert run("find_restaurant", food="thai")["total"] == 2
    assert run("book_restaurant", bookday="monday")["missing"] == ["bookpeople", "booktime"]
    details = {"bookday": "monday", "bookpeople": 2, "booktime": "6 pm"}
    booked = run("book_restaurant", **details)
    assert booked["name"] == "the golden fork", "without a name, the first that was found"
    assert run("book_restaurant", **details) == booked, "the same booking has the same reference"
    assert run("book_restaurant", name="Blue Lotus", **details)["reference"] != booked["reference"]
    assert run("book_hotel", bookday="monday", bookpeople=1, bookstay=1)["status"] == "failure"
    assert run("book_train", trainid="TR1004", bookpeople=1)["trainID"] == "TR1004"
    assert run("book_taxi", departure="lido", destination="ely")["missing"] == ["leaveat or arriveby"]
    assert run("book_taxi", departure="lido", destination="ely", leaveat="5 pm")["phone"] == box.references["taxi"][0]
    assert run("find_hospital")["results"][0]["postcode"] == "cb20qq" and run("find_police")["total"] == 1
    assert box.run(Call("find_boat", {})).fault == "unknown_function"
    assert box.run(Call("find_hotel", {"town": "x"})).fault == "unknown_argument"
    assert box.run(Call("find_hotel", {"area": ["north"]})).fault == "argument_type"
    assert "find_taxi" not in SIGNATURES and "book_train(trainid='dontcare', bookpeople='dontcare')" in SIGNATURES


def test_active_domains() -> None:
    hotel, train = {"hotel-area": "north"}, {"train-day": "monday"}
    states = [{}, hotel, hotel, {**hotel, **train, "hotel-stars": "4"}, {**hotel, **train, "hotel-stars": "4"}]
    assert active_domains(states) == ["", "hotel", "hotel", "hotel", "train"]


def test_the_shown_fields_have_no_inner_ones(database: Database) -> None:
    assert "id" not in database.tables["hotel"].records[0]
    assert normalize("name", database.tables["restaurant"].records[0]["name"]) == "golden fork"
