"""SGD: a dialogue scored by hand, gold replay on real ones, damaged calls, bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from coalm_nemo.data.rows import Row
from coalm_nemo.data.sources.sgd import SgdSource
from coalm_nemo.errors import UserError
from coalm_nemo.evaluation.base import Prompt, Verdict
from coalm_nemo.evaluation.gold_model import DamagedGoldModel
from coalm_nemo.evaluation.options import EvalOptions
from coalm_nemo.evaluation.sgd.benchmark import load
from tests.data.sources.cra_world import MILL, SGD, dialogue, needs_sgd, with_another_service, write
from tests.evaluation.woz_world import drive, replay, scripted, totals

NAME = MILL["workshop_name"]
BOOK = f"Action: BookRepair(workshop_name={NAME!r}, date='2019-03-02', number_of_bikes=2, open_late=False)"


def verdicts(data: Path, answer: object = replay, limit: int | None = None, **extra: str) -> list[Verdict]:
    benchmark = load(EvalOptions(data, data, limit, extra=extra))
    return [drive(item(), answer) for item in benchmark.items]  # type: ignore[arg-type]


def test_gold_shows_the_state_where_the_file_calls_and_says_where_it_is_ahead(tmp_path: Path) -> None:
    """User turns 1 to 6: nothing settled yet; city, by the call; the same; the booking's details, which the file's system
    confirms before it calls (0); all of them, by the call; "open late" gone from the file's state (0): 4 of 6."""
    (verdict,) = verdicts(write(tmp_path, [dialogue()]))
    assert verdict.counts["jga"] == (4, 6)
    assert verdict.counts["state_at_calls"] == verdict.counts["call"] == (2, 2)
    assert verdict.faults.count("state_ahead_of_calls") == 2


def test_gold_replay_of_the_state_question_reaches_the_ceiling(tmp_path: Path) -> None:
    for history in ("own", "gold"):
        (verdict,) = verdicts(write(tmp_path, [dialogue()]), state="prompt", history=history)
        assert verdict.counts["jga"] == (6, 6) and not verdict.faults


def test_a_surface_form_is_a_right_state_but_not_the_right_call(tmp_path: Path) -> None:
    answers = [
        "System: Where?",
        "Action: FindWorkshop(city='Gent')",
        "System: Nothing there.",
        "System: I do not know.",
        "System: What?",
        "Action: RepairBook(date='2019-03-02')",
        BOOK.replace("2019-03-02", "2019-03-03"),
        "System: Booked.",
        "System: Bye.",
    ]
    seen: list[str] = []
    script = scripted(answers)

    def answer(prompt: Prompt) -> str:
        seen.append(prompt.messages[0]["content"].rpartition("\n")[2])
        return script(prompt)

    (verdict,) = verdicts(write(tmp_path, [dialogue()]), answer)
    # Turns: empty (1), Gent (1), Gent (1), without the booking (0), with another date (0), and still (0).
    assert verdict.counts["jga"] == (3, 6)
    # Both gold calls have their name called, neither with its arguments; of three made calls none is right.
    assert verdict.counts["call_name"] == (2, 2) and verdict.counts["call"] == (0, 2)
    assert verdict.counts["call_precision"] == (0, 3)
    assert verdict.faults.count("unknown_function") == 1 and verdict.faults.count("wrong_argument") == 2
    assert '"total": 0' in seen[2] and "no record" in seen[2], "no result is invented for a call that was never made"
    assert "there is no function RepairBook" in seen[6]


def test_the_result_of_the_file_answers_the_same_call(tmp_path: Path) -> None:
    prompts: list[str] = []

    def answer(prompt: Prompt) -> str:
        prompts.append(prompt.messages[0]["content"])
        return prompt.gold

    verdicts(write(tmp_path, [dialogue()]), answer)
    observation = json.loads(prompts[2].rpartition("\nObservation: ")[2].partition("\n")[0])
    assert observation["total"] == 4 and observation["results"][0] == MILL


def test_missing_and_unknown_arguments_are_refused(tmp_path: Path) -> None:
    answers = ["Action: FindWorkshop()", "Action: FindWorkshop(town='Ghent')", "Action: FindWorkshop(city=['Ghent'])"]
    (verdict,) = verdicts(write(tmp_path, [dialogue()]), scripted([*answers, *["System: Well."] * 6]))
    assert verdict.faults[:1] == ["argument_missing"] or "argument_missing" in verdict.faults
    assert {"unknown_argument", "argument_type"} <= set(verdict.faults)
    assert verdict.answer == [{}] * 6


