"""MultiWOZ 2.4 (and 2.0 to 2.2): joint goal accuracy, Inform, Success and BLEU of a zero-shot ReAct agent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from coalm_nemo.errors import UserError
from coalm_nemo.evaluation.base import Benchmark, Verdict
from coalm_nemo.evaluation.dialogue_states.agent import MAX_CALLS
from coalm_nemo.evaluation.dialogue_states.bleu import corpus_bleu
from coalm_nemo.evaluation.multiwoz.database import read_database
from coalm_nemo.evaluation.multiwoz.item import Protocol, StateFrom, dialogue_item
from coalm_nemo.evaluation.multiwoz.mentions import MentionFinder
from coalm_nemo.evaluation.multiwoz.reader import WHERE_FROM, WozDialogue, read_split
from coalm_nemo.evaluation.options import EvalOptions

SPLITS = ("test", "val", "train", "all")
OPTIONS = ("split", "state", "history", "database")


def load(options: EvalOptions) -> Benchmark:
    """Options: `split` (test, val, train, all), `state` (calls, prompt), `history` (own, gold), `database` (directory)."""
    options.only(OPTIONS)
    directory = options.need_data(WHERE_FROM)
    state_from: StateFrom = "prompt" if options.choice("state", get_args(StateFrom)) == "prompt" else "calls"
    history = options.choice("history", ("own", "gold"))
    finder = MentionFinder(read_database(_database(directory, options.path("database"))))
    dialogues = read_split(directory, options.choice("split", SPLITS))[: options.limit]
    protocol = Protocol(finder, state_from, "gold" if history == "gold" else "own")
    return Benchmark(
        "multiwoz",
        [partial(dialogue_item, dialogue, protocol) for dialogue in dialogues],
        _described(options, dialogues, state_from, history),
        bleu_scores,
        ("jga", "jga_fuzzy", "inform", "success", "bleu"),
    )


def bleu_scores(verdicts: Sequence[Verdict]) -> Mapping[str, float]:
    """Corpus BLEU of the responses against the file's, as they are and with names, times and codes as placeholders."""
    return {
        name: corpus_bleu(_texts(verdicts, f"responses{suffix}"), _texts(verdicts, f"references{suffix}"))
        for name, suffix in (("bleu", ""), ("bleu_delexicalized", "_delexicalized"))
    }


def _texts(verdicts: Sequence[Verdict], key: str) -> list[str]:
    return [text.lower() for verdict in verdicts for text in verdict.details[key]]


def _database(directory: Path, given: Path | None) -> Path:
    places = [given] if given else [directory, directory / "db", directory.parent]
    found = next((place for place in places if (place / "restaurant_db.json").is_file()), None)
    if found is None:
        raise UserError(
            f"{places[0]} has no restaurant_db.json; name the directory of MultiWOZ's databases with --option database=DIR"
        )
    return found


def _described(options: EvalOptions, dialogues: Sequence[WozDialogue], state: str, history: str) -> dict[str, Any]:
    return {
        "agent": f"zero-shot ReAct over the databases, gold user turns, at most {MAX_CALLS} calls a turn",
        "split": options.choice("split", SPLITS),
        "dialogues": len(dialogues),
        "turns": sum(len(dialogue.turns) for dialogue in dialogues),
        "state": {
            "calls": "arguments of the calls carried out, accumulated over turns; 'none' takes a value back",
            "prompt": "a separate question for the state after every user turn",
        }[state],
        "history": {"own": "the model's own turns", "gold": "the file's words, without calls"}[history],
        "jga": "all slots of a turn equal after normalisation, any of a slot's alternatives; dontcare is a value",
        "jga_fuzzy": "names and places also at difflib ratio >= 95",
        "jga_partial": "every slot at partial ratio > 95, as in the paper's authors' fork of the evaluation; flattering",
        "inform": "every record that meets the state where a name is told meets the goal (standard evaluation)",
        "inform_named": "a record that the response names meets the goal",
        "success": "informed, and every requested phone, address, postcode, train number and reference told",
        "goals": all(dialogue.goals is not None for dialogue in dialogues),
        "bleu": "corpus BLEU-4, 13a tokens, lower case, against the file's responses",
    }
