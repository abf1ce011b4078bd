"""An independent check of CRA rows that were built from Schema-Guided Dialogue: text against the raw files, row by row.

It shares no code with what writes the rows: a row is read as text, and judged by SGD's schema.json and dialogues_*.json.
A value is grounded where the user, the system or a service has said it, as it stands or in other words that the
dialogue's own annotation up to the user turn gives for it; what the row's thoughts say grounds nothing.

    coalm data build --source sgd=DIR --tokenizer HF_DIR --out SET
    python -m benchmarks.check_cra --set SET --sgd DIR
"""

from __future__ import annotations

import argparse
import ast
import datetime
import json
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

EXAMPLES = 5
TODAY = datetime.date(2019, 3, 1)
EOT = "<|eot_id|>"
ASSISTANT = "<|start_header_id|>assistant<|end_header_id|>"
CHECKS = {
    "function": "1 the function is defined, in the prompt and for the dialogue",
    "arguments": "2 argument names, types and values are the source's",
    "grounded": "3 every argument value is grounded in the context",
    "thought": "4 the thought names the call, its values and no other function",
    "history": "users, systems and calls of the history are the source's, in order",
    "observation": "observations hold the source's results of that turn",
    "target": "the response is the source's utterance",
    "mask": "the loss mask covers the target and nothing else",
    "leak": "no reply of this turn and no later turn in the prompt",
    "once": "every row once, every call one row or dropped",
}


# --- the raw files


@dataclass(frozen=True)
class Slot:
    """A slot of a service."""

    categorical: bool
    values: tuple[str, ...]

    @property
    def kind(self) -> type:
        """How its values are written: int where all are whole numbers, bool for True and False, else text."""
        if self.values and all(re.fullmatch(r"-?\d+", v) for v in self.values):
            return int
        return bool if set(self.values) == {"True", "False"} else str


@dataclass(frozen=True)
class Intent:
    """A function of a service."""

    required: tuple[str, ...]
    optional: tuple[str, ...]


@dataclass(frozen=True)
class Service:
    slots: dict[str, Slot]
    described: dict[str, str]
    """name and description of each slot"""
    intents: dict[str, Intent]


@dataclass(frozen=True)
class Call:
    """A service call of the source, and what it gave."""

    service: str
    method: str
    parameters: dict[str, str]
    results: list[dict[str, str]]
    acts: frozenset[str]


@dataclass(frozen=True)
class Source:
    """SGD's files in memory."""

    services: dict[str, Service]
    dialogues: dict[str, dict[str, Any]]

    @staticmethod
    def load(directory: Path) -> Source:
        """Read every dialogues_*.json and the schema."""
        schema = json.loads((directory / "schema.json").read_text(encoding="utf-8"))
        files = sorted(directory.glob("dialogues_*.json"))
        dialogues = [d for f in files for d in json.loads(f.read_text(encoding="utf-8"))]
        return Source.of(schema, dialogues)

    @staticmethod
    def of(schema: list[dict[str, Any]], dialogues: list[dict[str, Any]]) -> Source:
        """Index by name and id. Raises ValueError where an id stands twice."""
        by_id = {d["dialogue_id"]: d for d in dialogues}
        if len(by_id) != len(dialogues):
            raise ValueError("a dialogue id stands twice in the source")
        return Source({s["service_name"]: _service(s) for s in schema}, by_id)

    def turns(self, dialogue: str) -> list[dict[str, Any]]:
        return self.dialogues[dialogue]["turns"]

    def calls(self, dialogue: str, turn: int) -> list[Call]:
        """The service calls of a system turn."""
        frames = [f for f in self.turns(dialogue)[turn]["frames"] if "service_call" in f]
        return [
            Call(
                f["service"],
                f["service_call"]["method"],
                f["service_call"]["parameters"],
                f.get("service_results", []),
                frozenset(a["act"] for a in f["actions"]),
            )
            for f in frames
        ]

    def system_turns(self) -> Iterator[tuple[str, int]]:
        """Every (dialogue, turn) in which the system speaks."""
        for name in self.dialogues:
            yield from ((name, i) for i, t in enumerate(self.turns(name)) if t["speaker"] == "SYSTEM")


