"""The demo's tokenizer, built once for all tests of the demo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from coalm_nemo.demo.tokenizer import build_tokenizer, save_tokenizer

    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(build_tokenizer(), directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_dir)
