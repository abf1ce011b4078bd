"""Tool lists and types from a schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coalm_nemo.data.sources.cra.schema import Slot, read_schema
from coalm_nemo.errors import UserError
from tests.data.sources.cra_world import SCHEMA, SGD, needs_sgd


def write(folder: Path, schema: Any) -> Path:
    path = folder / "schema.json"
    path.write_text(schema if isinstance(schema, str) else json.dumps(schema))
    return path


def test_signatures_with_and_without_optional_arguments(tmp_path: Path) -> None:
    schema = read_schema(write(tmp_path, SCHEMA))
    assert schema.signatures(False) == ["FindWorkshop(city)", "BookRepair(workshop_name, date, number_of_bikes)"]
    assert schema.signatures(True)[0] == "FindWorkshop(city, open_late='dontcare', size='dontcare')"
    assert schema.signatures(True)[1].endswith("number_of_bikes, open_late=False)")


@needs_sgd
def test_sgd_train_has_the_published_51_signatures() -> None:
    schema = read_schema(SGD / "train/schema.json")
    assert len(schema.slots) == 26 and len(schema.functions) == 53
    signatures = schema.signatures(False)
    assert len(signatures) == len(set(signatures)) == 51
    assert signatures[0] == "CheckBalance(account_type)" and signatures[-1] == "GetWeather(city)"
    find = (
        "FindRestaurants(cuisine, city, price_range='dontcare', has_live_music='dontcare', serves_alcohol='dontcare')"
    )
    assert find in schema.signatures(True)


@pytest.mark.parametrize(
    ("values", "text", "typed"),
    [
        (("1", "2"), "2", 2),
        (("1", "2"), "dontcare", "dontcare"),
        (("01", "2"), "2", "2"),
        (("True", "False"), "False", False),
        (("True", "False"), "dontcare", "dontcare"),
        (("True", "False", "maybe"), "True", "True"),
        ((), "7", "7"),
    ],
)
def test_types_follow_the_possible_values(values: tuple[str, ...], text: str, typed: object) -> None:
    value = Slot("s", bool(values), values).typed(text)
    assert value == typed and type(value) is type(typed)


@pytest.mark.parametrize(
    "schema", ["{", [], {}, [{"slots": []}], [3], [{"service_name": "a", "slots": [3], "intents": []}]]
)
def test_a_bad_schema_is_one_sentence_naming_the_file(schema: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"schema\.json"):
        read_schema(write(tmp_path, schema))


def test_an_intent_with_an_unknown_slot_is_refused(tmp_path: Path) -> None:
    intent = SCHEMA[0]["intents"][0] | {"required_slots": ["colour"]}
    with pytest.raises(UserError, match="colour"):
        read_schema(write(tmp_path, [SCHEMA[0] | {"intents": [intent]}]))