def _service(raw: dict[str, Any]) -> Service:
    slots = {s["name"]: Slot(s["is_categorical"], tuple(s["possible_values"])) for s in raw["slots"]}
    intents = {i["name"]: Intent(tuple(i["required_slots"]), tuple(i["optional_slots"])) for i in raw["intents"]}
    described = {s["name"]: f"{s['name']} {s['description']}" for s in raw["slots"]}
    return Service(slots, described, intents)


# --- the rows


@dataclass(frozen=True)
class Line:
    """A line of the conversation, in the history or after it."""

    tag: str
    text: str


@dataclass(frozen=True)
class Row:
    """One row as text, as `coalm data show --json` gives it."""

    row_id: str
    prompt: str
    target: str
    mask: list[int]

    @staticmethod
    def of(shown: dict[str, Any]) -> Row:
        return Row(shown["row_id"], shown["prompt_text"], shown["target_text"], shown["loss_mask"])

    @property
    def dialogue(self) -> str:
        return self.row_id.split("/")[0]

    @property
    def turn(self) -> int:
        return int(self.row_id.split("/")[1])

    @property
    def kind(self) -> str:
        return self.row_id.split("/")[2]

    def block(self, name: str) -> str | None:
        """What stands between the two marks of a block of the prompt."""
        found = re.search(rf"\[BEGIN OF {name}\]\n(.*?)\[END OF {name}\]", self.prompt, re.DOTALL)
        return found.group(1) if found else None

    def lines(self) -> list[Line]:
        """History and current turn. Raises ValueError where a line has no tag."""
        history = self.block("CONVERSATION HISTORY")
        if history is None:
            raise ValueError("no block CONVERSATION HISTORY")
        current = self.prompt.rsplit("[END OF CONVERSATION HISTORY]", 1)[1].split(EOT)[0]
        return [_line(text) for text in (history + current).split("\n") if text.strip()]

    def tools(self) -> list[tuple[str, tuple[str, ...]]]:
        """Name and listed arguments of every signature of the tools block. Raises ValueError where one is malformed."""
        block = self.block("AVAILABLE TOOLS")
        if block is None:
            raise ValueError("no block AVAILABLE TOOLS")
        return [_signature(text) for text in block.splitlines() if text.strip()]


@cache
def _line(text: str) -> Line:
    tag, mark, rest = text.partition(": ")
    if not mark or tag not in ("User", "Thought", "Action", "Observation", "System"):
        raise ValueError(f"not a line of a conversation: {text!r}")
    return Line(tag, rest)


@cache
def _signature(text: str) -> tuple[str, tuple[str, ...]]:
    found = re.fullmatch(r"(\w+)\(([^()]*)\)", text.strip())
    if not found:
        raise ValueError(f"not a signature: {text!r}")
    listed = (re.split(r"[:=]", a)[0].strip() for a in found.group(2).split(","))
    return found.group(1), tuple(a for a in listed if a)


@cache
def parse_call(text: str) -> tuple[str, dict[str, Any]]:
    """`Fn(a='x', b=2)` as name and values. Raises ValueError for anything but one call with literal keywords."""
    try:
        node = ast.parse(text, mode="eval").body
    except SyntaxError as e:
        raise ValueError(f"not an expression: {text}") from e
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        raise ValueError(f"not one call with keyword arguments: {text}")
    names = [k.arg for k in node.keywords]
    if None in names or len(set(names)) != len(names):
        raise ValueError(f"an argument without a name, or twice: {text}")
    if not all(isinstance(k.value, ast.Constant) for k in node.keywords):
        raise ValueError(f"an argument is not a literal: {text}")
    return node.func.id, {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}


# --- words for values


