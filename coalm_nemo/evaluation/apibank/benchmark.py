"""`coalm eval api-bank`: calls of levels 1 and 2, responses, and the text overlap that the paper prints.

Metrics carry their level and form: `l1_call` is level 1 of the sample folders, `l1_hammer_call` of Hammer's prompts. Plain
names count each question once; names that end in `_official` count it as often as the benchmark's own reader does.
"""

from __future__ import annotations

import atexit
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from coalm_nemo.errors import UserError
from coalm_nemo.evaluation.apibank.execution import ToolRunner
from coalm_nemo.evaluation.apibank.matching import Match, match_call
from coalm_nemo.evaluation.apibank.prompts import messages
from coalm_nemo.evaluation.apibank.samples import (
    Question,
    find_api_list,
    level_of_name,
    read_api_list,
    read_hammer,
    read_samples,
    sample_folder,
)
from coalm_nemo.evaluation.apibank.text_scores import check_libraries, response_rouge_l, similarity
from coalm_nemo.evaluation.base import Benchmark, Item, Prompt, Verdict
from coalm_nemo.evaluation.calls import Call, parse_calls
from coalm_nemo.evaluation.options import EvalOptions

OPTIONS = ("form", "level", "part", "text", "tools", "tools_python", "tools_timeout_s")
WHAT = "an API-Bank checkout (with all_apis.csv and lv1-lv2-samples/) or a JSON file in Hammer's form"
CALL_TOKENS, RESPONSE_TOKENS = 256, 256
HEADLINE = (
    "call",
    "call_official",
    "name",
    "arguments",
    "execution",
    "rouge_l_official",
    "bleu_4_official",
    "response_rouge_l",
)


@dataclass(frozen=True)
class Scoring:
    """How answers are judged."""

    text: bool
    tools: ToolRunner | None = None


def load(options: EvalOptions) -> Benchmark:
    """The questions of --data. `limit`: so many dialogues of each level and form. Raises UserError.

    Options: form=all|samples|hammer, level=all|1|2, part=all|calls|responses, text=on|off, tools=CHECKOUT (execute calls
    with its tools), tools_python, tools_timeout_s.
    """
    options.only(OPTIONS)
    text = options.choice("text", ("on", "off")) == "on"
    if text:
        check_libraries()
    part = options.choice("part", ("all", "calls", "responses"))
    questions = [q for q in find_questions(options) if part == "all" or (q.call is None) == (part == "responses")]
    if not questions:
        raise UserError(f"{options.data} holds none of the questions asked for (form, level, part); it must be {WHAT}")
    questions = first_groups(questions, options.limit)
    scoring = Scoring(text, open_tools(options))
    items: list[Callable[[], Item]] = [partial(ask, q, scoring) for q in questions]
    protocol = describe(questions, scoring)
    prefixes = dict.fromkeys(prefix(q) for q in questions)
    return Benchmark("api-bank", items, protocol, headline=[f"{p}_{name}" for p in prefixes for name in HEADLINE])


def find_questions(options: EvalOptions) -> list[Question]:
    """All questions of the forms and levels asked for, in the files' order."""
    data = options.need_data(WHAT)
    level = options.choice("level", ("all", "1", "2"))
    levels = (1, 2) if level == "all" else (int(level),)
    form = options.choice("form", ("all", "samples", "hammer"))
    questions: list[Question] = []
    if form != "hammer" and data.is_dir():
        folders = {number: sample_folder(data, number) for number in levels}
        if any(folders.values()):
            apis = read_api_list(find_api_list(data))
            for number, folder in folders.items():
                questions += read_samples(folder, number, apis) if folder else []
    if form != "samples":
        for file in hammer_files(data):
            number = level_of_name(file) or (int(level) if level != "all" else 0)
            if number == 0:
                raise UserError(f"{file}: its name does not say the level; give --option level=1 or level=2")
            questions += read_hammer(file, number) if number in levels else []
    return questions


def hammer_files(data: Path) -> list[Path]:
    """`data` itself, or the files in it whose names say API-Bank and a level."""
    if data.is_file():
        return [data]
    return sorted(f for f in data.glob("*.json") if "bank" in f.stem.lower() and level_of_name(f))