def test_rows_ask_every_call_with_the_training_prompt(tmp_path: Path) -> None:
    found = verdicts(write(tmp_path, [dialogue()]), form="rows")
    assert [verdict.counts["call"] for verdict in found] == [(1, 1), (1, 1)]
    assert {verdict.group for verdict in found} == {"w_1"}
    spoiled = verdicts(tmp_path, lambda prompt: prompt.gold.replace("Ghent", "Rome"), form="rows")
    assert totals(spoiled)["call"] == (1, 2) and totals(spoiled)["call_name"] == (2, 2)
    assert totals(verdicts(tmp_path, lambda prompt: "???", form="rows"))["call_name"] == (0, 2)


@pytest.mark.parametrize("tools", ["all", "dialogue"])
def test_rows_have_the_prompts_of_the_data_build(tools: str, tmp_path: Path) -> None:
    write(tmp_path, [dialogue()], with_another_service())
    asked: list[str] = []

    def answer(prompt: Prompt) -> str:
        asked.append(prompt.messages[0]["content"])
        return prompt.gold

    assert totals(verdicts(tmp_path, answer, form="rows", tools=tools))["call"] == (2, 2)
    source = SgdSource(str(tmp_path), tools=tools, response_rows=False)
    built = [row for block in source.blocks() for row in source.rows(block, 0) if isinstance(row, Row)]
    assert asked == [row.messages[0]["content"] for row in built]
    assert all(("BookFerry" in prompt) == (tools == "all") for prompt in asked)


def test_the_protocol_says_which_tools_and_the_agent_takes_all(tmp_path: Path) -> None:
    write(tmp_path, [dialogue()])
    for tools, words in (("all", "every service"), ("dialogue", "the dialogue's own services")):
        protocol = load(EvalOptions(tmp_path, tmp_path, extra={"form": "rows", "tools": tools})).protocol
        assert words in protocol["tools"]
    with pytest.raises(UserError, match="tools=dialogue is for form=rows"):
        load(EvalOptions(tmp_path, tmp_path, extra={"tools": "dialogue"}))
    with pytest.raises(UserError, match="tools=few: it must be one of all, dialogue"):
        load(EvalOptions(tmp_path, tmp_path, extra={"form": "rows", "tools": "few"}))


@needs_sgd
def test_gold_replay_on_real_dialogues() -> None:
    found = verdicts(SGD / "train", limit=40)
    sums = totals(found)
    for metric in ("call", "call_name", "call_arguments", "call_precision"):
        assert sums[metric][0] == sums[metric][1] > 80
    points, out_of = sums["jga"]
    ahead = sum(verdict.faults.count("state_ahead_of_calls") for verdict in found)
    assert points + ahead == out_of, "every turn that gold misses is one where the file's state is ahead of its calls"
    asked = totals(verdicts(SGD / "train", limit=40, state="prompt"))
    assert asked["jga"][0] == asked["jga"][1] == out_of


@needs_sgd
def test_damaged_calls_score_exactly_as_expected() -> None:
    model = DamagedGoldModel(7)
    found = verdicts(SGD / "train", lambda prompt: model.answer([prompt])[0], limit=30, form="rows")
    sums = totals(found)
    assert len(model.log) == len(found) > 60
    named = sum(not (damage.dropped or damage.misspelt) for damage in model.log)
    same = sum(not (damage.dropped or damage.changed) for damage in model.log)
    assert sums["call_name"] == (named, len(found))
    assert sums["call_arguments"] == (same, len(found))
    assert sums["call"] == (sum(damage.sound for damage in model.log), len(found))


def test_bad_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="github.com/google-research-datasets"):
        load(EvalOptions(tmp_path))
    with pytest.raises(UserError, match="holds no dialogues_"):
        load(EvalOptions(tmp_path, tmp_path))
    strange = dialogue()
    strange["turns"][0]["frames"][0]["service"] = "Boats_1"
    for dialogues, sentence in (([], "no dialogue with an answered turn"), ([strange], "service Boats_1")):
        with pytest.raises(UserError, match=re.escape(sentence)):
            load(EvalOptions(tmp_path, write(tmp_path, dialogues)))
    with pytest.raises(UserError, match="form"):
        load(EvalOptions(tmp_path, tmp_path, extra={"form": "x"}))