def words(text: str) -> str:
    """Text in lower case without accents and punctuation, a blank about every word."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().casefold()
    return " " + " ".join(re.sub(r"[^a-z0-9]+", " ", plain.replace("'", "")).split()) + " "


def collapse(text: str) -> str:
    return " ".join(text.split())


SMALL = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
ORDINALS = [
    *("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh"),
    *("twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth", "nineteenth"),
]
MONTHS = [
    *("january", "february", "march", "april", "may", "june"),
    *("july", "august", "september", "october", "november", "december"),
]
WEEKDAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
PARAPHRASES = {
    "Sports": ("game", "games", "match"),
    "Music": ("concert",),
    "inexpensive": ("cheap", "low cost", "low priced", "budget"),
    "moderate": (
        *("economical", "economical pricing", "afforadable", "affordable", "average priced", "intermediate priced"),
        *("not very costly", "reasonably priced"),
    ),
    "expensive": ("costly", "fancy", "pricey", "above average"),
    "very expensive": ("lavish",),
    "Compact": ("small",),
    "Standard": ("medium sized", "intermediate"),
    "Full-size": ("large", "spacious"),
    "Nature Preserve": ("wildlife spot", "natural spot"),
    "Park": ("garden",),
    "Tourist Attraction": ("place of interest",),
    "Performing Arts Venue": ("performance venue",),
    "Sports Venue": ("stadium",),
    "Shopping Area": ("shopping district",),
    **{
        str(TODAY.year - n): (f"from {(TODAY.year - n) % 100}", f"{w} years back", f"{w} years ago")
        for n, w in enumerate(SMALL)
    },
}
"""Other words for a value of a categorical slot; SGD marks no words for these. They were read off its utterances."""


@cache
def in_digits(text: str) -> str:
    """Lower case, number words and ordinals as digits: "the fifth of March" is "the 5th of march"."""
    text = text.casefold()
    for number, word in enumerate(SMALL):
        text = re.sub(rf"\b{word}\b", str(number), text)
    for number, word in enumerate(ORDINALS, 1):
        text = re.sub(rf"\b{word}\b", f"{number}th", text)
    return text


@cache
def dates_in(text: str) -> frozenset[str]:
    """The dates that a text may speak of, as YYYY-MM-DD."""
    text = in_digits(text)
    return frozenset(d.isoformat() for d in (*_calendar_dates(text), *_relative_dates(text)))


def _calendar_dates(text: str) -> Iterator[datetime.date]:
    month = "(" + "|".join(f"{m}|{m[:3]}" for m in MONTHS) + r")\b\.?"
    day = r"(\d{1,2})(?:st|nd|rd|th)?\b"
    found = [(m, d) for m, d in re.findall(rf"\b{month},? (?:the )?{day}", text)]
    found += [(m, d) for d, m in re.findall(rf"\b{day} (?:of )?{month}", text)]
    found += [("march", d) for d in re.findall(r"\b(\d{1,2})(?:st|nd|rd|th)\b", text)]
    for name, number in found:
        place = [m[:3] for m in MONTHS].index(name[:3]) + 1
        if 1 <= int(number) <= 28 or (int(number) <= 31 and place in (1, 3, 5, 7, 8, 10, 12)):
            yield datetime.date(TODAY.year, place, int(number))


def _relative_dates(text: str) -> Iterator[datetime.date]:
    plain = words(text)
    if re.search(r" (today|tonight|now) ", plain):
        yield TODAY
    if " day after tomorrow " in plain:
        yield TODAY + datetime.timedelta(2)
    if " tomorrow " in plain.replace(" day after tomorrow ", " "):
        yield TODAY + datetime.timedelta(1)
    for before, day, after in re.findall(rf" (next |this |coming )?({'|'.join(WEEKDAYS)})(?= (next week)?)", plain):
        ahead = (WEEKDAYS.index(day) - TODAY.weekday()) % 7
        if after or before == "next ":
            yield TODAY + datetime.timedelta(7 - TODAY.weekday() + WEEKDAYS.index(day))
        if not after:
            yield TODAY + datetime.timedelta(ahead if ahead or not before else 7)


PART = r"(?:(?:in the |at |this )?(?:morning|afternoon|evening|night))"
HALF = rf"(?:\s*(a\.?m\b|p\.?m\b|o'? ?clock(?: {PART})?|{PART}))?"
EARLIER = r"(?:(morning|afternoon|evening|night) (?:at )?)?"


@cache
def times_in(text: str) -> frozenset[str]:
    """The clock times that a text may speak of, as HH:MM; both halves of the day where it leaves that open."""
    text = in_digits(text)
    found = [
        (h, m or "00", a + b) for a, h, m, b in re.findall(rf"{EARLIER}\b(\d{{1,2}})(?:[:. ](\d\d))?\b{HALF}", text)
    ]
    for word, minute, back in (("quarter past", "15", 0), ("half past", "30", 0), ("quarter to", "45", 1)):
        for a, h, b in re.findall(rf"{EARLIER}{word} (\d{{1,2}})\b{HALF}", text):
            found.append((str(int(h) - back or 12), minute, a + b))
    if "noon" in words(text).split():
        found.append(("12", "00", "pm"))
    return frozenset(t for h, m, half in found if int(h) < 24 and int(m) < 60 for t in _halves(int(h), m, half))


def _halves(hour: int, minute: str, half: str) -> Iterator[str]:
    morning = half.startswith("a") and not half.startswith("af") or "morning" in half
    late = half.startswith("p") or any(w in half for w in ("afternoon", "evening", "night"))
    if not late or hour > 12:
        yield f"{hour % 12 if morning else hour:02}:{minute}"
    if not morning and hour <= 12:
        yield f"{hour % 12 + 12:02}:{minute}"


@cache
def numbers_in(text: str) -> frozenset[str]:
    """Whole numbers that stand by themselves, not as part of a time, an ordinal or a longer word."""
    return frozenset(re.findall(r"(?<![\w:.,-])\d+(?![\w:-]|[.,]\d)", in_digits(text).replace("$", " ")))


def said(value: str, text: str) -> bool:
    """Whether a text has a value word for word, or as a date, a time or a number."""
    if re.fullmatch(r"\d+", value):
        return value in numbers_in(text.replace(",", ""))
    if words(value).strip() and (words(value) in _words(text) or words(value) in _words(re.sub("['’]s\\b", "", text))):
        return True
    if re.fullmatch(r"\d{4}-\d\d-\d\d", value):
        return value in dates_in(text)
    return bool(re.fullmatch(r"\d\d:\d\d", value)) and value in times_in(text)


_words = cache(words)


# --- grounding


@dataclass(frozen=True)
class Context:
    """What the row lets a reader see before the call, and what the annotation says of it."""

    utterances: tuple[str, ...]
    observed: frozenset[str]
    turns: list[dict[str, Any]]
    """of the source, up to and including the user turn"""

    @staticmethod
    def of(row: Row, turns: list[dict[str, Any]]) -> Context:
        lines = row.lines()
        spoken = tuple(line.text for line in lines if line.tag in ("User", "System"))
        observed = [json.loads(line.text) for line in lines if line.tag == "Observation"]
        values = frozenset(words(str(v)) for o in observed for r in o.get("results", []) for v in r.values())
        return Context(spoken, values, turns)

    def has(self, value: str) -> bool:
        """Whether someone said it, or a result has it as a whole value."""
        return words(value) in self.observed or any(said(value, text) for text in self.utterances)

    def acts(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(service, action) of the turns."""
        for turn in self.turns:
            yield from ((f["service"], a) for f in turn["frames"] for a in f["actions"])

    def annotated(self, value: str) -> set[str]:
        """Other words for a value: what an action pairs it with."""
        forms = {
            v
            for _, a in self.acts()
            for v, c in zip(a["values"], a.get("canonical_values", a["values"]), strict=True)
            if c == value
        }
        return forms - {value} - {""}

    def state(self, slot: str, service: str) -> set[str]:
        """The user's own words for a slot, by the state of the last turn of that service."""
        frames = [f for f in self.turns[-1]["frames"] if f["service"] == service]
        return {v for f in frames for v in f["state"]["slot_values"].get(slot, [])}

    def acted(self, value: str) -> bool:
        """Whether an action has the value, for any slot (a city is carried from service to service), or a result has."""
        return words(value) in self.observed or any(
            value in a.get("canonical_values", a["values"]) for _, a in self.acts()
        )

    def paraphrased(self, value: str, slot: str, service: str) -> bool:
        """Whether the user turn that informs of a value says it in other words that are known for it."""
        for turn in self.turns:
            acts = (a for f in turn["frames"] if f["service"] == service for a in f["actions"] if a["slot"] == slot)
            told = turn["speaker"] == "USER" and any(value in a.get("canonical_values", a["values"]) for a in acts)
            said_as = words(turn["utterance"])
            if told and any(words(form) in said_as for form in PARAPHRASES.get(value, ())):
                return True
        return False

    def settled(self, value: str, slot: str, service: str) -> bool:
        """Whether an earlier turn's annotation informs of, offers or confirms this value for this slot."""
        return any(
            s == service and a["slot"] == slot and value in a.get("canonical_values", a["values"])
            for s, a in self.acts()
            if a["act"] in ("INFORM", "CONFIRM", "OFFER", "REQUEST")
        )


