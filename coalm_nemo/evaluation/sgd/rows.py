"""Every call of a dialogue as one question: the prompt of our action rows, with the gold history. No agent, no state.

It measures what the rows teach, at one answer a call; a model too small to hold a conversation shows what it has learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from coalm_nemo.data.rows import Row
from coalm_nemo.data.sources.base import Dropped
from coalm_nemo.data.sources.cra.dialogue import Dialogue
from coalm_nemo.data.sources.cra.literal import parse_call
from coalm_nemo.data.sources.cra.rows import dialogue_rows
from coalm_nemo.data.sources.sgd import SgdSource
from coalm_nemo.evaluation.base import Item, Prompt, Verdict
from coalm_nemo.evaluation.calls import Call, same_call
from coalm_nemo.evaluation.dialogue_states.agent import MAX_NEW_TOKENS
from coalm_nemo.evaluation.dialogue_states.answers import STOP, read_step
from coalm_nemo.evaluation.dialogue_states.scores import Counts


def row_items(source: SgdSource, dialogues: Sequence[Dialogue]) -> list[Callable[[], Item]]:
    """Lazily made: a row holds its whole prompt."""
    items: list[Callable[[], Item]] = []
    for dialogue in dialogues:
        for row in dialogue_rows(dialogue.dialogue_id, source.turns(dialogue, 0), source.schema, source.row_options):
            if not isinstance(row, Dropped) and row.part == "cra_action":
                items.append(lambda row=row, dialogue=dialogue: row_item(row, dialogue.dialogue_id))  # type: ignore[misc]
    return items


def row_item(row: Row, dialogue_id: str) -> Item:
    gold_text = row.messages[1]["content"]
    answer = yield Prompt([row.messages[0]], gold_text, None, MAX_NEW_TOKENS, STOP)
    gold = Call(*parse_call(gold_text.rpartition("Action: ")[2]))
    step = read_step(answer)
    made = step.calls[0] if len(step.calls) == 1 else None
    name = made is not None and made.name == gold.name
    both = same_call(made, gold)
    counts = Counts()
    counts.add("call_name", name)
    counts.add("call_arguments", made is not None and same_call(Call("", made.arguments), Call("", gold.arguments)))
    counts.add("call", both)
    fault = (
        "" if both else step.fault or ("no_call" if made is None else "wrong_argument" if name else "wrong_function")
    )
    return Verdict(row.row_id, dialogue_id, counts.sums, gold_text, answer, [fault] * bool(fault))
