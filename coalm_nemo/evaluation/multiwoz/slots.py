"""MultiWOZ's domains, slots, and what their values look like when they are written the same way.

A slot is called `domain-name` with the names of release 2.2 (`hotel-bookday`, `train-leaveat`); data.json's `book` and
`semi` names are mapped to them.
"""

from __future__ import annotations

import re
from functools import lru_cache

DOMAINS: dict[str, tuple[str, ...]] = {
    "attraction": ("area", "name", "type"),
    "hotel": (
        "area",
        "bookday",
        "bookpeople",
        "bookstay",
        "internet",
        "name",
        "parking",
        "pricerange",
        "stars",
        "type",
    ),
    "restaurant": ("area", "bookday", "bookpeople", "booktime", "food", "name", "pricerange"),
    "taxi": ("arriveby", "departure", "destination", "leaveat"),
    "train": ("arriveby", "bookpeople", "day", "departure", "destination", "leaveat"),
    "hospital": ("department",),
}
SLOTS = tuple(f"{domain}-{slot}" for domain, slots in DOMAINS.items() for slot in slots)
TRACKED = tuple(slot for slot in SLOTS if not slot.startswith("hospital-"))
"""The 30 that public results count; the test split has no dialogue about the hospital."""

DONTCARE = "dontcare"
NUMBERS = frozenset({"bookpeople", "bookstay", "stars"})
TIMES = frozenset({"arriveby", "leaveat", "booktime"})
FREE_FORM = frozenset({"name", "departure", "destination", "department"})
"""Where fuzzy comparison makes sense: a time or number that is nearly right is wrong."""

_NOT_GIVEN = frozenset({"", "none", "not mentioned", "not given", "null", "notmentioned", "unknown"})
_ANY = frozenset(
    {"dontcare", "dont care", "do not care", "do nt care", "doesnt matter", "does not matter", "any", "anything"}
    | {"either", "no preference", "dont mind", "do not mind", "whatever"}
)
_WORD_NUMBERS = {"zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"} | {
    "seven": "7", "eight": "8", "nine": "9", "ten": "10", "eleven": "11", "twelve": "12",
}  # fmt: skip
_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_YES_NO = {"free": "yes", "true": "yes", "y": "yes", "included": "yes", "false": "no", "n": "no"}
_TYPES = {
    "guest house": "guesthouse",
    "swimming pool": "swimmingpool",
    "pool": "swimmingpool",
    "concert hall": "concerthall",
    "night club": "nightclub",
    "club": "nightclub",
    "theater": "theatre",
    "mutliple sports": "multiple sports",
    "museums": "museum",
    "colleges": "college",
    "parks": "park",
    "hotels": "hotel",
    "guesthouses": "guesthouse",
    "guest houses": "guesthouse",
}
_AREAS = {"center": "centre", "city centre": "centre", "city center": "centre", "town centre": "centre"}
_PRICES = {"moderately": "moderate", "moderately priced": "moderate", "inexpensive": "cheap", "high end": "expensive"}
_FOODS = {
    "portugese": "portuguese",
    "intalian": "italian",
    "italain": "italian",
    "brutish": "british",
    "bristish": "british",
    "europeon": "european",
    "sea food": "seafood",
    "gastropod": "gastropub",
    "asian or oriental": "asian oriental",
    "asian and oriental": "asian oriental",
}
_NAME_WORDS = {"center": "centre", "theater": "theatre", "guesthouse": "guest house", "st": "saint"}
_NAMES = {
    "cafe uno": "caffe uno",
    "caffee uno": "caffe uno",
    "restaurant 2 two": "restaurant two two",
    "restaurant two 2": "restaurant two two",
    "restaurant 2 2": "restaurant two two",
    "restaurant 17": "restaurant one seven",
    "restaurant 1 7": "restaurant one seven",
    "lime house": "limehouse",
    "cityrooms": "cityroomz",
    "whale of time": "whale of a time",
    "rosas bed and breakfast": "rosas b and b",
    "pizza hut fenditton": "pizza hut fen ditton",
    "saint catherines college": "saint catharines college",
    "christ college": "christs college",
}
_TABLES = {"type": _TYPES, "area": _AREAS, "pricerange": _PRICES, "food": _FOODS}
_CLOCK = re.compile(r"(\d{1,2}) ?[:.h] ?(\d{2})|(\d{1,2})(\d{2})|(\d{1,2})")
_TIME_WORDS = {"noon": "12:00", "midday": "12:00", "midnight": "00:00"}