GROUNDS = {
    "said": "said or found, as it stands or as a date, a time or a number",
    "annotated": "said in words that an action's annotation gives for it",
    "paraphrased": "a category, said in other words in the user turn that is annotated with it",
    "boolean": "True or False, annotated in an earlier turn",
    "state": "said in words that only the state gives for it",
    "nothing": "not grounded",
}


def how_grounded(value: str, name: str, call: Call, slot: Slot, context: Context) -> str:
    """By what a value is grounded, a key of GROUNDS."""
    if slot.kind is bool:
        return "boolean" if context.settled(value, name, call.service) else "nothing"
    if context.acted(value) and context.has(value):
        return "said"
    if any(context.has(form) for form in context.annotated(value)):
        return "annotated"
    if slot.categorical and context.paraphrased(value, name, call.service):
        return "paraphrased"
    return "state" if any(context.has(form) for form in context.state(name, call.service)) else "nothing"


# --- checks of one row


@dataclass
class Report:
    """What failed, by check; what was counted."""

    failed: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in CHECKS})
    counts: Counter[str] = field(default_factory=Counter)

    def fail(self, check: str, where: str, problems: list[str]) -> None:
        """One row's problems, if there are any."""
        if problems:
            self.failed[check].append(f"{where}: {'; '.join(problems)}")

    @property
    def ok(self) -> bool:
        return not any(self.failed.values())


