"""Tokens and loss mask of a conversation: exactly the assistant's turns are learnt, in inference's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coalm_nemo.data.chat import DATE_STRING, ChatEncoder, load_tokenizer
from coalm_nemo.data.rows import Row
from coalm_nemo.data.tokens import TokenRows, tokenize_rows
from coalm_nemo.errors import UserError
from tests.tiny_llama import CHAT_TEMPLATE, SPECIAL_TOKENS

Message = dict[str, Any]
END = "<|eot_id|>"


@pytest.fixture(scope="module")
def encoder(tiny_llama: Path) -> ChatEncoder:
    return ChatEncoder(load_tokenizer(tiny_llama))


def row(*turns: tuple[str, str], tools: Any = None) -> Row:
    return Row("r", messages=[{"role": role, "content": content} for role, content in turns], tools=tools)


def supervised_texts(encoder: ChatEncoder, ids: list[int], mask: list[int]) -> list[str]:
    """The runs of supervised tokens, decoded."""
    runs: list[list[int]] = []
    for i, (token, supervised) in enumerate(zip(ids, mask, strict=True)):
        if supervised and (i == 0 or not mask[i - 1]):
            runs.append([])
        if supervised:
            runs[-1].append(token)
    return [encoder.tokenizer.decode(run, skip_special_tokens=False) for run in runs]


def rendered(encoder: ChatEncoder, messages: list[Message], prompt: bool = False) -> str:
    return str(
        encoder.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt, date_string=DATE_STRING
        )
    )


def test_one_turn(encoder: ChatEncoder) -> None:
    ids, mask = encoder.encode(row(("user", "Weather?"), ("assistant", "Rain.")))
    assert supervised_texts(encoder, ids, mask) == [f"Rain.{END}"]
    assert encoder.tokenizer.decode(ids).startswith("<|begin_of_text|><|start_header_id|>user")
    assert ids.count(encoder.tokenizer.bos_token_id) == 1


def test_many_turns_and_tools(encoder: ChatEncoder) -> None:
    turns = [
        ("system", "Be brief."), ("user", "Find a hotel."), ("assistant", '{"name": "find_hotel"}'),
        ("tool", '{"name": "Acorn"}'), ("assistant", "Acorn."), ("user", "Thanks."), ("assistant", "Bye."),
    ]  # fmt: skip
    ids, mask = encoder.encode(row(*turns))
    wanted = [text + END for role, text in turns if role == "assistant"]
    assert supervised_texts(encoder, ids, mask) == wanted
    messages = [{"role": r, "content": c} for r, c in turns]
    assert encoder.tokenizer.decode(ids, skip_special_tokens=False) == rendered(encoder, messages)


def test_what_follows_the_last_answer_is_left_out(encoder: ChatEncoder) -> None:
    short = encoder.encode(row(("user", "a"), ("assistant", "b")))
    assert encoder.encode(row(("user", "a"), ("assistant", "b"), ("user", "c"))) == short


PLAIN = st.text(st.characters(codec="utf-8", exclude_characters="<|>"), min_size=1, max_size=12).filter(str.strip)
TURNS = st.lists(st.tuples(st.sampled_from(["user", "tool", "system", "assistant"]), PLAIN), min_size=1, max_size=6)
CONVERSATIONS = TURNS.map(lambda turns: [("user", "hi"), *turns, ("assistant", "end")])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CONVERSATIONS)
def test_any_conversation(encoder: ChatEncoder, turns: list[tuple[str, str]]) -> None:
    conversation = row(*turns)
    ids, mask = encoder.encode(conversation)
    assert len(ids) == len(mask)
    answers = [i for i, (role, _) in enumerate(turns) if role == "assistant"]
    # Two answers in a row are two runs too: the header of the second stands between them.
    assert supervised_texts(encoder, ids, mask) == [turns[i][1].strip() + END for i in answers]
    whole = rendered(encoder, conversation.messages)
    assert encoder.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == whole


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CONVERSATIONS)
def test_training_sees_the_tokens_of_inference(encoder: ChatEncoder, turns: list[tuple[str, str]]) -> None:
    """A prompt made of text already generated and a new question is, piece by piece, what training saw."""
    conversation = row(*turns)
    ids, mask = encoder.encode(conversation)
    first = next(i for i, (role, _) in enumerate(turns) if role == "assistant")
    prompt = encoder.tokenizer.encode(rendered(encoder, conversation.messages[:first], True), add_special_tokens=False)
    assert ids[: len(prompt)] == prompt
    assert mask[: len(prompt) + 1] == [0] * len(prompt) + [1]
    pieces = [encoder.tokenizer.encode(text, add_special_tokens=False) for text, _ in encoder.segments(conversation)]
    assert [token for piece in pieces for token in piece] == ids


@pytest.mark.parametrize("token", [*SPECIAL_TOKENS])
@pytest.mark.parametrize("place", ["user", "assistant", "tool_calls"])
def test_control_tokens_in_the_text_are_refused(encoder: ChatEncoder, token: str, place: str) -> None:
    turns: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    if place == "tool_calls":
        turns[1]["tool_calls"] = [{"function": {"name": f"f{token}"}}]
    else:
        next(t for t in turns if t["role"] == place)["content"] += token
    with pytest.raises(UserError, match="control token"):
        encoder.encode(Row("r", messages=turns))


def test_text_rows_supervise_everything(encoder: ChatEncoder) -> None:
    ids, mask = encoder.encode(Row("r", text="The train leaves."))
    assert ids[0] == encoder.tokenizer.bos_token_id and ids[-1] == encoder.tokenizer.eos_token_id
    assert mask == [1] * len(ids)


def test_token_rows_are_taken_as_they_are(encoder: ChatEncoder) -> None:
    assert encoder.encode(Row("r", token_ids=[5, 6, 7], loss_mask=[0, 0, 1])) == ([5, 6, 7], [0, 0, 1])
    assert encoder.encode(Row("r", token_ids=[5, 6])) == ([5, 6], [1, 1])


def test_the_date_of_the_day_does_not_matter(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    tokenizer.chat_template = "{{- date_string | default(strftime_now('%d %b %Y')) }}" + CHAT_TEMPLATE
    ids, _ = ChatEncoder(tokenizer).encode(row(("user", "a"), ("assistant", "b")))
    assert tokenizer.decode(ids).startswith(DATE_STRING)


def test_rows_that_do_not_fit_or_teach_nothing(encoder: ChatEncoder) -> None:
    rows = [
        Row("long", token_ids=list(range(1, 12))),
        Row("idle", token_ids=[1, 2], loss_mask=[1, 0]),
        Row("ok", token_ids=[3, 4]),
    ]
    with pytest.raises(UserError, match="^long has 11 tokens"):
        tokenize_rows(rows, encoder, max_positions=9)
    with pytest.raises(UserError, match="^idle has no supervised token"):
        tokenize_rows(rows, encoder, max_positions=10)
    kept = tokenize_rows(rows, encoder, max_positions=9, overlong="drop", empty="drop")
    assert kept.row_ids == ["ok"]
    with pytest.raises(UserError, match="all were dropped"):
        tokenize_rows(rows[:1], encoder, max_positions=9, overlong="drop")


def test_tokens_survive_the_disk(encoder: ChatEncoder, tmp_path: Path) -> None:
    rows = tokenize_rows([Row("a", token_ids=[3, 4, 5]), Row("b", text="cat")], encoder, max_positions=99)
    for _ in range(2):  # a second save takes the place of the first
        rows.save(tmp_path / "rows")
    loaded = TokenRows.load(tmp_path / "rows")
    assert (loaded.row_ids, loaded.fingerprint, len(loaded)) == (["a", "b"], rows.fingerprint, 2)
    assert loaded.row(0)[0].tolist() == [3, 4, 5] and loaded.positions()[0] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["rows"]
