"""The demo's world and its dialogues: every call really executes, every state is what the user said."""

from __future__ import annotations

import pytest

from coalm_nemo.demo.dialogues import Dialogue, generate_dialogues
from coalm_nemo.demo.rows import training_rows
from coalm_nemo.demo.values import Split
from coalm_nemo.demo.world import SERVICES, TOOLS, Call, Database

SPLITS: tuple[Split, ...] = ("train", "combinations", "words", "names")


def dialogues(split: Split, count: int = 150) -> list[Dialogue]:
    return list(generate_dialogues(4, count, split))


@pytest.mark.parametrize("split", SPLITS)
def test_each_call_returns_the_observation_shown(split: Split) -> None:
    calls = 0
    for dialogue in dialogues(split):
        for turn in dialogue.turns:
            if turn.call is not None:
                assert dialogue.database.execute(turn.call) == turn.observation
                assert tuple(turn.call.arguments) == TOOLS[turn.call.name].arguments
                assert TOOLS[turn.call.name] in dialogue.tools
                calls += 1
    assert calls > 150


@pytest.mark.parametrize("split", SPLITS)
def test_each_state_is_what_the_user_gave(split: Split) -> None:
    for dialogue in dialogues(split):
        said: dict[str, str | int] = {}
        for turn in dialogue.turns:
            said |= turn.given
            assert turn.state == said
            if turn.call is not None:
                assert turn.call.arguments.items() <= said.items()
            for slot, value in turn.given.items():
                text = turn.user if slot != dialogue.service.entity else _shown_before(dialogue, turn.user)
                assert str(value).lower() in text.lower()


def _shown_before(dialogue: Dialogue, user: str) -> str:
    """What the observations before this turn showed: the entity a user accepts is named there."""
    place = next(i for i, t in enumerate(dialogue.turns) if t.user == user)
    return " ".join(str(t.observation) for t in dialogue.turns[:place])


def test_every_service_and_every_kind_of_turn_occurs() -> None:
    seen = dialogues("train", 300)
    assert {d.service.domain for d in seen} == set(SERVICES)
    assert {t.kind for d in seen for t in d.turns} == {"ask", "search", "book", "detail", "refuse", "thanks"}
    assert any(t.observation == {"count": 0} for d in seen for t in d.turns)


def test_same_seed_same_dialogues() -> None:
    assert training_rows(7, 40) == training_rows(7, 40)
    assert training_rows(7, 40) != training_rows(8, 40)
    late = next(generate_dialogues(7, 1, "train", start=12))
    assert [t.user for t in late.turns] == [t.user for t in list(generate_dialogues(7, 13, "train"))[12].turns]


def test_database_refuses_what_is_no_call_of_its_own() -> None:
    with pytest.raises(ValueError, match="no such call"):
        Database().execute(Call("Delete", {}))
    with pytest.raises(ValueError, match="no such call"):
        Database().execute(Call("GetWeather", {"city": "Balto"}))


def test_booking_needs_a_record_that_exists() -> None:
    database = Database()
    call = Call("BuyTickets", {"train": "AB123", "tickets": 2})
    assert database.execute(call) == {"booked": False}
    database.records["trains"].append({"train": "AB123"})
    assert database.execute(call)["booked"] is True
