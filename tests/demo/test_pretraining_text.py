"""The copying curriculum: rows of exactly the stage's length, the same for the same seed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from coalm_nemo.demo.pretraining_text import Stage, random_repeats, stage_rows, write_stage


@pytest.fixture(scope="module")
def bpe(tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))


@pytest.mark.parametrize("length", [32, 64, 128])
def test_rows_are_as_long_as_the_stage(bpe: Tokenizer, length: int) -> None:
    rows = list(stage_rows(bpe, Stage("s", length, 50, 0.5), seed=0))
    assert len(rows) == 50 and all(len(r) == length for r in rows)
    assert all(0 <= i < bpe.get_vocab_size() for r in rows for i in r)


def test_file_is_deterministic(bpe: Tokenizer, tmp_path: Path) -> None:
    stage = Stage("s", 32, 20, 0.5)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_stage(tmp_path / name, bpe, stage, seed)
    a, b, c = ((tmp_path / n).read_text() for n in "abc")
    assert a == b != c
    assert list(json.loads(a.splitlines()[0])) == ["token_ids"]


def test_repeats_say_nothing_new_after_the_first_run() -> None:
    ids = random_repeats(random.Random(0), list(range(100)), 64)
    assert len(ids) == 64 and set(ids) == set(ids[:32])
