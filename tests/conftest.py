"""Fixtures shared by all tests."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def ranks_pool() -> object:
    """Starts ranks by forking this process, whose imports they share."""
    from tests.training.ranks_pool import RanksPool

    return RanksPool()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random four-layer Llama with grouped queries and an output head of its own."""
    from tests.tiny_llama import make_tiny_llama

    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "untied", num_layers=4)


@pytest.fixture(scope="session")
def tiny_llama_tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shape with the output head tied to the embedding."""
    from tests.tiny_llama import make_tiny_llama

    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "tied", num_layers=4, tied=True)


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 Alpaca rows whose answers have very uneven lengths."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 48)


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    """Rows of 1 to 14 words to repeat; some answers are one word."""
    draw = random.Random(seed)
    words = ["red", "train", "hotel", "cat", "12", "go to", "north", "Anna"]
    with path.open("w", encoding="utf-8") as out:
        for number in range(count):
            text = [draw.choice(words) for _ in range(draw.randint(1, 14))]
            answer = text[: 1 if number % 3 == 0 else len(text)]
            row = {"id": f"row{number}", "instruction": "Repeat.", "input": " ".join(text), "output": " ".join(answer)}
            out.write(json.dumps(row) + "\n")
    return path
