"""Training rows that hold what an evaluation asks: found by shared 13-grams of words, or as whole short requests.

Thirteen words as in GPT-3's overlap analysis (Brown et al. 2020, appendix C), which also passes over n-grams that are too
frequent to be anybody's content. Words are compared after NFKC, case folding, and with everything that is neither letter
nor digit as a space.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import numpy as np

from coalm_nemo.errors import UserError

NGRAM = 13
"""Words in a row that two texts do not share by chance."""

SHORTEST_EXACT = 5
"""Words below which a whole turn says nothing of its origin ("yes thanks")."""

COMMON_ITEMS, COMMON_SHARE = 10, 0.05
"""What occurs in more items than both of these, of the whole evaluation or of one of its files, is a prompt."""

_UNKNOWN = 0x9E3779B97F4A7C15
"""Code of a word that no evaluation item has, and of the end of a text."""

_TEXT_END = "\n"
"""Stands between the words of two texts; no word equals it."""


@dataclass(frozen=True)
class Overlap:
    """What a training row shares with an evaluation item."""

    kind: Literal["exact", "ngram"]
    item_id: str
    """FILE:ID of the evaluation item."""
    words: str
    """The normalised words that both have."""


@dataclass(frozen=True)
class EvaluationItems:
    """What evaluation items say, ready to be looked up. Picklable, a few times the size of the files' language."""

    ids: list[str]
    texts: list[str]
    """Each item's normalised texts, each between spaces: a hit's words are compared here, so hashes cannot deceive."""
    vocabulary: dict[str, int]
    """Word -> its 64-bit code."""
    ngrams: np.ndarray
    """uint64 [n], sorted: hashes of the items' 13-grams"""
    ngram_items: np.ndarray
    """int32 [n]: the first item that has it"""
    beginnings: np.ndarray
    """bool [2^k]: which first k bits occur in `ngrams`; nearly every other hash is told by them."""
    requests: dict[str, int]
    """Requests of 5 to 12 words that are all that an item's user says -> the first item that has it."""
    ignored: int
    """13-grams and short requests that are so common among the items that they are prompts, not content."""

    @staticmethod
    def read(files: Sequence[Path]) -> EvaluationItems:
        """Items of .txt (one a line), .json and .jsonl files. Raises UserError naming the file and place of bad input.

        In JSON the natural language is gathered from wherever it stands, except below keys of tool definitions and
        bookkeeping. A conversation, dialogue or object is one item; each of its turns or strings is a text of its own.
        """
        ids: list[str] = []
        texts: list[list[_Text]] = []
        ends: list[int] = []
        for file in map(Path, files):
            before = len(ids)
            for item_id, value in _items(file):
                ids.append(f"{file.name}:{item_id}")
                texts.append([t for said in _strings(file, value) for t in _texts(*said)])
            if not any(texts[before:]):
                raise UserError(f"evaluation file {file} holds no text to compare training rows with")
            ends.append(len(ids))
        return _index(ids, texts, ends)

    def __len__(self) -> int:
        return len(self.ids)

    def figures(self) -> dict[str, int]:
        """For a report."""
        return {
            "evaluation_items": len(self.ids),
            "ngrams": len(self.ngrams),
            "short_requests": len(self.requests),
            "ignored_as_prompts": self.ignored,
        }

    def overlap(self, texts: Sequence[str]) -> Overlap | None:
        """The first thing that a training row's texts (its user turns and its target) share with an item.

        "ngram": thirteen words in a row of one text. "exact": a whole text, or a whole turn of a conversation in it, of 5
        to 12 words that is all that an item's user says. Shorter ones never count, nor do short answers, nor short turns of
        dialogues with several: "yes that works for me" is everybody's. (With them, one SGD training row in eight would
        be called a copy of other SGD dialogues, one in a thousand by its 13-grams.)
        """
        words: list[str] = []
        for text in texts:
            for piece in _texts(text, True):
                if len(piece.words) >= NGRAM:
                    words += piece.words
                    words.append(_TEXT_END)
                elif len(piece.words) >= SHORTEST_EXACT:
                    said = " ".join(piece.words)
                    if said in self.requests:
                        return Overlap("exact", self.ids[self.requests[said]], said)
        return self._shared_ngram(words) if len(words) >= NGRAM else None

    def _shared_ngram(self, words: list[str]) -> Overlap | None:
        codes = np.fromiter(map(self.vocabulary.get, words, repeat(_UNKNOWN)), np.uint64, len(words))
        hashes = _ngram_hashes(codes)
        for start in np.flatnonzero(self.beginnings[_beginning(hashes, self.beginnings)]).tolist():
            place = int(np.searchsorted(self.ngrams, hashes[start]))
            if place == len(self.ngrams) or self.ngrams[place] != hashes[start]:
                continue
            item, shared = int(self.ngram_items[place]), " ".join(words[start : start + NGRAM])
            if f" {shared} " in self.texts[item]:
                return Overlap("ngram", self.ids[item], shared)
        return None


