"""Overlap of texts: the columns that the paper prints, and the benchmark's own score of responses.

The paper's figures are most likely those of LLaMA-Factory's `ComputeSimilarity` (its public code; the paper does not say):
jieba's words, ROUGE of rouge-chinese, BLEU-4 over characters with smoothing method 3, each rounded to four digits, averaged
over items. It says nothing about whether a call is right. The libraries come with the extra `eval`.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from coalm_nemo.errors import UserError
from coalm_nemo.evaluation.fingerprint import cache_directory

COLUMNS = ("rouge_1", "rouge_2", "rouge_l", "bleu_4")
MOST_CHARACTERS = 20_000
"""ROUGE-L takes time by the product of both lengths; no gold answer is a tenth as long."""


def check_libraries() -> None:
    """Raises UserError where one is missing: no score is left out in silence."""
    try:
        with _quiet_imports():
            import jieba  # noqa: F401
            import nltk  # noqa: F401
            import rouge  # noqa: F401
            import rouge_chinese  # noqa: F401
    except ImportError as e:
        raise UserError(
            f"{e.name} is missing: install the extra, pip install 'coalm_nemo[eval]', or leave the text scores out with "
            "--option text=off"
        ) from None


def similarity(answer: str, gold: str) -> dict[str, float]:
    """COLUMNS -> percent. An answer without words scores 0."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

    answer, gold = answer[:MOST_CHARACTERS], gold[:MOST_CHARACTERS]
    hypothesis, reference = (" ".join(_jieba().cut(text)) for text in (answer, gold))
    if not hypothesis.split() or not reference.split():
        return dict.fromkeys(COLUMNS, 0.0)
    rouge = Rouge().get_scores(hypothesis, reference)[0]
    bleu = sentence_bleu([list(gold)], list(answer), smoothing_function=SmoothingFunction().method3)
    figures = (rouge["rouge-1"]["f"], rouge["rouge-2"]["f"], rouge["rouge-l"]["f"], float(bleu))
    return {name: round(100 * figure, 4) for name, figure in zip(COLUMNS, figures, strict=True)}


def response_rouge_l(answer: str, gold: str) -> float:
    """ROUGE-L F in percent with the `rouge` package, rounded to four digits of the fraction as the benchmark does it."""
    from rouge import Rouge

    answer, gold = answer[: MOST_CHARACTERS // 4], gold[: MOST_CHARACTERS // 4]
    if not answer.replace(".", "").split() or not gold.replace(".", "").split():
        return 0.0
    with _deep_recursion(len(answer.split()) + len(gold.split())):
        score = Rouge(metrics=["rouge-l"]).get_scores(answer, gold)[0]["rouge-l"]["f"]
    return 100 * round(float(score), 4)


@cache
def _jieba() -> Any:
    """The library, with its prepared dictionary below the user's own cache: its default is a fixed name in /tmp, where
    another user of the machine may have put a file."""
    with _quiet_imports():
        import jieba

    jieba.setLogLevel(logging.ERROR)
    directory = cache_directory()
    directory.mkdir(parents=True, exist_ok=True)
    jieba.dt.tmp_dir = str(directory)
    return jieba


@contextmanager
def _deep_recursion(words: int) -> Iterator[None]:
    """The package walks back through its table by recursion, a word a level."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, before + 2 * words))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


@contextmanager
def _quiet_imports() -> Iterator[None]:
    """jieba's source has escapes that newer Pythons warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
