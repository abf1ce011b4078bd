"""The nano tokenizer: nothing is lost, a value is the same tokens everywhere, chats render as Llama 3's do."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coalm_nemo.demo.rows import held_out_rows, to_messages, training_rows
from coalm_nemo.demo.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE, build_tokenizer
from coalm_nemo.demo.values import ValueSource

MAX_ROW_TOKENS = 160
CONTEXTS = ("in {v}.", "F(a='{v}', b=2)", '{{"a": "{v}"}}', "F({v})", "a={v}", "User: {v} please.", "[{v}]")


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_size_and_special_tokens(tokenizer: Any) -> None:
    assert len(tokenizer) == VOCAB_SIZE
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>",
    )  # fmt: skip


def test_building_is_deterministic() -> None:
    first, second = (build_tokenizer(dialogues=100, fresh_words=2000).to_str() for _ in range(2))
    assert first == second


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
def test_any_text_survives(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(ids_of(tokenizer, text)) == text


@settings(max_examples=300, deadline=None)
@given(text=st.text("""'"(=[ a1B.,:{}\n""", max_size=40))
def test_text_around_quotes_and_spaces_survives(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(ids_of(tokenizer, text)) == text


@pytest.mark.parametrize("kind", ["place", "venue", "person", "code", "time", "date", "phone"])
def test_a_value_is_the_same_tokens_in_every_context(tokenizer: Any, kind: str) -> None:
    source = ValueSource(random.Random(1), "names" if kind == "person" else "words")
    for _ in range(30):
        value = str(source.draw(kind))
        wanted = ids_of(tokenizer, f" {value}")
        for context in CONTEXTS:
            ids = ids_of(tokenizer, context.format(v=value))
            assert any(ids[i : i + len(wanted)] == wanted for i in range(len(ids))), (context, value)


def test_digits_are_single(tokenizer: Any) -> None:
    assert len(ids_of(tokenizer, " 8267")) == 4


def test_rows_are_short(tokenizer: Any) -> None:
    lengths = [
        len(ids_of(tokenizer, tokenizer.apply_chat_template(to_messages(r), tokenize=False)))
        for r in training_rows(0, 300) + [t.row for t in held_out_rows(0, "words", 100)]
    ]
    assert max(lengths) <= MAX_ROW_TOKENS
    assert sum(lengths) / len(lengths) < 90


def test_llama_header_format(tokenizer: Any) -> None:
    chat = [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "Hi"},
        {"role": "tool", "content": {"count": 0}},
    ]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        '<|start_header_id|>ipython<|end_header_id|>\n\n{"count": 0}<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_prefix_of_a_chat_is_a_prefix_of_its_text_and_of_its_tokens(tokenizer: Any) -> None:
    for row in training_rows(2, 60):
        messages = [{"role": "system", "content": "You call tools."}, *to_messages(row), *to_messages(row)]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        for i in range(1, len(messages)):
            asks = messages[i]["role"] == "assistant"
            part = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=asks)
            assert whole.startswith(part)
            assert ids_of(tokenizer, whole)[: len(ids_of(tokenizer, part))] == ids_of(tokenizer, part)
