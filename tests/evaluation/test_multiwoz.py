"""MultiWOZ: ten dialogues scored by hand, gold replay, damaged answers, bad input."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from coalm_nemo.errors import UserError
from coalm_nemo.evaluation.base import Prompt, Verdict
from coalm_nemo.evaluation.multiwoz.benchmark import load
from coalm_nemo.evaluation.options import EvalOptions
from tests.evaluation.woz_world import (
    Made,
    drive,
    generated,
    replay,
    say,
    scripted,
    totals,
    write_data,
)

THAI = {"restaurant-food": "thai", "restaurant-pricerange": "cheap", "restaurant-area": "north"}
THAI_GOAL = {"info": {"food": "thai", "pricerange": "cheap", "area": "north"}, "reqt": ["phone"]}
STAY = {"hotel-name": "oak guest house", "hotel-bookday": "monday", "hotel-bookpeople": "2", "hotel-bookstay": "3"}
OAK_GOAL = {"info": {"type": "guesthouse", "area": "east"}, "book": {"day": "monday", "people": "2", "stay": "3"}}

# name -> (dialogue, the model's answers, what they must score, each worked out in the comment above it).
# Scores: turns right for JGA, informed, successful.
WORKED: dict[str, tuple[Made, list[str], tuple[int, int, int]]] = {}


def worked(made: Made, answers: list[str], score: tuple[int, int, int]) -> None:
    WORKED[made.name] = (made, answers, score)


# 1. Both turns' states are right: 2. {thai, cheap, north} finds the golden fork alone, which is all that meets the goal:
# informed. Its phone, the only thing asked for, is told while the restaurant is spoken of: successful.
worked(
    Made(
        "PERFECT.json",
        {"restaurant": THAI_GOAL},
        [say("cheap thai in the north", "The Golden Fork.", THAI), say("their phone?", "It is 01223000001.")],
    ),
    [
        "Thought: I search.\nAction: find_restaurant(food='thai', pricerange='cheap', area='north')",
        "Thought: One.\nSystem: How about the Golden Fork?",
        "System: Its number is 01223 000001.",
    ],
    (2, 1, 1),
)
# 2. The same, but the phone told is of no restaurant: states 2, informed, not successful.
worked(
    Made(
        "NOPHONE.json",
        {"restaurant": THAI_GOAL},
        [say("cheap thai in the north", "The Golden Fork.", THAI), say("their phone?", "It is 01223000001.")],
    ),
    [
        "Action: find_restaurant(food='thai', pricerange='cheap', area='north')",
        "System: How about the golden fork?",
        "System: Its number is 01223 999999.",
    ],
    (2, 1, 0),
)
# 3. The area is wrong in the first turn (0) and put right in the second (1). In the first {thai, cheap, centre} offers the
# Blue Lotus; in the second {thai, cheap, north} offers the golden fork, and as the Lotus is not among that, it replaces it:
# informed. The phone is told: successful.
worked(
    Made(
        "CORRECTED.json",
        {"restaurant": THAI_GOAL},
        [
            say("cheap thai in the north", "The Golden Fork.", THAI),
            say("in the north!", "The Golden Fork, 01223000001."),
        ],
    ),
    [
        '[find_restaurant(food="thai", pricerange="cheap", area="centre")]',
        "System: Try the Blue Lotus.",
        "Action: find_restaurant(area='north')",
        "System: Then the golden fork, 01223000001.",
    ],
    (1, 1, 1),
)
# 4. The gold area is dontcare and the model leaves it out: 0 of 1. Thai and cheap are the golden fork and the Blue Lotus,
# the same two that meet the goal: informed. Nothing is asked for: successful.
worked(
    Made(
        "DONTCARE.json",
        {"restaurant": {"info": {"food": "thai", "pricerange": "cheap"}, "reqt": []}},
        [say("cheap thai anywhere", "The Blue Lotus.", {**THAI, "restaurant-area": "dontcare"})],
    ),
    ["Action: find_restaurant(food='thai', pricerange='cheap')", "System: The Blue Lotus is one of two."],
    (0, 1, 1),
)
# 5. Either name is right: 1 of 1. The goal names the place, so any offer will do: informed. Its postcode is told: successful.
worked(
    Made(
        "EITHER.json",
        {"restaurant": {"info": {"name": "river table"}, "reqt": ["postcode"]}},
        [say("the table", "It is CB12BB.", {"restaurant-name": "river table|the north table"})],
    ),
    ["Action: find_restaurant(name='The North Table')", "System: River Table is at CB1 2BB."],
    (1, 1, 1),
)
# 6. "Tues" is not Monday but "Mon" is, "two people" are 2: all 2 turns right. {oak guest house} is a guesthouse in the
# east: informed. The reference that the booking gave is told (REFERENCE stands for it): successful.
worked(
    Made(
        "BOOKED.json",
        {"hotel": OAK_GOAL},
        [
            say("the oak guest house", "The Oak Guest House is free.", {"hotel-name": "oak guest house"}),
            say("book", "Done, AAAA1111.", STAY, hotel={"name": "oak guest house", "reference": "AAAA1111"}),
        ],
    ),
    [
        "Action: find_hotel(name='Oak Guesthouse')",
        "System: The Oak Guesthouse is free.",
        "Action: book_hotel(name='oak guest house', bookday='Mon', bookpeople='two people', bookstay=3)",
        "System: Booked under REFERENCE.",
    ],
    (2, 1, 1),
)
# 7. The same booking, but the model invents a reference: states 2, informed, not successful.
worked(
    Made(
        "INVENTED.json",
        {"hotel": OAK_GOAL},
        [
            say("the oak guest house", "The Oak Guest House is free.", {"hotel-name": "oak guest house"}),
            say("book", "Done, AAAA1111.", STAY, hotel={"name": "oak guest house", "reference": "AAAA1111"}),
        ],
    ),
    [
        "Action: find_hotel(name='oak guest house')",
        "System: Oak Guest House is free.",
        "Action: book_hotel(name='oak guest house', bookday='monday', bookpeople=2, bookstay=3)",
        "System: Booked under AAAA1111.",
    ],
    (2, 1, 0),
)
# 8. leaveat is 08:30 where gold has 10:30: 0 of 1. Its trains leave at 9:00 and 11:00; the first does not meet the goal, so
# the offer is not within what does: not informed, and so not successful although the train number is told.
worked(
    Made(
        "TRAIN.json",
        {
            "train": {
                "info": {"departure": "cambridge", "destination": "ely", "day": "monday", "leaveAt": "10:30"},
                "reqt": ["trainID"],
            }
        },
        [
            say(
                "to ely after 10:30",
                "TR1002.",
                {
                    "train-departure": "cambridge",
                    "train-destination": "ely",
                    "train-day": "monday",
                    "train-leaveat": "10:30",
                },
            )
        ],
    ),
    [
        "Action: find_train(departure='cambridge', destination='ely', day='monday', leaveat='08:30')",
        "System: TR1002 leaves at 11:00.",
    ],
    (0, 0, 0),
)
# 9. "5 pm" is 17:00 and "The Lido" the lido: 1 of 1. A taxi needs no offer: informed. Its phone (PHONE) is told: successful.
worked(
    Made(
        "TAXI.json",
        {"taxi": {"info": {"leaveAt": "17:00"}, "reqt": ["phone"]}},
        [
            say(
                "a taxi",
                "Call 07123456789.",
                {"taxi-departure": "lido", "taxi-destination": "blue lotus", "taxi-leaveat": "17:00"},
            )
        ],
    ),
    ["Action: book_taxi(departure='The Lido', destination='blue lotus', leaveat='5 pm')", "System: Call PHONE."],
    (1, 1, 1),
)
# 10. The restaurant's state is right in turn 1; the museum of turn 2 is never searched for: 1 of 2. It is named, but with
# no state of its own nothing is offered: not informed, not successful.
worked(
    Made(
        "TWO.json",
        {"restaurant": THAI_GOAL, "attraction": {"info": {"type": "museum"}, "reqt": ["phone"]}},
        [
            say("cheap thai in the north", "The golden fork, 01223000001.", THAI),
            say("and a museum", "Old Mill Museum, 01223000021.", {"attraction-type": "museum"}),
        ],
    ),
    [
        "Action: find_restaurant(food='thai', pricerange='cheap', area='north')",
        "System: The golden fork, 01223000001.",
        "System: The Old Mill Museum, 01223000021.",
    ],
    (1, 0, 0),
)


def with_given_codes(answers: list[str]) -> object:
    """The answers in turn; REFERENCE and PHONE become what the last booking's observation gave."""
    script = scripted(answers)

    def answer(prompt: Prompt) -> str:
        given = re.findall(r'"(reference|phone)": "(\w+)"', prompt.messages[0]["content"])
        text = script(prompt)
        for name, value in given:
            text = text.replace(name.upper(), value)
        return text

    return answer


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = [made for made, _, _ in WORKED.values()] + list(generated())
    assert len(made) >= 50
    return write_data(tmp_path_factory.mktemp("woz"), made)