def check_row(row: Row, source: Source, report: Report) -> None:
    """Everything that one row can show."""
    report.counts[row.kind] += 1
    report.fail("mask", row.row_id, mask_problems(row))
    try:
        lines = row.lines()
    except ValueError as e:
        report.fail("history", row.row_id, [str(e)])
        return
    report.fail("history", row.row_id, history_problems(row, lines, source))
    report.fail("observation", row.row_id, observation_problems(row, lines, source))
    report.fail("leak", row.row_id, leak_problems(row, lines, source))
    if row.kind == "action":
        check_action(row, lines, source, report)
    else:
        expected = f"System: {collapse(source.turns(row.dialogue)[row.turn]['utterance'])}{EOT}"
        report.fail("target", row.row_id, [] if row.target == expected else [f"{row.target!r}, not {expected!r}"])


def check_action(row: Row, lines: list[Line], source: Source, report: Report) -> None:
    """The four checks of a call."""
    calls = source.calls(row.dialogue, row.turn)
    try:
        name, arguments = parse_call(row.target.removeprefix("Action: ").removesuffix(EOT))
        tools = row.tools()
    except ValueError as e:
        report.fail("function", row.row_id, [str(e)])
        return
    report.fail("function", row.row_id, function_problems(name, tools, row, source))
    if len(calls) != 1:
        report.fail("arguments", row.row_id, [f"{len(calls)} calls in the source's turn"])
        return
    report.fail("arguments", row.row_id, argument_problems(name, arguments, calls[0], source))
    report.fail("grounded", row.row_id, ground_problems(row, arguments, calls[0], source, report.counts))
    report.fail("thought", row.row_id, thought_problems(name, arguments, lines, {t for t, _ in tools}))


