"""How alike two strings are, in percent, as the fuzzywuzzy package defines it over Python's own difflib.

Public evaluations compare slot values with it. The definitions are short, so no package is needed, and the figures do not
depend on whether a faster one happens to be installed.
"""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from functools import lru_cache

_NO_WORD = re.compile(r"\W")


@lru_cache(maxsize=65536)
def ratio(a: str, b: str) -> int:
    """2 x matching characters / characters of both, 0 to 100; 0 where either is empty, as there is nothing to compare."""
    if not a or not b:
        return 0
    return round(100 * SequenceMatcher(None, a, b, autojunk=False).ratio())


@lru_cache(maxsize=65536)
def partial_ratio(a: str, b: str) -> int:
    """The best `ratio` of the shorter string against as long a stretch of the longer one: 100 where it is part of it."""
    short, long = (a, b) if len(a) <= len(b) else (b, a)
    if not short:
        return 0
    blocks = SequenceMatcher(None, short, long, autojunk=False).get_matching_blocks()
    starts = {max(0, block.b - block.a) for block in blocks}
    return max(ratio(short, long[start : start + len(short)]) for start in starts)


@lru_cache(maxsize=65536)
def token_sort_ratio(a: str, b: str) -> int:
    """`ratio` of the words, without punctuation, in alphabetical order: "bistro, oak" is "oak bistro"."""
    return ratio(*(" ".join(sorted(_NO_WORD.sub(" ", text).lower().split())) for text in (a, b)))