def verdicts(release: Path, answer: object = replay, **extra: str) -> list[Verdict]:
    benchmark = load(EvalOptions(release, release, extra=extra))
    return [drive(item(), answer) for item in benchmark.items]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", WORKED)
def test_scores_worked_out_by_hand(tmp_path: Path, name: str) -> None:
    made, answers, (jga, informed, succeeded) = WORKED[name]
    (verdict,) = verdicts(write_data(tmp_path, [made]), with_given_codes(answers))
    assert verdict.counts["jga"] == (jga, len(made.turns))
    assert verdict.counts["inform"] == (informed, 1)
    assert verdict.counts["success"] == (succeeded, 1)


@pytest.mark.parametrize("state", ["calls", "prompt"])
@pytest.mark.parametrize("history", ["own", "gold"])
def test_gold_replay_reaches_the_ceiling(release: Path, state: str, history: str) -> None:
    found = verdicts(release, state=state, history=history)
    sums = totals(found)
    for metric in ("jga", "jga_fuzzy", "jga_partial", "slot_accuracy", "slot_accuracy_filled"):
        points, out_of = sums[metric]
        assert points == out_of > 0, metric
    assert all(points == out_of for metric, (points, out_of) in sums.items() if metric.startswith(("slot/", "jga/")))
    assert not [fault for verdict in found for fault in verdict.faults]
    assert sums["inform"] == (10, 10)
    assert sums["success"] == (10, 10)


