"""Which rewritten fields may replace the original: the facts stay, none is added, and it is one plain line.

All rules are about text that can be compared; where they cannot be sure the original stays, which costs only variety.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from coalm_nemo.data.sources.cra.checks import check_thought, named_functions, tokens
from coalm_nemo.data.sources.cra.schema import DONTCARE, Function, Schema
from coalm_nemo.data.sources.cra.turns import Turn

LONGER_CHARACTERS = 40
"""A rewrite may be twice as long as the original and this much longer: "Done." needs room."""

_LABELS = "thought|action|observation|user|system|assistant|response"
_LABEL = re.compile(rf"^\W*(?i:{_LABELS})\s*:|\b(?:{_LABELS.title()})\s*:")
"""At the start in any case; elsewhere "I ask the user: ..." is plain prose."""
_CONTROL = re.compile(r"<\||\|>|</?s>|</?think>|\[/?INST\]|<</?SYS>>|\[(?:BEGIN|END) OF|```")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufffd]")
_NUMBER = re.compile(
    r"[$€£¥]?\w*\d\w*(?:[.,:/-]\w*\d\w*)*(?:\s?[ap](?:m\b|\.\s?m\b\.?))?(?:\s?%)?|\S*(?:://|www\.|\w@\w)\S*",
    re.IGNORECASE,
)
"""Numbers, prices, times, dates, phone numbers, codes such as TR0123; and addresses of the web, which are facts too."""
_HALF_DAY = re.compile(r"\s?([ap])\.?\s?m\.?$")
_ORDINAL = re.compile(r"(\d)(?:st|nd|rd|th)\b")
_WORD = re.compile(r"(?<!\w)[^\W\d_]+(?:[-&'’][^\W\d_]+)*(?!\w)")
_QUOTED = re.compile(r"\"([^\"]+)\"|“([^”]+)”|(?<!\w)'([^']+)'(?!\w)")
_BEFORE_SENTENCE = re.compile(r"[.!?:;…][\s\"'“”‘’()]*$")
_ALWAYS_CAPITAL = frozenset({"i", "ok", "okay"})
_SMALL = {
    word: str(n)
    for n, word in enumerate(
        ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"], 2
    )
}
"""Not "one": in "that one" it is no number."""
_DAYS = re.compile(
    r"(?:mon|tues|wednes|thurs|fri|satur|sun)day|(?:jan|febr)uary|april|june|july|(?:septem|octo|novem|decem)ber"
    r"|tomorrow|noon|midnight",
    re.IGNORECASE,
)
"""Names in whatever spelling and place. "May" and "March" are also other words, "today" is often a mere filler."""
_IDIOMS = re.compile(r"\b(?:no (?:problem|worries)|not a problem|not at all|no doubt)\b", re.IGNORECASE)
_NEGATION = re.compile(
    r"\b(?:no|not|none|never|nothing|neither|nor|without|cannot|fail(?:s|ed|ure)?|unable|unavailable|unsuccessful"
    r"|unsuccessfully|declined)\b|n['’]t\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Evidence:
    """What one turn of a dialogue may speak of."""

    schema: Schema
    function: Function | None
    """The called one."""
    before: str
    """Everything said, called and observed before this turn."""
    observed: frozenset[str]
    """Values of all records observed so far, this turn's among them, as `tokens` spells them."""
    values: frozenset[str]
    """The same with the values of all the dialogue's calls in every annotated form: later calls rest on their being
    said, so what the original says of them must still be said."""


def evidence(turns: Sequence[Turn], schema: Schema) -> list[Evidence]:
    """For every turn of a dialogue. It rests on the original words only, so that turns can be rewritten in any order."""
    called = {form for turn in turns for form in _call_forms(turn)}
    before, observed, made = "", frozenset[str](), []
    for turn in turns:
        observed |= _comparable(_observed(turn.observation))
        function = schema.functions.get((turn.facts.service, turn.call.name)) if turn.call and turn.facts else None
        made.append(Evidence(schema, function, before, observed, observed | _comparable(called)))
        before = "\n".join([before, turn.user, turn.thought, _step(turn), turn.thought_after, turn.system])
    return made


def fault_in(field: str, text: object, turn: Turn, known: Evidence) -> str | None:
    """Why a rewritten `thought`, `thought_after` or `system` cannot be used, as a word for the manifest, or None."""
    original = getattr(turn, field)
    if not isinstance(text, str):
        return "missing" if text is None else "not_text"
    fault = _form_fault(text, original)
    if fault:
        return fault
    if field == "system":
        return _response_fault(text, original, known)
    if field == "thought_after":
        return _thought_after_fault(text, turn, known)
    return _thought_fault(text, turn, known)


def _form_fault(text: str, original: str) -> str | None:
    if not text.strip():
        return "empty"
    if _UNPRINTABLE.search(text.strip()):
        return "not_one_line"
    if len(text) > 2 * len(original) + LONGER_CHARACTERS:
        return "too_long"
    if _CONTROL.search(text):
        return "control_token"
    return "label" if _LABEL.search(text) else None


def _thought_fault(text: str, turn: Turn, known: Evidence) -> str | None:
    if turn.call is not None and known.function is not None:
        fault = check_thought(text, known.function, turn.call.arguments, known.schema)
    else:
        fault = "thought_inconsistent" if named_functions(text, known.schema) else None
    said = [known.before, turn.user, turn.call.text if turn.call else "", turn.thought]
    return fault or _added(text, "\n".join(said)) or _swapped(text, turn.thought)