def function_problems(name: str, tools: list[tuple[str, tuple[str, ...]]], row: Row, source: Source) -> list[str]:
    """Check 1: a signature of the prompt, with the arguments of an intent of a service of the dialogue."""
    services = [source.services[s] for s in source.dialogues[row.dialogue]["services"]]
    intents = [s.intents[name] for s in services if name in s.intents]
    listed = [set(arguments) for tool, arguments in tools if tool == name]
    if not intents or not listed:
        return [f"{name} is not {'in the list of tools' if intents else 'an intent of the services'}"]
    fits = any(set(i.required) <= a <= {*i.required, *i.optional} for i in intents for a in listed)
    return [] if fits else [f"no signature of {name} has the required slots of its intent"]


def argument_problems(name: str, arguments: dict[str, Any], call: Call, source: Source) -> list[str]:
    """Check 2: names, types, and the call of the source."""
    service = source.services[call.service]
    intent = service.intents.get(name)
    if intent is None:
        return [f"{call.service} has no {name}"]
    problems = [f"unknown argument {a}" for a in arguments if a not in (*intent.required, *intent.optional)]
    problems += [f"required {a} is missing" for a in intent.required if a not in arguments]
    for slot, value in arguments.items():
        problems += type_problems(slot, value, service.slots.get(slot))
    if (name, {k: str(v) for k, v in arguments.items()}) != (call.method, call.parameters):
        problems.append(f"the source calls {call.method}({call.parameters})")
    return problems


def type_problems(name: str, value: Any, slot: Slot | None) -> list[str]:
    """Whether a value is written as its slot's values are, and is one of them."""
    if slot is None:
        return [f"{name} is no slot of the service"]
    if value == "dontcare":
        return []
    if type(value) is not slot.kind:
        return [f"{name}={value!r} should be {slot.kind.__name__}"]
    if slot.categorical and str(value) not in slot.values:
        return [f"{name}={value!r} is not one of {slot.values}"]
    return []


def ground_problems(row: Row, arguments: dict[str, Any], call: Call, source: Source, counts: Counter[str]) -> list[str]:
    """Check 3: the values that nothing before the call bears out."""
    context = Context.of(row, source.turns(row.dialogue)[: row.turn])
    problems = []
    for slot, value in arguments.items():
        known = source.services[call.service].slots.get(slot, Slot(False, ()))
        how = how_grounded(str(value), slot, call, known, context)
        counts[how] += 1
        if how == "nothing":
            problems.append(f"{slot}={value!r} of {call.method}")
    return problems


def thought_problems(name: str, arguments: dict[str, Any], lines: list[Line], tools: set[str]) -> list[str]:
    """Check 4: the last thought against the call."""
    if not lines or lines[-1].tag != "Thought":
        return ["no thought before the target"]
    thought = lines[-1].text
    problems = [] if re.search(rf"\b{name}\b", thought) else [f"does not name {name}"]
    others = sorted(t for t in tools - {name} if re.search(rf"\b{t}\b", thought))
    problems += [f"names {other}" for other in others]
    return problems + [f"lacks {a}" for a in _unnamed(arguments, thought[max(thought.find(name), 0) :])]


def _unnamed(arguments: dict[str, Any], plan: str) -> Iterator[str]:
    """Arguments whose value does not stand in the plan, after the one before it."""
    at = 0
    for name, value in arguments.items():
        found = re.compile(rf"(?<!\w){re.escape(str(value))}(?!\w)").search(plan, at)
        at = found.end() if found else at
        if not found:
            yield f"{name}={value!r}"


def history_problems(row: Row, lines: list[Line], source: Source) -> list[str]:
    """Whether the lines are the source's turns up to here, with a thought before each step."""
    expected = list(expected_lines(row, source))
    for number, (line, wanted) in enumerate(zip_longest(lines, expected)):
        tag, text = wanted or ("the end", None)
        if line is None or line.tag != tag:
            return [f"line {number} is {line.tag if line else 'missing'}, not {tag}"]
        if tag in ("User", "System") and line.text != text:
            return [f"line {number} is {line.text!r}, not {text!r}"]
        if tag == "Action" and not _same_call(line.text, text):
            return [f"line {number} is {line.text!r}, not {text!r}"]
    return []


def _same_call(text: str, call: Call) -> bool:
    try:
        name, arguments = parse_call(text)
    except ValueError:
        return False
    return (name, {k: str(v) for k, v in arguments.items()}) == (call.method, call.parameters)