# ---- text -> words

_BLOCKS = re.compile(
    r"\[BEGIN OF (TASK INSTRUCTIONS?|(?:AVAILABLE )?TOOLS|FORMAT INSTRUCTIONS?)\].*?\[END OF \1\]", re.DOTALL
)
"""Hammer's prompt, which evaluation items in its form share with every training row."""

_CUTS = re.compile(
    r"\[(?:BEGIN|END) OF [A-Z ]+\]"
    r"|^[ \t]*(user|human|customer|system|assistant|ai|bot|agent|thought|action|observation"
    r"|(?:generate )?api[ -](?:name|input|request|call|result|response))[ \t]*\d*[ \t]*:",
    re.MULTILINE | re.IGNORECASE,
)
"""Where one text ends within a string and another begins: marks, and speakers' names at the beginning of a line."""

_USERS = ("user", "human", "customer", "usr")
_ASCII = "".join(chr(i).lower() if chr(i).isalnum() else " " for i in range(128)).encode() + bytes(range(128, 256))


@dataclass(frozen=True)
class _Text:
    words: list[str]
    by_user: bool


def _texts(said: str, by_user: bool) -> Iterator[_Text]:
    """A string's texts: prompt blocks left out, a conversation written into one string cut into its turns."""
    if "[BEGIN OF " in said:
        said = _BLOCKS.sub("[END OF BLOCK]", said)
    label_and_text = [None, *_CUTS.split(said)]
    for label, text in zip(label_and_text[::2], label_and_text[1::2], strict=True):
        words = normalised_words(text or "")
        if words:
            yield _Text(words, label.lower() in _USERS if label else by_user)


def normalised_words(text: str) -> list[str]:
    """Case-folded words of letters and digits.

    Bytes are translated, and other signs replaced one by one, because that takes half the time of a regular expression.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        signs = text.encode(errors="surrogatepass").translate(None, bytes(range(128)))
        for sign in set(signs.decode(errors="surrogatepass")):
            if not sign.isalnum():
                text = text.replace(sign, " ")
    return text.encode(errors="surrogatepass").translate(_ASCII).decode(errors="surrogatepass").split()


# ---- files -> items

# fmt: off
_NO_LANGUAGE = frozenset((
    "tools", "functions", "function", "parameters", "tool_calls", "schema", "api_name", "param_dict", "result",
    "arguments", "system", "id", "role", "name", "from", "speaker", "type", "source", "split", "category", "domain",
    "domains", "url", "dialogue_id", "question_id", "service", "services", "frames", "goal", "metadata", "dialog_act",
    "span_info", "initial_config", "path", "involved_classes", "missed_function", "excluded_function",
))
"""Keys of tool definitions and calls, prompts, annotations and bookkeeping in BFCL, API-Bank, MultiWOZ and SGD."""

_NO_SPEAKERS = frozenset(("system", "tool", "ipython", "function", "api", "observation", "environment"))
"""Roles whose words come from the prompt or from a tool."""

_ANSWERS = frozenset((
    "output", "answer", "answers", "response", "completion", "target", "ground_truth", "possible_answer",
))
_ITEM_KEYS = _ANSWERS | {
    "messages", "conversations", "conversation", "question", "turns", "log", "query", "text", "input",
}
"""An object with one of these is an item; another one is a collection of items where its values are objects."""
# fmt: on


def _items(file: Path) -> Iterator[tuple[str, Any]]:
    """(id, value) of each item of a file."""
    if file.is_dir():
        raise UserError(f"evaluation items: {file} is a directory; give the files that hold the items")
    if file.suffix not in (".txt", ".json", ".jsonl"):
        raise UserError(f"evaluation file {file}: its name must end in .txt (an item a line), .json or .jsonl")
    try:
        content = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"evaluation file {file} is not UTF-8 text") from e
    except OSError as e:
        raise UserError(f"evaluation file {file} cannot be read: {e.strerror}") from e
    lines = [(n, line) for n, line in enumerate(content.split("\n"), 1) if line.strip()]
    if file.suffix == ".txt":
        return ((str(n), line) for n, line in lines)
    if file.suffix == ".json" and (whole := _whole_json(file, content, lines)) is not None:
        return _members(whole)
    values = [_parse(file, n, line) for n, line in lines]
    if _is_conversation(values):
        return iter([("1", values)])
    return (_named(str(n), value) for (n, _), value in zip(lines, values, strict=True))


def _whole_json(file: Path, content: str, lines: list[tuple[int, str]]) -> Any:
    """The file's one value; None where it holds a value a line all the same, as BFCL's .json files do."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as e:
        if len(lines) > 1:
            try:
                json.loads(lines[0][1])
                return None
            except ValueError:
                pass
        raise UserError(f"evaluation file {file} is not valid JSON ({e})") from e