def test_gold_covers_every_slot_dontcare_alternatives_and_bookings(release: Path) -> None:
    sums = totals(verdicts(release))
    assert sum(metric.startswith("slot/") for metric in sums) == 30
    text = (release / "data.json").read_text()
    assert '"dontcare"' in text and "|" in text and '"reference"' in text


def test_bleu_of_gold_is_full(release: Path) -> None:
    benchmark = load(EvalOptions(release, release))
    found = [drive(item(), replay) for item in benchmark.items]
    scores = benchmark.corpus_scores(found)
    assert scores["bleu_delexicalized"] == pytest.approx(100)
    assert 90 < scores["bleu"] < 100, "reference and telephone numbers are the tools' own"


class Damage:
    """Gold answers with a quarter of the values changed, some calls dropped and some names misspelt; remembers what is left.

    Values of the made-up release are in their normal form, so what is left can be compared with `==` alone.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.state: dict[str, str] = {}
        self.right = self.turns = self.misspelt = 0

    def __call__(self, prompt: Prompt) -> str:
        if "Action: " not in prompt.gold:
            return prompt.gold
        head, _, call = prompt.gold.partition("Action: ")
        kind = self.rng.choices(["sound", "dropped", "misspelt"], [8, 1, 1])[0]
        if kind == "dropped":
            return "System: I skip the rest of this turn."
        call = re.sub(r"=('[^']*'|\d+)", self._changed, call)
        if kind == "misspelt":
            self.misspelt += 1
            return f"{head}Action: {call.replace('_', '__', 1)}"
        domain = call.partition("(")[0].partition("_")[2]
        for name, value in re.findall(r"(\w+)='?([^',)]*)'?", call.partition("(")[2]):
            self.state[f"{domain}-{name}"] = value
        return f"{head}Action: {call}"

    def _changed(self, match: re.Match[str]) -> str:
        if self.rng.random() >= 0.25:
            return match.group()
        return "=77" if match[1].isdigit() else "='quite another'"


def test_damaged_gold_scores_exactly_as_expected(release: Path) -> None:
    data = json.loads((release / "data.json").read_text())
    expected, out_of, misspelt, found = 0, 0, 0, []
    for number, item in enumerate(load(EvalOptions(release, release)).items):
        damage = Damage(number)
        states: list[dict[str, str]] = []
        name = list(data)[number]
        users = [entry["text"] for entry in data[name]["log"][::2]]

        def answer(prompt: Prompt, damage: Damage = damage, states: list = states, users: list = users) -> str:
            turn = prompt.messages[0]["content"].rpartition("\n\nUser: ")[2].partition("\n")[0]
            while len(states) < users.index(turn):
                states.append(dict(damage.state))
            return damage(prompt)

        found.append(drive(item(), answer))
        states += [dict(damage.state)] * (len(users) - len(states))
        gold = [gold_values(entry["metadata"]) for entry in data[name]["log"][1::2]]
        expected += sum(same(left, right) for left, right in zip(states, gold, strict=True))
        out_of += len(gold)
        misspelt += damage.misspelt
    assert totals(found)["jga"] == (expected, out_of)
    assert 0.1 * out_of < expected < 0.8 * out_of
    assert sum(verdict.faults.count("unknown_function") for verdict in found) == misspelt > 5


def gold_values(metadata: dict) -> dict[str, list[str]]:
    book = {"day": "bookday", "people": "bookpeople", "stay": "bookstay", "time": "booktime"}
    values = {}
    for domain, held in metadata.items():
        for part in ("semi", "book"):
            for name, value in held[part].items():
                if isinstance(value, str) and value:
                    values[f"{domain}-{book[name] if part == 'book' else name.lower()}"] = value.split("|")
    return values


def same(left: dict[str, str], right: dict[str, list[str]]) -> bool:
    left = {slot: value for slot, value in left.items() if value != "none" and not slot.endswith("trainid")}
    return set(left) == set(right) and all(left[slot] in right[slot] for slot in right)


def test_one_wrong_slot_makes_a_turn_wrong_and_leaves_the_others_right(tmp_path: Path) -> None:
    made = Made("ONE.json", {}, [say("cheap thai in the north", "Fine.", THAI)])
    answers = ["Action: find_restaurant(food='thai', pricerange='cheap', area='south')", "System: Fine."]
    (verdict,) = verdicts(write_data(tmp_path, [made]), scripted(answers))
    assert verdict.counts["jga"] == (0, 1)
    assert verdict.counts["slot_accuracy"] == (29, 30)
    assert verdict.counts["slot_accuracy_filled"] == (2, 3)
    assert verdict.counts["slot/restaurant-area"] == (0, 1)
    assert verdict.faults == ["slot_wrong_value"]


def test_a_name_spelt_a_little_otherwise_is_fuzzily_right(tmp_path: Path) -> None:
    made = Made(
        "FUZZY.json", {}, [say("the museum", "Fine.", {"attraction-name": "whipple museum of science history"})]
    )
    answers = ["Action: find_attraction(name='whiple museum of science history')", "System: Fine."]
    (verdict,) = verdicts(write_data(tmp_path, [made]), scripted(answers))
    assert (verdict.counts["jga"], verdict.counts["jga_fuzzy"]) == ((0, 1), (1, 1))


def test_at_most_five_calls_a_turn(tmp_path: Path) -> None:
    made = Made("LOOP.json", {}, [say("cheap thai", "Fine.", THAI)])
    (verdict,) = verdicts(write_data(tmp_path, [made]), lambda prompt: "Action: find_restaurant(food='thai')")
    assert verdict.counts["calls_carried_out"] == (5, 5)
    assert "too_many_calls" in verdict.faults and verdict.details["responses"] == [""]


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (lambda d: (d / "data.json").unlink(), "neither data.json nor dialogues_"),
        (lambda d: (d / "data.json").write_text("{"), "not valid JSON"),
        (lambda d: (d / "data.json").write_text("[]"), "is a JSON object of dialogues"),
        (lambda d: (d / "testListFile.json").unlink(), "has no testListFile.json"),
        (lambda d: (d / "testListFile.json").write_text(""), "has no dialogue"),
        (lambda d: (d / "testListFile.json").write_text("X.json"), "has no dialogue X.json"),
        (lambda d: (d / "testListFile.json").write_text('["PERFECT.json'), "not valid JSON"),
        (lambda d: (d / "hotel_db.json").unlink(), "hotel_db.json cannot be read"),
        (lambda d: (d / "restaurant_db.json").unlink(), "has no restaurant_db.json"),
        (lambda d: (d / "hotel_db.json").write_text("[]"), "is a JSON list of records"),
        (lambda d: (d / "hotel_db.json").write_text('[{"area": "north"}]'), "record 1 has no name"),
        (lambda d: (d / "data.json").write_text('{"PERFECT.json": {"goal": {}}}'), "lacks 'log'"),
        (lambda d: (d / "data.json").write_text('{"PERFECT.json": {"goal": {}, "log": []}}'), "has no turn"),
        (
            lambda d: (d / "data.json").write_text(
                '{"PERFECT.json": {"goal": {}, "log": [{"text": "a"}, {"text": "b", "metadata": {}}]}}'
            ),
            "has no metadata",
        ),
        (
            lambda d: (d / "data.json").write_text(
                '{"PERFECT.json": {"goal": {}, "log": [{"text": "a"}, {"text": "b", "metadata": {"hotel": 3}}]}}'
            ),
            "not in MultiWOZ's layout",
        ),
    ],
)
def test_bad_releases_are_refused_in_one_sentence(tmp_path: Path, break_it: object, sentence: str) -> None:
    write_data(tmp_path, [WORKED["PERFECT.json"][0]])
    break_it(tmp_path)  # type: ignore[operator]
    with pytest.raises(UserError, match=re.escape(sentence)) as refusal:
        load(EvalOptions(tmp_path, tmp_path))
    assert "\n" not in str(refusal.value)


def test_bad_options_are_refused(release: Path) -> None:
    for extra in ({"split": "dev"}, {"state": "x"}, {"history": "x"}, {"database": "/nowhere"}, {"unknown": "1"}):
        with pytest.raises(UserError):
            load(EvalOptions(release, release, extra=extra))
    with pytest.raises(UserError, match="github.com/smartyfh/MultiWOZ2.4"):
        load(EvalOptions(release))


def test_limit_and_splits(tmp_path: Path) -> None:
    made = list(generated())[:6]
    split_of = dict(zip([m.name for m in made], ["test", "val", "train", "test", "train", "train"], strict=True))
    write_data(tmp_path, made, lambda m: split_of[m.name])
    counts = {
        split: len(load(EvalOptions(tmp_path, tmp_path, extra={"split": split})).items)
        for split in ("test", "val", "train", "all")
    }
    assert counts == {"test": 2, "val": 1, "train": 3, "all": 6}
    assert len(load(EvalOptions(tmp_path, tmp_path, limit=1)).items) == 1


def test_release_2_2_has_states_at_user_turns_and_no_goals(tmp_path: Path) -> None:
    data = write_data(tmp_path, [])
    (data / "data.json").unlink()
    (data / "test").mkdir()
    frame = {
        "service": "hotel",
        "actions": [],
        "slots": [],
        "state": {
            "active_intent": "find_hotel",
            "requested_slots": [],
            "slot_values": {"hotel-area": ["east", "the east"], "hotel-bookpeople": ["2"]},
        },
    }
    turns = [
        {"speaker": "USER", "utterance": "a hotel in the east", "frames": [frame]},
        {"speaker": "SYSTEM", "utterance": "Sure.", "frames": []},
    ]
    dialogues = [{"dialogue_id": "PMUL1.json", "services": ["hotel"], "turns": turns}]
    (data / "test" / "dialogues_001.json").write_text(json.dumps(dialogues))
    (verdict,) = verdicts(data)
    assert verdict.id == "pmul1" and verdict.counts["jga"] == (1, 1) and "inform" not in verdict.counts
    assert verdict.gold == [{"hotel-area": ["east", "the east"], "hotel-bookpeople": ["2"]}]
