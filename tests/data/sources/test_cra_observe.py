"""Which records an observation shows."""

from __future__ import annotations

import json

from coalm_nemo.data.sources.cra.dialogue import Act
from coalm_nemo.data.sources.cra.observe import differences, observation, spoken_of, status_of, with_others

RECORDS = [{"name": name, "street": street} for name, street in zip("abcdef", "uvwxyz", strict=True)]


def act(name: str, slot: str = "", *values: str) -> Act:
    return Act(name, slot, values, values)


def test_the_offered_record_comes_first_and_the_best_others_follow() -> None:
    first = spoken_of(RECORDS, [[act("OFFER", "name", "e")]])
    assert [r["name"] for r in with_others(RECORDS, first)] == ["e", "a", "b"]


def test_records_that_later_turns_speak_of_are_shown() -> None:
    later = [[act("OFFER", "name", "b")], [act("OFFER", "name", "f")], [act("INFORM", "street", "x")]]
    assert [r["name"] for r in with_others(RECORDS, spoken_of(RECORDS, later))] == ["b", "f", "d"]


def test_several_values_of_one_slot_offer_several_records() -> None:
    assert [r["name"] for r in spoken_of(RECORDS, [[act("OFFER", "name", "f", "a", "c", "d")]])] == ["a", "c", "d", "f"]


def test_no_result_and_failure_are_shown_as_they_are() -> None:
    shown = json.loads(observation([], 0, status_of([act("NOTIFY_FAILURE")])))
    assert shown == {"status": "failure", "total": 0, "results": []}
    assert "status" not in json.loads(observation(RECORDS, 6, status_of([act("OFFER", "name", "a")])))


def test_what_differs_from_the_request() -> None:
    assert differences({"name": "a", "street": "zz", "other": "1"}, RECORDS) == {"street": "u"}
    assert differences({"name": "a"}, []) == {}
