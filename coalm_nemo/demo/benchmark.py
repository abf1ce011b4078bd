"""The demo's held-out dialogues as a benchmark: `coalm eval demo`. The same items and verdicts as `coalm demo` has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from coalm_nemo.demo.dialogues import generate_dialogues
from coalm_nemo.demo.rows import TaggedRow, dialogue_rows, single_rows, to_messages
from coalm_nemo.demo.score import HELD_OUT, MAX_NEW_TOKENS, SCORED_KINDS, judge, needs_call
from coalm_nemo.demo.values import Split
from coalm_nemo.errors import UserError
from coalm_nemo.evaluation.base import Benchmark, Item, Prompt, Verdict
from coalm_nemo.evaluation.options import EvalOptions

HELD_OUT_SEED, DIALOGUES = 1001, 120
PROTOCOL = {
    "task": "the demo world's held-out dialogues: a call, a state or a refusal after each turn, and single requests",
    "calls": "name and every argument exactly right",
    "joint_goal": "domain and every slot exactly right, over turns in which the user gives slots",
    "refusals": "no call where no listed tool fits",
    "splits": "combinations: unseen combinations; words: unseen words; names: unseen real names",
}


def load(options: EvalOptions) -> Benchmark:
    """`limit`: dialogues of each split (120). Raises UserError for options that it does not have."""
    options.only(())
    if options.data is not None:
        raise UserError("the demo's world is built in: leave --data away")
    items: list[Callable[[], Item]] = []
    for split in HELD_OUT:
        for group, rows in grouped_rows(HELD_OUT_SEED + options.seed, split, options.limit or DIALOGUES):
            scored = (r for r in rows if r.kind in SCORED_KINDS)
            items += [partial(ask, row, f"{group}/{n}", group) for n, row in enumerate(scored)]
    return Benchmark("demo", items, PROTOCOL, headline=("calls", "joint_goal", "refusals"))


def grouped_rows(seed: int, split: Split, dialogues: int) -> Iterator[tuple[str, list[TaggedRow]]]:
    """(group, rows) by dialogue; a single request is a group of its own."""
    for number, dialogue in enumerate(generate_dialogues(seed, dialogues, split)):
        yield f"{split}/dialogue{number}", dialogue_rows(dialogue)
    for number, row in enumerate(single_rows(seed, dialogues // 2, split)):
        yield f"{split}/single{number}", [row]


def ask(row: TaggedRow, item_id: str, group: str) -> Item:
    """One prompt, one verdict."""
    answer = yield Prompt(to_messages(row.row)[:1], row.row["output"], max_new_tokens=MAX_NEW_TOKENS)
    scored = judge(row, answer)
    metric = "joint_goal" if row.kind == "state" else "calls" if needs_call(scored) else "refusals"
    point = (float(scored.right), 1.0)
    counts = {metric: point, f"{metric}_{row.split}": point}
    if metric == "calls":
        counts |= {f"called_{row.split}": (float(scored.called), 1.0)}
    faults = [] if scored.right else [f"wrong_{row.kind}" if scored.called or row.kind != "action" else "no_call"]
    return Verdict(item_id, group, counts, gold=scored.gold, answer=scored.answer, faults=faults)