def expected_lines(row: Row, source: Source) -> Iterator[tuple[str, Any]]:
    """Tag and content of every line that should stand before the target; None for thoughts and observations."""
    turns = source.turns(row.dialogue)
    for number in range(0, row.turn, 2):
        yield "User", collapse(turns[number]["utterance"])
        yield "Thought", None
        last = number + 1 == row.turn
        if last and row.kind == "action":
            return
        for call in source.calls(row.dialogue, number + 1):
            yield from (("Action", call), ("Observation", None), ("Thought", None))
        if not last:
            yield "System", collapse(turns[number + 1]["utterance"])


def observation_problems(row: Row, lines: list[Line], source: Source) -> list[str]:
    """Every observation against the results of the source, in order."""
    stop = row.turn if row.kind == "action" else row.turn + 1
    calls = [call for turn in range(1, stop, 2) for call in source.calls(row.dialogue, turn)]
    shown = [line.text for line in lines if line.tag == "Observation"]
    if len(calls) != len(shown):
        return [f"{len(shown)} observations of {len(calls)} calls"]
    return [p for text, call in zip(shown, calls, strict=True) for p in result_problems(text, call)]


def result_problems(text: str, call: Call) -> list[str]:
    """One observation: its results are of this call, its total and status too."""
    try:
        shown = json.loads(text)
    except ValueError:
        return [f"not JSON: {text[:60]!r}"]
    problems = [f"key {k}" for k in shown if k not in ("status", "total", "results")]
    rest = list(call.results)
    for result in shown.get("results", []):
        if result not in rest:
            problems.append(f"no such result of {call.method}: {result}")
        else:
            rest.remove(result)
    if shown.get("total", len(call.results)) != len(call.results):
        problems.append(f"total {shown['total']}, not {len(call.results)}")
    status = {"success": "NOTIFY_SUCCESS", "failure": "NOTIFY_FAILURE"}
    if "status" in shown and status.get(shown["status"]) not in call.acts:
        problems.append(f"status {shown['status']} with acts {sorted(call.acts)}")
    return problems


def mask_problems(row: Row) -> list[str]:
    """The mask is one run up to the end, and what it covers is the assistant's whole turn."""
    start = {"action": "Action: ", "response": "System: "}.get(row.kind, "?")
    problems = []
    if row.mask != sorted(row.mask) or not any(row.mask) or all(row.mask):
        problems.append("not one run at the end")
    if not row.prompt.endswith(f"{EOT}{ASSISTANT}\n\n") or row.prompt.count(ASSISTANT) != 1:
        problems.append("the prompt does not end where the assistant begins")
    if not row.target.startswith(start) or not row.target.endswith(EOT) or row.target.count(EOT) != 1:
        problems.append(f"not '{start}...{EOT}': {row.target[:40]!r}")
    return problems


TELLING = 5
"""Words that a reply needs to be told from a thought that happens to say the same ("The movie is playing.")."""
PLAIN = {
    *("a", "also", "and", "at", "by", "for", "has", "have", "i", "in", "is", "it", "its", "no", "of", "on", "the"),
    *("arrival", "departure", "station", "suggest", "there"),
}
"""Words that say nothing beside a value: a reply of these, its slots and its values can be written without a leak."""


def leak_problems(row: Row, lines: list[Line], source: Source) -> list[str]:
    """This turn's reply or a later turn, as a line of its own or in a thought or the instructions."""
    turns = source.turns(row.dialogue)
    known = {words(t["utterance"]) for t in turns[: row.turn]}
    spoken = [words(line.text) for line in lines if line.tag in ("User", "System")]
    head = row.prompt.split("[BEGIN OF CONVERSATION HISTORY]")[0]
    own = words(" ".join([head, *(line.text for line in lines if line.tag == "Thought")]))
    later = [words(t["utterance"]) for t in turns[row.turn :] if not bare_values(t, source)]
    problems = [f"in a thought: {t.strip()!r}" for t in later if len(t.split()) >= TELLING and t in own]
    return problems + [f"as a line: {t.strip()!r}" for t in spoken if t not in known]


