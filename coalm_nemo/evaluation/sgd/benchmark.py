"""`coalm eval sgd`: MultiWOZ's metrics on Schema-Guided Dialogue, whose calls and results are real."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from coalm_nemo.data.sources.cra.dialogue import Dialogue, read_dialogues
from coalm_nemo.data.sources.cra.source import TOOLS
from coalm_nemo.data.sources.sgd import SgdSource
from coalm_nemo.errors import UserError
from coalm_nemo.evaluation.base import Benchmark, Verdict
from coalm_nemo.evaluation.dialogue_states.agent import MAX_CALLS
from coalm_nemo.evaluation.dialogue_states.bleu import corpus_bleu
from coalm_nemo.evaluation.dialogue_states.prompts import AgentPrompt
from coalm_nemo.evaluation.options import EvalOptions
from coalm_nemo.evaluation.sgd.item import Protocol, dialogue_item
from coalm_nemo.evaluation.sgd.rows import row_items
from coalm_nemo.evaluation.sgd.values import ways

WHERE_FROM = (
    "a directory of Schema-Guided Dialogue with schema.json and dialogues_*.json, such as test/ of "
    "github.com/google-research-datasets/dstc8-schema-guided-dialogue"
)
OPTIONS = ("form", "state", "history", "tools")
FORMS = ("agent", "rows")
_TOOLS_ARE = {"all": "every service of the schema", "dialogue": "the dialogue's own services"}
_VALUES = "Dates are written YYYY-MM-DD and times HH:MM on the 24-hour clock."
_RULES = (
    "Call a function once all of its required arguments are settled; a detail that the user has settled is passed too."
)


def load(options: EvalOptions) -> Benchmark:
    """Options: `form` (agent, rows); for rows `tools` (all, dialogue); for the agent `state` (calls, prompt) and `history`
    (own, gold)."""
    options.only(OPTIONS)
    directory = options.need_data(WHERE_FROM)
    form, tool_list = options.choice("form", FORMS), options.choice("tools", TOOLS)
    if form == "agent" and tool_list != TOOLS[0]:
        raise UserError("--option tools=dialogue is for form=rows; the agent always has the functions of every service")
    source = SgdSource(str(directory), tools=tool_list)
    state_from, history = options.choice("state", ("calls", "prompt")), options.choice("history", ("own", "gold"))
    schema, dialogues = source.schema, _dialogues(directory, options.limit, source)
    if form == "rows":
        about = _described(dialogues, form, "", "") | {"tools": f"functions of {_TOOLS_ARE[tool_list]}"}
        return Benchmark("sgd", row_items(source, dialogues), about, headline=("call", "call_name", "call_arguments"))
    tools = "\n".join(schema.signatures(True))
    prompt = AgentPrompt(tools, rules=_RULES, value_rules=_VALUES, today=source.today())
    protocol = Protocol(schema, prompt, ways(schema), state_from, "gold" if history == "gold" else "own")
    return Benchmark(
        "sgd",
        [partial(dialogue_item, dialogue, protocol) for dialogue in dialogues],
        _described(dialogues, form, state_from, history),
        bleu_score,
        ("jga", "jga_fuzzy", "state_at_calls", "call", "call_name", "call_arguments", "bleu"),
    )


def bleu_score(verdicts: Sequence[Verdict]) -> Mapping[str, float]:
    """Corpus BLEU of the responses against the file's."""
    said, wanted = (
        [text.lower() for verdict in verdicts for text in verdict.details[key]] for key in ("responses", "references")
    )
    return {"bleu": corpus_bleu(said, wanted)}


def _dialogues(directory: Path, limit: int | None, source: SgdSource) -> list[Dialogue]:
    found: list[Dialogue] = []
    for file in source.files()[1:]:
        found += read_dialogues(file)
        if limit is not None and len(found) >= limit:
            break
    known = source.schema.slots
    for dialogue in found:
        strange = next((f.service for turn in dialogue.turns for f in turn.frames if f.service not in known), None)
        if strange is not None:
            raise UserError(
                f"dialogue {dialogue.dialogue_id} is about service {strange}, which the schema of {directory} does not have"
            )
    if not any(len(dialogue.turns) > 1 for dialogue in found):
        raise UserError(f"the dialogue files of {directory} hold no dialogue with an answered turn")
    return found[:limit]


def _described(dialogues: Sequence[Dialogue], form: str, state: str, history: str) -> dict[str, Any]:
    about: dict[str, Any] = {"dialogues": len(dialogues), "call": "name and all arguments equal to the file's call"}
    if form == "rows":
        return about | {
            "form": "rows: each call of the file asked with the very prompt of our action rows, gold history and thought"
        }
    return about | {
        "form": f"agent: gold user turns, at most {MAX_CALLS} calls a turn, all functions of the schema with their optional "
        "arguments",
        "turns": sum(len(dialogue.turns) // 2 for dialogue in dialogues),
        "observations": "the file's result where the call equals one of the file's; otherwise that there is no record",
        "state": {"calls": "arguments of calls carried out, accumulated", "prompt": "a separate question"}[state],
        "history": {"own": "the model's own turns", "gold": "the file's words, without calls"}[history],
        "jga": "all slots of all services so far equal, in any form that the file has of a value, but for case and spacing",
        "jga_fuzzy": "slots that are not categorical from 95 % alike (words sorted) on",
        "jga_official": "product over slots of how alike they are, as SGD's own metric",
        "state_at_calls": "at the turns where the file calls: all slots that the file's state has of that service are right",
        "bleu": "corpus BLEU-4, 13a tokens, lower case",
    }