def _parse(file: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UserError(f"evaluation file {file}:{number} is not valid JSON ({e})") from e


def _members(value: Any) -> Iterator[tuple[str, Any]]:
    """Items of a whole JSON file: of an array, of an object by id (MultiWOZ), of an object around an array, or one."""
    if isinstance(value, list):
        named = [_named(str(n), item) for n, item in enumerate(value, 1)]
        yield from [("1", value)] if _is_conversation(value) else named
    elif not isinstance(value, dict) or _ITEM_KEYS & value.keys():
        yield _named("1", value)
    elif len(value) > 1 and all(isinstance(v, dict) for v in value.values()):
        yield from value.items()
    else:
        for part in value.values():
            yield from _members(part) if isinstance(part, (dict, list)) else ()


def _is_conversation(values: list[Any]) -> bool:
    """Whether these are the turns of one conversation (API-Bank's own files), not items."""
    return all(isinstance(v, dict) and ("role" in v or "from" in v) for v in values)


def _named(place: str, item: Any) -> tuple[str, Any]:
    """An item by its own id if it has one."""
    own = [item[k] for k in ("id", "dialogue_id", "question_id") if k in item] if isinstance(item, dict) else []
    return str(own[0]) if own else place, item


def _strings(file: Path, value: Any) -> list[tuple[str, bool]]:
    try:
        return list(_gather(value, "", True))
    except RecursionError as e:
        raise UserError(f"evaluation file {file}: an item is nested too deeply to be read") from e


def _gather(value: Any, key: str, by_user: bool) -> Iterator[tuple[str, bool]]:
    """(string, whether a user may have said it) of a JSON value, in order."""
    if isinstance(value, str):
        yield value, by_user and key not in _ANSWERS
    elif isinstance(value, list):
        for member in value:
            yield from _gather(member, key, by_user)
    elif isinstance(value, dict):
        role = next((str(value[k]).lower() for k in ("role", "from") if k in value), "")
        speaker = role or str(value.get("speaker", "user")).lower()  # SGD's speaker SYSTEM is the assistant
        by_user = (
            by_user and key not in _ANSWERS and speaker in _USERS and not value.get("metadata")
        )  # MultiWOZ: system
        for inner, member in value.items() if role not in _NO_SPEAKERS else ():
            if inner.lower() not in _NO_LANGUAGE:
                yield from _gather(member, inner.lower(), by_user)


# ---- items -> index


def _index(ids: list[str], texts: list[list[_Text]], ends: list[int]) -> EvaluationItems:
    vocabulary = _codes(texts)
    ngrams, ngram_items = _all_ngrams(texts, vocabulary)
    ngrams, ngram_items, prompts = _without_common(ngrams, ngram_items, ends)
    requests, repeated = _requests(texts)
    return EvaluationItems(
        ids,
        ["".join(f" {' '.join(t.words)} " for t in item) for item in texts],
        vocabulary,
        ngrams,
        ngram_items,
        _beginnings(ngrams),
        requests,
        prompts + repeated,
    )


def _beginnings(ngrams: np.ndarray) -> np.ndarray:
    occur = np.zeros(2 ** max(1, (16 * len(ngrams)).bit_length()), bool)
    occur[_beginning(ngrams, occur)] = True
    return occur


def _beginning(hashes: np.ndarray, beginnings: np.ndarray) -> np.ndarray:
    """The first k bits of each hash, k as in `beginnings`."""
    return hashes >> np.uint64(65 - len(beginnings).bit_length())


def _requests(texts: list[list[_Text]]) -> tuple[dict[str, int], int]:
    """(short requests that are all that an item's user says -> the item, how many were too common to be content)."""
    said = [{" ".join(t.words) for t in item if t.by_user} for item in texts]
    in_items = Counter(turn for item in said for turn in item)
    prompts = {turn for turn, n in in_items.items() if n > max(COMMON_ITEMS, COMMON_SHARE * len(said))}
    requests: dict[str, int] = {}
    for number, item in enumerate(said):
        asked = item - prompts
        if len(asked) == 1 and _is_short(request := next(iter(asked))):
            requests.setdefault(request, number)
    return requests, sum(map(_is_short, prompts))


def _is_short(turn: str) -> bool:
    return SHORTEST_EXACT <= turn.count(" ") + 1 < NGRAM


def _codes(texts: list[list[_Text]]) -> dict[str, int]:
    """A 64-bit code for each word, the same in every process and release of Python and numpy."""
    words = sorted({w for item in texts for t in item for w in t.words})
    return dict(zip(words, np.random.PCG64(NGRAM).random_raw(len(words)).tolist(), strict=True))


def _all_ngrams(texts: list[list[_Text]], vocabulary: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """(hashes [n], item of each [n])"""
    hashes, items = [np.empty(0, np.uint64)], [np.empty(0, np.int32)]
    for number, item in enumerate(texts):
        for text in item:
            if len(text.words) >= NGRAM:
                codes = np.array([vocabulary[w] for w in text.words], np.uint64)
                hashes.append(_ngram_hashes(codes))
                items.append(np.full(len(hashes[-1]), number, np.int32))
    return np.concatenate(hashes), np.concatenate(items)


def _without_common(keys: np.ndarray, items: np.ndarray, ends: list[int]) -> tuple[np.ndarray, np.ndarray, int]:
    """(distinct keys, sorted; the first item of each; how many were left out for being in too many items)."""
    order = np.lexsort((items, keys))
    keys, items = keys[order], items[order]
    first = np.ones(len(keys), bool)
    first[1:] = (keys[1:] != keys[:-1]) | (items[1:] != items[:-1])
    keys, items = keys[first], items[first]  # each once an item
    common = [_in_too_many(keys, ends[-1] if ends else 0)]
    for start, end in zip([0, *ends], ends, strict=False):
        common.append(_in_too_many(keys[(items >= start) & (items < end)], end - start))
    distinct, places = np.unique(keys, return_index=True)
    content = ~np.isin(distinct, np.concatenate(common))
    return distinct[content], items[places[content]], int((~content).sum())


def _in_too_many(keys: np.ndarray, items: int) -> np.ndarray:
    distinct, counts = np.unique(keys, return_counts=True)
    return distinct[counts > max(COMMON_ITEMS, COMMON_SHARE * items)]


def _power(exponent: int) -> np.uint64:
    return np.uint64(pow(0x5851F42D4C957F2D, exponent, 2**64))


_BASE, _BASE_2, _BASE_4 = _power(1), _power(2), _power(4)


def _ngram_hashes(codes: np.ndarray) -> np.ndarray:
    """Word codes uint64 [n] -> hashes of each 13 in a row [n - 12]: polynomials mod 2^64, by doubling."""
    two = codes[:-1] * _BASE + codes[1:]
    four = two[:-2] * _BASE_2 + two[2:]
    eight = four[:-4] * _BASE_4 + four[4:]
    twelve = eight[:-4] * _BASE_4 + four[8:]
    return twelve[:-1] * _BASE + codes[12:]