def first_groups(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """Those of the first `limit` dialogues of each level and form; all for None."""
    if limit is None:
        return list(questions)
    seen: dict[str, set[str]] = {}
    kept: list[Question] = []
    for question in questions:
        groups = seen.setdefault(prefix(question), set())
        if question.group in groups or len(groups) < limit:
            groups.add(question.group)
            kept.append(question)
    return kept


def open_tools(options: EvalOptions) -> ToolRunner | None:
    """The checkout's tools where the user names one; they run until this program ends."""
    checkout = options.path("tools")
    if checkout is None:
        return None
    timeout_s = options.number("tools_timeout_s", 20)
    if timeout_s <= 0:
        raise UserError(f"--option tools_timeout_s={timeout_s:g}: it must be above 0")
    tools = ToolRunner(checkout, options.text("tools_python", sys.executable), timeout_s)
    atexit.register(tools.close)
    return tools


def prefix(question: Question) -> str:
    return f"l{question.level}" + ("_hammer" if question.form == "hammer" else "")


def ask(question: Question, scoring: Scoring) -> Item:
    """One prompt, one verdict."""
    most = CALL_TOKENS if question.call else RESPONSE_TOKENS
    answer = yield Prompt(messages(question), question.gold, max_new_tokens=most)
    if question.call is None:
        return judge_response(question, answer, scoring)
    return judge_call(question, question.call, answer, scoring)


def judge_response(question: Question, answer: str, scoring: Scoring) -> Verdict:
    """ROUGE-L alone: the benchmark has no other score for what the assistant says."""
    verdict = Verdict(question.id, question.group, {}, gold=question.gold, answer=answer)
    if parse_calls(answer).calls:
        verdict.faults.append("call_instead_of_response")
    elif not answer.strip():
        verdict.faults.append("no_response")
    if scoring.text:
        score = response_rouge_l(answer, question.gold)
        verdict.counts[f"{prefix(question)}_response_rouge_l"] = (score / 100, 1.0)
    return verdict


def judge_call(question: Question, gold: Call, answer: str, scoring: Scoring) -> Verdict:
    """Name, arguments, both; overlap of the texts; execution where there are tools."""
    parsed = parse_calls(answer)
    match = match_call(parsed, gold)
    start = prefix(question)
    points = {"call": float(match.call), "name": float(match.name), "arguments": float(match.arguments)}
    if scoring.text:
        points |= {name: figure / 100 for name, figure in similarity(answer, question.gold).items()}
    counts = {f"{start}_{name}": (point, 1.0) for name, point in points.items()}
    times = float(question.times)
    counts |= {f"{start}_{name}_official": (times * point, times) for name, point in points.items()}
    counts[f"{start}_argument_values"] = (float(match.values_right), float(len(gold.arguments)))
    if scoring.text and question.form == "hammer":
        bare = similarity(without_fence(answer), without_fence(question.gold))
        counts[f"{start}_rouge_l_unfenced"] = (bare["rouge_l"] / 100, 1.0)
    details: dict[str, Any] = {"times": question.times, "said": parsed.text}
    if scoring.tools is not None and question.recorded is not None:
        execute(question, gold, parsed.calls, match, scoring.tools, counts, details)
    calls = [{"name": c.name, "arguments": c.arguments} for c in parsed.calls]
    wanted = {"name": gold.name, "arguments": gold.arguments}
    return Verdict(question.id, question.group, counts, wanted, calls, match.faults, details)


def execute(
    question: Question,
    gold: Call,
    calls: Sequence[Call],
    match: Match,
    tools: ToolRunner,
    counts: dict[str, tuple[float, float]],
    details: dict[str, Any],
) -> None:
    """Adds `execution` (the tool's own check) and `execution_state` (output and databases as the gold call leaves them)."""
    if gold.name not in tools.tools:
        details["execution"] = "the gold call's tool is not among the checkout's"
        return
    # An answer without one call fails, but the gold call is run all the same: can it be met here at all?
    reply = tools.compare(calls[0] if len(calls) == 1 else Call("", {}), gold, question.recorded)
    details["execution"] = reply
    start = prefix(question)
    counts[f"{start}_execution"] = (float(reply["correct"]), 1.0)
    counts[f"{start}_execution_state"] = (float(reply["same"]), 1.0)
    if not reply["gold"]:
        match.faults.append("gold_not_reproducible")
    elif not reply["correct"]:
        match.faults.append("execution_timeout" if reply["error"] == "execution_timeout" else "execution_differs")


def without_fence(text: str) -> str:
    """The text within a fence of three backticks, if it has one."""
    inner = text.strip()
    if not (inner.startswith("```") and inner.endswith("```") and len(inner) >= 6):
        return inner
    first, _, rest = inner[3:-3].partition("\n")
    return (rest if first.strip().isalpha() or not first.strip() else inner[3:-3]).strip()


def describe(questions: Sequence[Question], scoring: Scoring) -> dict[str, Any]:
    """How it is scored, and what was counted."""
    calls = [q for q in questions if q.call is not None]
    unique, official = Counter(prefix(q) for q in calls), Counter[str]()
    for question in calls:
        official[prefix(question)] += question.times
    protocol: dict[str, Any] = {
        "prompt": "samples: our own wording, one user turn; hammer: as the file has it",
        "call": "exactly one call, with the gold name and exactly the gold arguments; values compared as text",
        "calls_asked": dict(unique),
        "calls_official": dict(official),
        "responses_asked": sum(q.call is None for q in questions),
        "text": "jieba words, rouge-chinese F, character BLEU-4 smoothing 3, mean over items"
        if scoring.text
        else "off",
    }
    if scoring.tools is not None:
        can = sum(q.call is not None and q.call.name in scoring.tools.tools for q in calls if q.recorded is not None)
        protocol["execution"] = "fresh databases each call; the tool's own check against the recorded result"
        protocol["executed_calls"] = can
        protocol["tools_not_imported"] = scoring.tools.broken
    return protocol
