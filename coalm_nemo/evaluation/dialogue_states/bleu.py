"""Corpus BLEU of responses (Papineni et al. 2002) with the tokens and smoothing of sacrebleu's default."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

MAX_ORDER = 4

_SPLIT = (
    (re.compile(r"([{-~\[-` -&(-+:-@/])"), r" \1 "),
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


def corpus_bleu(answers: Sequence[str], references: Sequence[str]) -> float:
    """0 to 100, one reference an answer. Orders without any match count as half, a quarter, ... of a match."""
    matches, totals = [0] * MAX_ORDER, [0] * MAX_ORDER
    answer_length = reference_length = 0
    for answer, reference in zip(answers, references, strict=True):
        said, wanted = tokens(answer), tokens(reference)
        answer_length, reference_length = answer_length + len(said), reference_length + len(wanted)
        for order in range(MAX_ORDER):
            have = _ngrams(said, order + 1)
            matches[order] += sum((have & _ngrams(wanted, order + 1)).values())
            totals[order] += sum(have.values())
    if not matches[0] or not totals[-1]:
        return 0.0  # nothing in common, or no answer of four words
    brevity = min(0.0, 1 - reference_length / answer_length)
    return 100 * math.exp(brevity + _mean_log_precision(matches, totals))


def _mean_log_precision(matches: Sequence[int], totals: Sequence[int]) -> float:
    logs, share = [], 1.0
    for match, total in zip(matches, totals, strict=True):
        share = share / 2 if not match else share
        logs.append(math.log((match or share) / total))
    return sum(logs) / MAX_ORDER


def tokens(text: str) -> list[str]:
    """mteval's 13a tokenization: punctuation apart, except within numbers."""
    text = f" {' '.join(text.split())} "
    for pattern, replacement in _SPLIT:
        text = pattern.sub(replacement, text)
    return text.split()


def _ngrams(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))
