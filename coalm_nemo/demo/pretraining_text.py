"""The nano base's pre-training data: a curriculum in copying from context.

A small model learns the templates of tool calls at once, but without a base that copies it fills them with invented
mixtures of word pieces. So the base learns nothing but to say again what stands before: random tokens repeated, and
values without end that are said, quoted, listed under keys, or put into slots. Every row is exactly as long as its
stage and is supervised throughout, so that a stage is a plain array of tokens.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from coalm_nemo.demo.values import Value, ValueSource, invent_word, is_held_out

if TYPE_CHECKING:
    from tokenizers import Tokenizer

KINDS = ("place", "venue", "person", "place", "venue", "person", "code", "time", "date", "phone", "money", "small")
NOUNS = (
    "name", "city", "place", "town", "owner", "guest", "house", "colour", "title", "street", "friend", "origin",
    "destination", "doctor", "train",
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum: its rows' length in tokens, how many, and the share of random-token repeats."""

    name: str
    seq_len_tokens: int
    rows: int
    repeat_share: float


STAGES = (
    Stage("short", 32, 4000 * 32, repeat_share=0.6),
    Stage("middle", 64, 1200 * 16, repeat_share=0.3),
    Stage("long", 128, 3300 * 16, repeat_share=0.1),
)
"""Copying is found in the short stage, after two to three million tokens; the long one makes it exact."""


def write_stage(path: Path, tokenizer: Tokenizer, stage: Stage, seed: int) -> None:
    """Write a stage as JSON lines {"token_ids": [...]}; the same arguments give the same bytes."""
    with path.open("w", encoding="utf-8") as out:
        for ids in stage_rows(tokenizer, stage, seed):
            out.write(json.dumps({"token_ids": ids}, separators=(",", ":")) + "\n")


def stage_rows(tokenizer: Tokenizer, stage: Stage, seed: int) -> Iterator[list[int]]:
    """The stage's rows as token ids, each exactly `seq_len_tokens` long."""
    rng = random.Random(f"{seed}/{stage.name}")
    source = ValueSource(rng, "train")
    special = {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    plain = [i for i in range(tokenizer.get_vocab_size()) if i not in special]
    for _ in range(stage.rows):
        if rng.random() < stage.repeat_share:
            yield random_repeats(rng, plain, stage.seq_len_tokens)
        else:
            yield _phrase_row(source, tokenizer, stage.seq_len_tokens)


def random_repeats(rng: random.Random, tokens: list[int], length: int) -> list[int]:
    """A run of random tokens said again and again, now and then from another place in it."""
    period = rng.randint(3, max(4, length // 2))
    run = rng.sample(tokens, period)
    ids = list(run)
    while len(ids) < length:
        start = rng.randrange(period) if rng.random() < 0.3 else 0
        ids += run[start : start + rng.randint(max(2, period // 2), period)]
    return ids[:length]


def _phrase_row(source: ValueSource, tokenizer: Tokenizer, length: int) -> list[int]:
    ids: list[int] = []
    while len(ids) < length:
        # Joined before tokenising: a few phrases are one text, as they would be in a dialogue.
        text = "\n".join(make_phrase(source, length) for _ in range(2))
        ids += tokenizer.encode(text + "\n", add_special_tokens=False).ids
    return ids[:length]


def make_phrase(source: ValueSource, length: int) -> str:
    """One phrase with values that come back in it: said, quoted, under keys, or in slots of a call.

    Short rows are the easy part, in which copying is first found: few values, mostly said again in the same order.
    """
    easy = length <= 32
    values: list[Value] = []
    for _ in range(source.rng.randint(1, 2 if easy else 4)):
        alike = None if easy else _look_alike(source.rng, values)
        values.append(alike or source.draw(source.rng.choice(KINDS)))
    makers = (_say, _say, _quote, _key_values, _slots) if easy else (_say, _quote, _key_values, _slots, _slots)
    return source.rng.choice(makers)(source.rng, values)


def _look_alike(rng: random.Random, values: list[Value]) -> str | None:
    """Now and then a word that begins or ends like one before: a copy must follow more than its last piece."""
    words = [w for v in values for w in str(v).split() if w.isalpha() and len(w) >= 5]
    if not words or rng.random() < 0.7:
        return None
    word, cut = rng.choice(words), rng.choice((2, 3))
    while True:
        other = invent_word(rng)
        mixed = word[:cut] + other[cut:].lower() if rng.random() < 0.5 else other[:-cut] + word[-cut:]
        if not is_held_out(mixed):
            return mixed


def _say(rng: random.Random, values: list[Value]) -> str:
    """ "Say A, B. A, B." and the like."""
    text = ", ".join(str(v) for v in values)
    return rng.choice(("Say {t}. {t}.", "{t}. Yes, {t}.", "User: {t}.\nSystem: {t}.", "in {t} to {t}")).format(t=text)


def _quote(rng: random.Random, values: list[Value]) -> str:
    text = " ".join(str(v) for v in values)
    forms = ("Quote {t}: '{t}'", 'in {t}. "{t}"', "'{t}' is {t}", '{t} = ("{t}")', "User: {t}.\nAction: ('{t}')")
    return rng.choice(forms).format(t=text)


def _key_values(rng: random.Random, values: list[Value]) -> str:
    """Values under distinct keys, then the same keys asked in another order."""
    pairs = list(zip(rng.sample(NOUNS, len(values)), values, strict=True))
    told = ", ".join(rng.choice(("{k} {v}", "the {k} is {v}", "{v} is the {k}")).format(k=k, v=v) for k, v in pairs)
    rng.shuffle(pairs)
    if rng.random() < 0.5:
        return f"{told}. " + json.dumps(dict(pairs))
    return f"{told}. " + " ".join(f"{k}: {v}." for k, v in pairs)


def _slots(rng: random.Random, values: list[Value]) -> str:
    """Values told in a sentence, then put into the arguments of a call, strings quoted and integers bare."""
    pairs = list(zip(rng.sample(NOUNS, len(values)), values, strict=True))
    told = " and ".join(f"{k} {v}" for k, v in pairs)
    rng.shuffle(pairs)
    name = rng.choice(("Find", "Book", "Get", "Call"))
    return f"User: {told}.\nAction: {name}({', '.join(f'{k}={v!r}' for k, v in pairs)})"
