"""Tokenising line by line gives the ids of tokenising at once, for the one word pattern it is used with."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coalm_nemo.data import line_tokenizer
from coalm_nemo.data.line_tokenizer import LLAMA3_WORDS, LineTokenizer, cuts_words_as_llama3
from tests.tiny_llama import CORPUS


def write_tokenizer(path: Path, pattern: str) -> Path:
    """A byte-level BPE that cuts words by `pattern`, with merges over white space, line breaks and digits."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    spaces = ["a\n\nb\n \n\tc  d\r\n\r\ne.\n\nf:\n  g\u2028h\u00a0i 123\n"] * 20
    tokenizer.train_from_iterator([*CORPUS, *spaces], trainer)
    tokenizer.add_special_tokens([AddedToken("<|eot_id|>", special=True, normalized=False)])
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> LineTokenizer:
    return LineTokenizer(write_tokenizer(tmp_path_factory.mktemp("llama3") / "tokenizer.json", LLAMA3_WORDS))


pieces = st.sampled_from(
    [
        "\n",
        "\r\n",
        "\r",
        " ",
        "  ",
        "\t",
        "\u00a0",
        "\u2028",
        "\x85",
        "a",
        "I'll",
        "12345",
        ".",
        "!?",
        "é",
        "漢",
        "<|eot_id|>",
        "{\n",
    ]
)
texts = st.one_of(
    st.lists(pieces, max_size=30).map("".join), st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
)


@given(batch=st.lists(texts, min_size=1, max_size=4))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lines_give_the_ids_of_the_whole(llama3: LineTokenizer, batch: list[str]) -> None:
    assert llama3.by_line
    whole = [e.ids for e in llama3.core.encode_batch(batch, add_special_tokens=False)]
    assert [ids.tolist() for ids in llama3.encode(batch)] == whole


def test_control_tokens_in_a_text_stay_text(llama3: LineTokenizer) -> None:
    (ids,) = llama3.encode(["a<|eot_id|>b"])
    assert llama3.token_id("<|eot_id|>") not in ids
    assert llama3.core.decode(ids.tolist()) == "a<|eot_id|>b"


def test_memory_is_bounded(llama3: LineTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_tokenizer, "REMEMBERED_CHARACTERS", 50)
    for i in range(20):
        llama3.encode([f"line {i}\nand another {i}\n"])
        assert llama3.characters <= 50


@pytest.mark.parametrize("pattern", [r"\s+|\S+", LLAMA3_WORDS.replace("{1,3}", "")], ids=["words", "long numbers"])
def test_any_other_pattern_is_not_cut(tmp_path: Path, pattern: str) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.json", pattern)
    assert not cuts_words_as_llama3(path)
    tokenizer = LineTokenizer(path)
    text = "a\n\n\nb 1234\nc"
    assert tokenizer.encode([text])[0].tolist() == tokenizer.core.encode(text, add_special_tokens=False).ids


def test_a_plain_byte_level_tokenizer_is_not_cut(tiny_llama: Path) -> None:
    assert not cuts_words_as_llama3(tiny_llama / "tokenizer.json")