def _thought_after_fault(text: str, turn: Turn, known: Evidence) -> str | None:
    if turn.call is None or not named_functions(text, known.schema) <= {turn.call.name}:
        return "thought_inconsistent"
    said = [known.before, turn.user, turn.thought, _step(turn), turn.thought_after, turn.system]
    original = turn.thought_after
    return _added(text, "\n".join(said)) or _swapped(text, original) or _turned_round(text, original)


def _response_fault(text: str, original: str, known: Evidence) -> str | None:
    if named_functions(text, known.schema) - named_functions(original, known.schema):
        return "function_named"
    return (
        _added(text, original)
        or _lost(text, original)
        or _values_fault(text, original, known)
        or _turned_round(text, original)
        or _reordered(text, original)
    )


def _added(text: str, allowed: str) -> str | None:
    """A number or a name that `allowed` lacks."""
    if set(numbers(text)) - set(numbers(allowed)):
        return "number_new"
    words = tokens(allowed)
    return "name_new" if any(tokens(name) not in words for name in names(text)) else None


def _swapped(text: str, original: str) -> str | None:
    """A number or a name in the place of another: a thought may leave out or add what is known, but not both."""
    mine, theirs = Counter(numbers(text)), Counter(numbers(original))
    if set(mine) - set(theirs) and theirs - mine:
        return "number_swapped"
    words = [tokens(original), tokens(text)]
    added = any(tokens(name) not in words[0] for name in names(text))
    return "name_swapped" if added and any(tokens(name) not in words[1] for name in names(original)) else None


def _lost(text: str, original: str) -> str | None:
    """A number or a name of the original that is gone."""
    words = tokens(text)
    kept = {*numbers(text), *(["1"] if " one " in words else [])}
    if set(numbers(original)) - kept:
        return "number_lost"
    return "name_lost" if any(tokens(name) not in words for name in names(original)) else None


def _values_fault(text: str, original: str, known: Evidence) -> str | None:
    mine, theirs = tokens(text), tokens(original)
    if any(value in theirs and value not in mine for value in known.values):
        return "value_lost"
    return "value_new" if any(value in mine and value not in theirs for value in known.observed) else None


def _turned_round(text: str, original: str) -> str | None:
    """A statement that became its opposite, as far as a negation shows it: "it has parking", "it has no parking"."""
    negated = [len(_NEGATION.findall(_IDIOMS.sub("", words))) for words in (text, original)]
    return "negation" if negated[0] != negated[1] else None


def _reordered(text: str, original: str) -> str | None:
    """Two times, two prices or two bare numbers in another order may have changed places."""
    for kind in {_kind(number) for number in numbers(original)}:
        orders = [list(dict.fromkeys(n for n in numbers(words) if _kind(n) == kind)) for words in (text, original)]
        if orders[0] != orders[1] and len(orders[1]) > 1:
            return "order"
    return None


def _kind(number: str) -> str:
    if number[0] in "$€£¥":
        return "price"
    return "time" if ":" in number or number.endswith(("am", "pm")) else "number"


def numbers(text: str) -> list[str]:
    """Every number in one spelling each, in order: `7 PM` and `7 p.m.` are `7pm`, `3rd` is `3`, `three` is `3`."""
    found = [(match.start(), _number(match.group())) for match in _NUMBER.finditer(text)]
    found += [(m.start(), _SMALL[m.group().lower()]) for m in _WORD.finditer(text) if m.group().lower() in _SMALL]
    return [number for _, number in sorted(found)]


def _number(text: str) -> str:
    return _ORDINAL.sub(r"\1", _HALF_DAY.sub(r"\1m", text.casefold())).replace(" ", "")


def names(text: str) -> list[str]:
    """Capitalised words that do not begin a sentence, days and months, and what stands in quotation marks."""
    found = [next(filter(None, match.groups())) for match in _QUOTED.finditer(text)]
    for match in _WORD.finditer(text):
        word = re.sub(r"['’](?:s|m|d|ll|ve|re)$", "", match.group())
        if _DAYS.fullmatch(word) or (word[0].isupper() and not _may_begin(word, text, match.start())):
            found.append(word)
    return found


def _may_begin(word: str, text: str, position: int) -> bool:
    """Whether the capital says nothing: a sentence begins here, or the word always has one."""
    start = _BEFORE_SENTENCE.search(text[max(0, position - 8) : position]) if position else True
    return bool(start) or word.lower() in _ALWAYS_CAPITAL


def _step(turn: Turn) -> str:
    return f"{turn.call.text}\n{turn.observation}" if turn.call else ""


def _call_forms(turn: Turn) -> Iterable[str]:
    if turn.call is None:
        return
    for value in map(str, turn.call.arguments.values()):
        yield value
        yield from turn.facts.surfaces.get(value, ()) if turn.facts else ()


def _observed(observation: str) -> Iterable[str]:
    """Values of the records in an observation."""
    records = json.loads(observation).get("results", []) if observation else []
    return [str(value) for record in records if isinstance(record, Mapping) for value in record.values()]


def _comparable(values: Iterable[str]) -> frozenset[str]:
    """Without truth values, which are words only, and bare numbers, which `numbers` sees to."""
    spelled = (tokens(value) for value in values if value not in ("True", "False", DONTCARE, "yes", "no", ""))
    return frozenset(s for s in spelled if not s.strip().isdigit() and s.strip() not in ("one", *_SMALL))
