"""What a response in plain words offers and tells: the database's names and attributes in it, found without any model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from coalm_nemo.evaluation.multiwoz.database import Database, Table
from coalm_nemo.evaluation.multiwoz.slots import plain, spelled
from coalm_nemo.evaluation.multiwoz.tools import PLACES

VENUES = ("attraction", "hotel", "restaurant")
_PHONE = re.compile(r"(?<!\d)0\d(?:[ -]?\d){7,10}(?!\d)")
_POSTCODE = re.compile(r"\b([a-z]{2}) ?(\d{1,2}) ?([\do][a-z]{2})\b")
"""One of the database's has a letter o for its second figure."""
_TRAIN = re.compile(r"\btr ?(\d{4})\b", re.IGNORECASE)
_REFERENCE = re.compile(r"\b(?=[A-Z0-9]*\d)[A-Z0-9]{8}\b")
_CLOCK = re.compile(r"\b\d{1,2}:\d{2}\b")
_WORDS = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Mention:
    kind: str
    """name, trainid, phone, address, postcode or reference."""
    domain: str
    records: frozenset[int]
    """Which of the domain's records it may be; empty for references and for domains without a database."""


@dataclass(frozen=True, eq=False)
class MentionFinder:
    """Finds mentions; one for all dialogues."""

    database: Database

    @cached_property
    def _spans(self) -> dict[str, list[Mention]]:
        """Words of a name or address -> what they mention."""
        found: dict[str, list[Mention]] = {}
        for domain in VENUES:
            for kind, forms in (("name", _name_forms), ("address", _address_forms)):
                for words, records in _group(self.database.tables[domain], kind, forms).items():
                    found.setdefault(words, []).append(Mention(kind, domain, records))
        for domain, place in PLACES.items():
            for words in _address_forms(place["address"]):
                found.setdefault(words, []).append(Mention("address", domain, frozenset()))
        return found

    @cached_property
    def _lengths(self) -> list[int]:
        return sorted({words.count(" ") + 1 for words in self._spans}, reverse=True)

    @cached_property
    def _codes(self) -> dict[tuple[str, str], list[Mention]]:
        """(kind, text without spaces) of phone numbers, postcodes and train numbers."""
        found: dict[tuple[str, str], list[Mention]] = {}
        for domain, table in self.database.tables.items():
            for kind in ("phone", "postcode", "trainid"):
                for code, records in _group(table, kind, lambda text: [text.replace(" ", "")]).items():
                    found.setdefault((kind, code), []).append(Mention(kind, domain, records))
        for domain, place in PLACES.items():
            for kind in ("phone", "postcode"):
                found.setdefault((kind, place[kind]), []).append(Mention(kind, domain, frozenset()))
        return found

    def find(self, words: str, references: Mapping[str, Sequence[str]]) -> list[Mention]:
        """Everything that `words` mention. `references` are those that the dialogue's bookings gave, by domain."""
        mentions = [m for _, _, found in self._in_words(_tokens(words)) for m in found]
        for kind, code in _codes(words):
            mentions += self._codes.get((kind, code), ())
        squeezed = words.replace(" ", "").upper()
        for domain, numbers in references.items():
            kind = "phone" if domain == "taxi" else "reference"
            if any(number in squeezed for number in numbers):
                mentions.append(Mention(kind, domain, frozenset()))
        return mentions

    def delexicalized(self, words: str) -> str:
        """The response with names, addresses and codes as `[name]`, `[phone]` and so on, for BLEU."""
        text = _REFERENCE.sub(" [reference] ", words)
        text = _PHONE.sub(" [phone] ", _TRAIN.sub(" [trainid] ", _CLOCK.sub(" [time] ", text))).lower()
        tokens = _POSTCODE.sub(" [postcode] ", text).split()
        spans = list(self._in_words([_bare(token) for token in tokens]))
        for start, end, found in reversed(spans):
            tokens[start:end] = [f"[{found[0].kind}]"]
        return " ".join(tokens)

    def _in_words(self, tokens: Sequence[str]) -> Iterator[tuple[int, int, list[Mention]]]:
        """The longest names and addresses from left to right, none within another."""
        start = 0
        while start < len(tokens):
            for length in self._lengths:
                found = self._spans.get(" ".join(tokens[start : start + length]))
                if found and start + length <= len(tokens):
                    yield start, start + length, found
                    start += length - 1
                    break
            start += 1


def _group(table: Table, kind: str, forms: Callable[[str], list[str]]) -> dict[str, frozenset[int]]:
    found: dict[str, set[int]] = {}
    for number, record in enumerate(table.records):
        text = next((value for key, value in record.items() if key.lower() == kind), "")
        for form in forms(text.lower()) if text else ():
            found.setdefault(form, set()).add(number)
    return {form: frozenset(numbers) for form, numbers in found.items()}


def _name_forms(text: str) -> list[str]:
    """As responses write a name; without "the", unless what is left is one common word ("the place")."""
    words = " ".join(_tokens(text))
    bare = words.removeprefix("the ")
    return list(dict.fromkeys([words, bare] if bare != "place" else [words]))


def _address_forms(text: str) -> list[str]:
    """The whole address, and its first part alone where that is a number and a street."""
    first = text.partition(",")[0].replace("city centre", "")
    forms = [" ".join(_tokens(part)) for part in (text, first)]
    return list(dict.fromkeys(form for form in forms if form == forms[0] or " " in form))


def _tokens(text: str) -> list[str]:
    return _WORDS.findall(spelled(plain(text)))


def _bare(token: str) -> str:
    return token if token.startswith("[") else " ".join(_tokens(token))


def _codes(words: str) -> Iterator[tuple[str, str]]:
    for match in _PHONE.finditer(words):
        yield "phone", re.sub(r"\D", "", match.group())
    text = re.sub(r"[.,]", "", words.lower())
    for match in _POSTCODE.finditer(text):
        yield "postcode", "".join(match.groups())
    for match in _TRAIN.finditer(words):
        yield "trainid", f"tr{match[1]}"