def bare_values(turn: dict[str, Any], source: Source) -> bool:
    """Whether a turn says nothing but slots and values of its own actions ("The price range is moderate.")."""
    acts = [a for f in turn["frames"] for a in f["actions"]]
    slots = [source.services[f["service"]].described.get(a["slot"], "") for f in turn["frames"] for a in f["actions"]]
    text = words(turn["utterance"])
    forms = {words(v) for a in acts for v in (*a["values"], *a.get("canonical_values", [])) if words(v).strip()}
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, "  ")
    return not set(text.split()) - PLAIN - set(words(" ".join(slots)).split())


# --- checks of the whole set


def check_set(rows: Iterable[Row], source: Source, drops: dict[str, int]) -> Report:
    """All rows, then what must add up over them."""
    report, seen, texts = Report(), Counter[str](), Counter[int]()
    for row in rows:
        seen[row.row_id] += 1
        texts[hash((row.prompt, row.target))] += 1
        check_row(row, source, report)
    report.counts["same text"] = sum(n - 1 for n in texts.values())
    report.fail("once", "rows", [f"{name} stands {n} times" for name, n in seen.items() if n > 1])
    report.fail("once", "set", count_problems(set(seen), source, drops, report.counts))
    return report


def count_problems(seen: set[str], source: Source, drops: dict[str, int], counts: Counter[str]) -> list[str]:
    """Every call and every system turn is a row or among the drops; no row is of anything else."""
    turns = list(source.system_turns())
    calls = [f"{d}/{t}/action" for d, t in turns for _ in source.calls(d, t)]
    wanted = [*calls, *(f"{d}/{t}/response" for d, t in turns)]
    counts["calls"], missing = len(calls), [w for w in wanted if w not in seen]
    counts["turns"] = sum(len(source.turns(d)) for d in source.dialogues)
    problems = [f"{extra} is no call or turn of the source" for extra in sorted(seen - set(wanted))]
    if len(missing) != sum(drops.values()) or len(set(wanted)) != len(wanted):
        problems.append(f"{len(missing)} calls and turns have no row, {sum(drops.values())} are dropped: {missing[:5]}")
    return problems


def read_set(directory: Path) -> tuple[Iterator[Row], dict[str, int]]:
    """The rows of a set, and its drops by reason."""
    from coalm_nemo.data.chat import load_tokenizer
    from coalm_nemo.data.shards import ShardSet
    from coalm_nemo.data.show import describe_row

    rows = ShardSet.load(directory)
    tokenizer = load_tokenizer(directory / "tokenizer")
    drops = Counter[str]()
    for one in rows.manifest["sources"].values():
        drops.update(one["dropped"])
    return (Row.of(describe_row(rows, i, tokenizer)) for i in range(len(rows))), dict(drops)


def print_report(report: Report, source: Source, drops: dict[str, int]) -> None:
    """The table, with examples of what failed."""
    counts = report.counts
    print(f"| dialogues | {len(source.dialogues):,} |\n|---|---|\n| turns | {counts['turns']:,} |")
    print(f"| calls in the source | {counts['calls']:,} |\n| action rows | {counts['action']:,} |")
    print(f"| response rows | {counts['response']:,} |")
    for reason, number in sorted(drops.items()):
        print(f"| dropped: {reason} | {number:,} |")
    print(f"| rows with another row's text | {counts['same text']:,} |")
    for how, title in GROUNDS.items():
        print(f"| argument values: {title} | {counts[how]:,} |")
    for check, title in CHECKS.items():
        print(f"| fails: {title} | {len(report.failed[check]):,} |")
    for check, title in CHECKS.items():
        for example in report.failed[check][:EXAMPLES]:
            print(f"{title}\n    {example}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", type=Path, required=True, help="set of `coalm data build`")
    parser.add_argument("--sgd", type=Path, required=True, help="directory of schema.json and dialogues_*.json")
    args = parser.parse_args()
    source = Source.load(args.sgd)
    rows, drops = read_set(args.set)
    report = check_set(rows, source, drops)
    print_report(report, source, drops)
    sys.exit(0 if report.ok else 1)


if __name__ == "__main__":
    main()