def normalize(slot: str, value: str) -> str:
    """One spelling of a slot's value: "" where none is given, `dontcare`, or the value. `slot` may have its domain in front.

    Idempotent. The rules: lower case, one space, no apostrophes; times to HH:MM, numbers and days to one form; `free`
    internet is `yes`; a few spellings of types, areas, prices, foods and names (the tables above); in names `&` is "and",
    "the" in front goes, "guesthouse" is two words, "bed and breakfast" is "b and b".
    """
    return _normalize(slot.rpartition("-")[2], value)


@lru_cache(maxsize=65536)
def _normalize(slot: str, value: str) -> str:
    """Until nothing changes: `(the) center` loses its brackets, then its article."""
    for _ in range(len(value) + 2):
        once = _normalize_once(slot, value)
        if once == value:
            break
        value = once
    return value


def _normalize_once(slot: str, value: str) -> str:
    text = plain(value)
    if text in _NOT_GIVEN:
        return ""
    if text in _ANY:
        return DONTCARE
    if slot in TIMES:
        return _time(text)
    if slot in NUMBERS:
        return _number(text)
    if slot in ("bookday", "day"):
        return next((day for day in _DAYS if len(text) > 2 and day.startswith(text)), text)
    if slot in ("internet", "parking"):
        return _YES_NO.get(text, text)
    return name(text) if slot in FREE_FORM else _TABLES.get(slot, {}).get(text, text)


def plain(value: str) -> str:
    """Lower case without apostrophes, hyphens and full stops at the end; one space between words."""
    text = value.replace("\u2019", "'").replace("\u2018", "'").casefold()
    text = text.replace("'", "").replace("-", " ").replace("_", " ")
    return " ".join(text.split()).strip(" .,?!")


def name(text: str) -> str:
    """A name or place, from `plain` text."""
    words = spelled(text).split()
    while len(words) > 1 and words[0] == "the":
        words = words[1:]
    joined = " ".join(words)
    return _NAMES.get(joined, joined)


def spelled(text: str) -> str:
    """`plain` text with the words of names written one way."""
    text = " ".join(text.replace("&", " and ").split()).replace("bed and breakfast", "b and b")
    return " ".join(_NAME_WORDS.get(word, word) for word in re.sub(r"[,.()]", " ", text).split())


def _time(text: str) -> str:
    """`5 pm`, `17.00`, `1700` and `17 :00` are 17:00; what is no time stays as it is."""
    if text in _TIME_WORDS:
        return _TIME_WORDS[text]
    bare = re.sub(r"^(at|by|after|before|around|about) ", "", text)
    afternoon = re.search(r" ?p\.? ?m$", bare)
    morning = re.search(r" ?a\.? ?m$", bare)
    bare = re.sub(r" ?[ap]\.? ?m$| ?o ?clock$", "", bare)
    match = _CLOCK.fullmatch(bare)
    if match is None:
        return text
    hour, minute = int(match[1] or match[3] or match[5]), int(match[2] or match[4] or 0)
    hour += 12 * (bool(afternoon) and hour < 12) - 12 * (bool(morning) and hour == 12)
    return f"{hour:02}:{minute:02}"


def _number(text: str) -> str:
    first = text.split()[0] if text.split() else text
    first = _WORD_NUMBERS.get(first, first)
    return str(int(first)) if first.isascii() and first.isdigit() and len(first) < 9 else text


def minutes(time: str) -> int | None:
    """Since midnight, of a normalised time; None where it is none. Trains of the night arrive at 24:43."""
    match = re.fullmatch(r"(\d{2}):(\d{2})", time)
    return 60 * int(match[1]) + int(match[2]) if match else None
