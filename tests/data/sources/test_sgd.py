"""SGD -> CRA rows: the small world in full, and the published files where they are."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coalm_nemo.data.rows import Row
from coalm_nemo.data.sources.base import Dropped
from coalm_nemo.data.sources.cra.checks import check_row
from coalm_nemo.data.sources.cra.dialogue import read_dialogues
from coalm_nemo.data.sources.sgd import SgdSource
from coalm_nemo.errors import UserError
from tests.data.sources.cra_world import SGD, dialogue, needs_sgd, system, with_another_service, write


def make(source: SgdSource, seed: int = 0) -> list[Row | Dropped]:
    return [row for block in source.blocks() for row in source.rows(block, seed)]


def world(
    folder: Path, change: Callable[[dict[str, Any]], Any] | None = None, **options: Any
) -> dict[str, Row | Dropped]:
    made = dialogue()
    if change:
        change(made)
    return {row.row_id: row for row in make(SgdSource(str(write(folder, [made])), **options))}


def text(row: Row | Dropped) -> str:
    assert isinstance(row, Row), row
    return "\n".join(m["content"] for m in row.messages)


def target(row: Row | Dropped) -> str:
    assert isinstance(row, Row), row
    return str(row.messages[1]["content"])


def test_one_row_for_every_call_and_every_answer(tmp_path: Path) -> None:
    rows = world(tmp_path)
    assert [*rows] == [
        "w_1/1/response",
        "w_1/3/action",
        "w_1/3/response",
        "w_1/5/response",
        "w_1/7/response",
        "w_1/9/action",
        "w_1/9/response",
        "w_1/11/response",
    ]
    assert target(rows["w_1/3/action"]) == "Action: FindWorkshop(city='Ghent')"
    assert target(rows["w_1/9/response"]) == "System: Done."
    source = SgdSource(str(tmp_path))
    counts = source.counts(next(source.blocks()))
    assert counts == {"dialogues": 1, "turns": 12, "system_turns": 6, "calls": 2}


def test_the_layout_of_an_action_row(tmp_path: Path) -> None:
    prompt = text(world(tmp_path)["w_1/3/action"])
    labels = [line.split(":")[0] for line in prompt.split("\n") if re.match("[A-Z][a-z]+: ", line)]
    assert labels == ["Action", "User", "Thought", "System", "User", "Thought", "Action"]
    blocks = ["AVAILABLE TOOLS", "FORMAT INSTRUCTION", "CONVERSATION HISTORY"]
    marks = [f"[{edge} OF {block}]" for block in blocks for edge in ("BEGIN", "END")]
    assert [line for line in prompt.split("\n") if line.startswith("[")] == marks
    assert "\nUser: In Gent, of course.\nThought: " in prompt
    assert "2019-03-01" in prompt and "may be passed by name" in prompt


def test_the_layout_of_a_response_row(tmp_path: Path) -> None:
    prompt = text(world(tmp_path)["w_1/3/response"])
    turn = prompt.split("[END OF CONVERSATION HISTORY]")[1].strip().split("\n")
    assert [line.split(":")[0] for line in turn] == ["User", "Thought", "Action", "Observation", "Thought", "System"]
    assert "AVAILABLE TOOLS" not in prompt
    observation = json.loads(turn[3].removeprefix("Observation: "))
    assert observation["total"] == 4 and len(observation["results"]) == 3
    assert observation["results"][0]["workshop_name"] == 'Mill\'s "Wheel"'


def test_history_keeps_only_the_record_that_was_spoken_of(tmp_path: Path) -> None:
    line = next(x for x in text(world(tmp_path)["w_1/5/response"]).split("\n") if x.startswith("Observation: "))
    assert [r["street_address"] for r in json.loads(line[13:])["results"]] == ["1 Canal Row"]


def test_thought_target_moves_the_thought_into_the_output(tmp_path: Path) -> None:
    plain, moved = world(tmp_path), world(tmp_path, thought_target=True)
    for name in plain:
        assert isinstance(moved[name], Row)
        assert [line.split(":")[0] for line in target(moved[name]).split("\n")][0] == "Thought"
        assert target(moved[name]).endswith(target(plain[name]))
    assert not text(moved["w_1/3/action"]).split("\n\n")[-1].startswith("Thought")


def test_which_parts_and_which_signatures(tmp_path: Path) -> None:
    assert {r.part for r in world(tmp_path, response_rows=False).values() if isinstance(r, Row)} == {"cra_action"}
    assert {r.part for r in world(tmp_path, action_rows=False).values() if isinstance(r, Row)} == {"cra_response"}
    assert "FindWorkshop(city, open_late='dontcare'" in text(world(tmp_path, optional_slots=True)["w_1/3/action"])
    strict = world(tmp_path, strict_signatures=True)
    assert strict["w_1/9/action"] == Dropped("argument_not_in_tool_list", "w_1/9/action")
    assert isinstance(strict["w_1/9/response"], Row)
    assert isinstance(world(tmp_path, strict_signatures=True, optional_slots=True)["w_1/9/action"], Row)


def tool_list(row: Row | Dropped) -> list[str]:
    return text(row).split("TOOLS]\n")[1].split("\n")[:-1]


def test_tools_of_the_schema_or_of_the_dialogue(tmp_path: Path) -> None:
    write(tmp_path, [dialogue()], with_another_service())
    lists = {}
    for tools in ("all", "dialogue"):
        source = SgdSource(str(tmp_path), tools=tools)
        rows = {row.row_id: row for row in make(source)}
        assert not any(isinstance(row, Dropped) for row in rows.values())
        lists[tools] = tool_list(rows["w_1/3/action"])
        assert tool_list(rows["w_1/9/action"]) == lists[tools]
    own = ["FindWorkshop(city)", "BookRepair(workshop_name, date, number_of_bikes)"]
    assert lists["dialogue"] == own
    assert lists["all"] == ["FindWorkshop(city, date)", "BookFerry(workshop_name, date, number_of_bikes)", *own]
    shown = tool_list(make(SgdSource(str(tmp_path), tools="dialogue", optional_slots=True))[1])
    assert shown[0] == "FindWorkshop(city, open_late='dontcare', size='dontcare')" and len(shown) == 2
    with pytest.raises(UserError, match="tools is 'some'; use one of all, dialogue"):
        SgdSource(str(tmp_path), tools="some")


def test_tools_change_the_tool_list_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, [dialogue()], with_another_service())
    every, own = (make(SgdSource(str(tmp_path), tools=tools)) for tools in ("all", "dialogue"))
    for one, other in zip(every, own, strict=True):
        lists = ["\n".join(tool_list(row)) if "TOOLS]" in text(row) else "-" for row in (one, other)]
        assert text(one).replace(lists[0], "-", 1) == text(other).replace(lists[1], "-", 1)


@needs_sgd
def test_the_tools_of_published_dialogues_hold_every_call() -> None:
    source = SgdSource(str(SGD), tools="dialogue", response_rows=False)
    rows = [row for row in source.rows(next(source.blocks()), 0) if isinstance(row, Row)]
    assert len(rows) > 200
    for row in rows:
        name = target(row).removeprefix("Action: ").split("(")[0]
        assert name in [line.split("(")[0] for line in tool_list(row)] and len(tool_list(row)) < 20


def call_of(made: dict[str, Any], turn: int) -> dict[str, Any]:
    frame: dict[str, Any] = made["turns"][turn]["frames"][0]
    return frame


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: call_of(d, 3)["service_call"].update(method="FindGarage"), "function_not_defined"),
        (lambda d: call_of(d, 3)["service_call"]["parameters"].update(colour="red"), "argument_not_defined"),
        (lambda d: call_of(d, 3)["service_call"]["parameters"].clear(), "argument_missing"),
        (lambda d: call_of(d, 3)["service_call"]["parameters"].update(city="Bruges"), "argument_not_grounded"),
        (lambda d: call_of(d, 3)["service_call"]["parameters"].update(size="huge"), "argument_value"),
        (lambda d: call_of(d, 3)["service_call"]["parameters"].update(open_late="late"), "argument_type"),
    ],
)
def test_a_bad_call_goes_with_its_answer_and_out_of_the_history(change: Any, reason: str, tmp_path: Path) -> None:
    rows = world(tmp_path, change)
    assert rows["w_1/3/action"] == Dropped(reason, "w_1/3/action")
    assert rows["w_1/3/response"] == Dropped("call_dropped", "w_1/3/response")
    assert "FindWorkshop" not in text(rows["w_1/7/response"])
    assert "User: In Gent, of course.\nSystem: Try Mill" in text(rows["w_1/7/response"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d["turns"][3].update(utterance=" "), "empty_response"),
        (lambda d: call_of(d, 3)["service_results"].pop(1), "answer_not_in_results"),
    ],
)
def test_answers_that_teach_nothing_true_go(change: Any, reason: str, tmp_path: Path) -> None:
    assert world(tmp_path, change)["w_1/3/response"] == Dropped(reason, "w_1/3/response")


def test_success_whose_result_is_another_goes(tmp_path: Path) -> None:
    rows = world(tmp_path, lambda d: call_of(d, 9)["service_results"][0].update(date="2019-03-04"))
    assert isinstance(rows["w_1/9/action"], Row)
    assert rows["w_1/9/response"] == Dropped("result_differs_from_call", "w_1/9/response")


def test_a_second_call_in_a_turn_is_dropped(tmp_path: Path) -> None:
    second = system("x", call=("FindWorkshop", {"city": "Ghent"}), results=[])["frames"][0]
    rows = world(tmp_path, lambda d: d["turns"][3]["frames"].append(second))
    assert isinstance(rows["w_1/3/action"], Row)
    assert rows["w_1/3/action2"] == Dropped("second_call_in_turn", "w_1/3/action2")


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("turns"),
        lambda d: d["turns"].pop(0),
        lambda d: d["turns"][0].pop("utterance"),
        lambda d: d["turns"][0].update(frames=[]),
        lambda d: d["turns"][1]["frames"][0].update(service="Boats_1"),
        lambda d: d["turns"][1]["frames"][0].update(actions=[{"act": "OFFER"}]),
        lambda d: d["turns"][1]["frames"][0].update(actions=[3]),
        lambda d: call_of(d, 3)["actions"][0].update(canonical_values=[]),
        lambda d: call_of(d, 3).pop("service_results"),
        lambda d: call_of(d, 3).update(service_results=[3]),
    ],
)
def test_a_malformed_dialogue_is_one_sentence_naming_it(change: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dialogues_001\.json: dialogue w_1"):
        world(tmp_path, change)


def test_the_path_may_be_the_parent_and_must_hold_the_files(tmp_path: Path) -> None:
    write(tmp_path / "sgd/train", [dialogue()])
    source = SgdSource(str(tmp_path / "sgd"))
    assert [file.name for file in source.files()] == ["schema.json", "dialogues_001.json"]
    with pytest.raises(UserError, match="dialogues_"):
        SgdSource(str(tmp_path)).files()
    (tmp_path / "sgd/train/schema.json").unlink()
    with pytest.raises(UserError, match=r"schema\.json"):
        list(source.blocks())
    (tmp_path / "sgd/train/dialogues_001.json").write_text("{")
    with pytest.raises(UserError, match=r"dialogues_001\.json is not valid JSON"):
        read_dialogues(tmp_path / "sgd/train/dialogues_001.json")


def test_rows_depend_on_the_seed_and_not_on_the_order(tmp_path: Path) -> None:
    names = [dialogue() | {"dialogue_id": f"w_{number}"} for number in range(6)]
    forward = make(SgdSource(str(write(tmp_path / "a", names))))
    backward = make(SgdSource(str(write(tmp_path / "b", names[::-1]))))
    by_id = [{row.row_id: row for row in rows} for rows in (forward, backward)]
    assert by_id[0] == by_id[1]
    again = make(SgdSource(str(tmp_path / "a")), seed=1)
    assert again != forward
    assert [target(row) for row in again] == [target(row) for row in forward]


@needs_sgd
def test_the_published_files() -> None:
    source = SgdSource(str(SGD))
    block = next(source.blocks())
    made, counts = list(source.rows(block, 0)), source.counts(block)
    kinds = Counter(row.row_id.rsplit("/", 1)[1] for row in made)
    assert kinds == {"action": counts["calls"], "response": counts["system_turns"]}
    assert len({row.row_id for row in made}) == len(made)
    dropped = Counter(row.reason for row in made if isinstance(row, Dropped))
    assert set(dropped) <= {"result_differs_from_call", "answer_not_in_results"}
    assert dropped.total() < 0.03 * len(made)


@needs_sgd
def test_thoughts_read_as_prose() -> None:
    """No slot names, no empty phrases, one stop a sentence."""
    source = SgdSource(str(SGD))
    turns = [t for d in read_dialogues(next(source.blocks()).file) for t in source.turns(d, 0)]
    bad = re.compile(r"_|\bNone\b|\.\.|  |,,|\(\)|\b(and|the|to) \1\b|[^.!?]$")
    thoughts = [thought for turn in turns for thought in (turn.thought, turn.thought_after) if thought]
    assert [thought for thought in thoughts if bad.search(thought)] == []
    assert len(set(thoughts)) > 0.6 * len(thoughts)


@needs_sgd
def test_thought_target_rows_pass_the_same_checks() -> None:
    source = SgdSource(str(SGD), thought_target=True, optional_slots=True)
    block = next(source.blocks())
    facts = {
        f"{d.dialogue_id}/{t.number}": t.facts
        for d in read_dialogues(block.file)
        for t in source.turns(d, 0)
        if t.facts
    }
    rows = [row for row in source.rows(block, 0) if isinstance(row, Row)]
    for row in rows[:400]:
        assert check_row(row, source.schema, facts.get(row.row_id.rsplit("/", 1)[0])) is None
