"""Masks are exact whatever the texts hold; what is too long loses its oldest turns and never a target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coalm_nemo.data.chat import ChatEncoder
from coalm_nemo.data.chat_format import FORMATS
from coalm_nemo.data.encoding import EncodedRow, RowEncoder
from coalm_nemo.data.rows import Row
from coalm_nemo.data.sources.base import Dropped
from coalm_nemo.errors import UserError
from tests.tiny_llama import SPECIAL_TOKENS

END = "<|eot_id|>"
FAR = 10**6


@pytest.fixture(scope="module")
def encoder(tiny_llama: Path) -> RowEncoder:
    return RowEncoder(tiny_llama)


def row(*turns: tuple[str, str], tools: Any = None) -> Row:
    return Row("r", messages=[{"role": role, "content": content} for role, content in turns], tools=tools)


def encode(encoder: RowEncoder, conversation: Row, loss: str = "last", max_tokens: int = FAR) -> list[EncodedRow]:
    entries = encoder.encode([conversation], loss=loss, max_tokens=max_tokens)
    assert all(isinstance(e, EncodedRow) for e in entries), entries
    return [e for e in entries if isinstance(e, EncodedRow)]


def targets(encoder: RowEncoder, encoded: EncodedRow) -> list[str]:
    """The runs of supervised tokens, decoded."""
    edges = np.flatnonzero(np.diff(encoded.loss_mask, prepend=0, append=0))
    runs = [encoded.tokens[a:b].tolist() for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return [encoder.hf_tokenizer.decode(run, skip_special_tokens=False) for run in runs]


plain = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
forged = st.lists(st.one_of(plain, st.sampled_from(SPECIAL_TOKENS)), min_size=1, max_size=4).map("".join)
texts = forged.filter(lambda t: bool(t.strip()))
dialogues = st.lists(st.tuples(texts, texts), min_size=1, max_size=4)


@given(pairs=dialogues, system=st.one_of(st.none(), texts), loss=st.sampled_from(["last", "all"]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_targets_are_the_answers_and_their_end_and_nothing_else(
    encoder: RowEncoder, pairs: list[tuple[str, str]], system: str | None, loss: str
) -> None:
    """Also where a text spells control tokens: they stay text, so no turn is forged and no target ends early."""
    turns = [("system", system)] if system is not None else []
    for question, answer in pairs:
        turns += [("user", question), ("assistant", answer)]
    (encoded,) = encode(encoder, row(*turns), loss)
    answers = [answer.strip() + END for _, answer in pairs]
    assert targets(encoder, encoded) == (answers if loss == "all" else answers[-1:])
    assert encoded.tokens.tolist().count(encoder.control[END]) == len(turns)
    assert encoder.hf_tokenizer.decode(encoded.tokens.tolist(), skip_special_tokens=False) == encoder.format.render(
        row(*turns).messages, None, encoder.bos
    )


@given(pairs=st.lists(st.tuples(plain, plain), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_encoder_of_json_lines_gives_the_same(encoder: RowEncoder, pairs: list[tuple[str, str]]) -> None:
    """An independent way to the same mask: it cuts what the chat template renders."""
    turns: list[tuple[str, str]] = []
    for question, answer in pairs:
        turns += [("user", question), ("assistant", f"a{answer}")]
    if any(token in text for token in SPECIAL_TOKENS for _, text in turns):
        return
    (encoded,) = encode(encoder, row(*turns), "all")
    tokens, mask = ChatEncoder(encoder.hf_tokenizer).encode(row(*turns))
    assert (encoded.tokens.tolist(), encoded.loss_mask.tolist()) == (tokens, mask)
    encoder.check_rendering(encoded, tokens_too=True)


def test_turns_after_the_last_answer_are_left_out(encoder: RowEncoder) -> None:
    (encoded,) = encode(encoder, row(("user", "a"), ("assistant", "b"), ("user", "and?")))
    assert "and?" not in encoder.hf_tokenizer.decode(encoded.tokens.tolist())
    assert encoded.tokens[-1] == encoder.control[END]


def test_calls_and_results(tiny_llama: Path) -> None:
    """In Llama 3.1's format a call is a target like any answer, its result is read."""
    encoder = RowEncoder(tiny_llama)
    encoder.format = FORMATS["llama3.1"]
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    messages = [
        {"role": "user", "content": "q"},
        call,
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "Seven."},
    ]
    (encoded,) = encode(encoder, Row("r", messages=messages, tools=[{"name": "f"}]), "all")
    assert targets(encoder, encoded) == ['{"name": "f", "parameters": {"a": 1}}' + END, "Seven." + END]


def test_oldest_exchanges_go_first(encoder: RowEncoder) -> None:
    turns = [("system", "S.")] + [(role, f"{role[0]}{i} " * 4) for i in range(8) for role in ("user", "assistant")]
    (whole,) = encode(encoder, row(*turns))
    limit = len(whole.tokens) - 1
    (shorter,) = encode(encoder, row(*turns), max_tokens=limit)
    text = encoder.hf_tokenizer.decode(shorter.tokens.tolist(), skip_special_tokens=False)
    assert len(shorter.tokens) <= limit
    assert ("u0" not in text, "u1" in text, "S." in text) == (True, True, True)
    assert targets(encoder, shorter) == targets(encoder, whole)
    encoder.check_rendering(shorter, tokens_too=True)


@given(limit=st.integers(10, 260))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_target_is_lost_or_cut_with_loss_on_all_turns(encoder: RowEncoder, limit: int) -> None:
    """A dialogue that is too long becomes several rows; each answer is a target once, or counted as dropped."""
    turns = [(role, f"{role[0]}{i} " * (1 + i % 3)) for i in range(9) for role in ("user", "assistant")]
    entries = encoder.encode([row(*turns)], loss="all", max_tokens=limit)
    rows = [e for e in entries if isinstance(e, EncodedRow)]
    found = [t for e in rows for t in targets(encoder, e)]
    answers = [text.strip() + END for role, text in turns if role == "assistant"]
    assert all(len(e.tokens) <= limit for e in rows)
    assert found == [a for a in answers if a in found]
    assert len(found) + sum(isinstance(e, Dropped) for e in entries) == len(answers)
    for e in rows:
        encoder.check_rendering(e, tokens_too=True)


def test_written_history_loses_its_oldest_turns(encoder: RowEncoder) -> None:
    history = "".join(f"User: u{i}\nThought: t{i}\nSystem: s{i}\n" for i in range(6))
    prompt = f"Task.\n[BEGIN OF CONVERSATION HISTORY]\n{history}[END OF CONVERSATION HISTORY]\n\nUser: now"
    (whole,) = encode(encoder, row(("user", prompt), ("assistant", "System: yes")))
    (shorter,) = encode(encoder, row(("user", prompt), ("assistant", "System: yes")), max_tokens=len(whole.tokens) - 20)
    text = encoder.hf_tokenizer.decode(shorter.tokens.tolist(), skip_special_tokens=False)
    assert "s0" not in text
    assert "[BEGIN OF CONVERSATION HISTORY]\nUser: u" in text
    assert "Task." in text
    assert "System: s5\n[END" in text
    assert targets(encoder, shorter) == [f"System: yes{END}"]


def test_what_fits_in_no_way_is_dropped_and_counted(encoder: RowEncoder) -> None:
    entries = encoder.encode([row(("user", "a"), ("assistant", "b " * 50))], loss="last", max_tokens=20)
    assert entries == [Dropped("too_long", "r")]


def test_a_row_that_the_template_renders_otherwise_stops_the_build(tiny_llama: Path) -> None:
    encoder = RowEncoder(tiny_llama)
    encoder.hf_tokenizer.chat_template = encoder.hf_tokenizer.chat_template.replace("| trim", "| trim | upper")
    (encoded,) = encode(encoder, row(("user", "quiet"), ("assistant", "yes")))
    with pytest.raises(UserError, match=r"r: at character \d+, we write .*quiet.*, the template .*QUIET"):
        encoder.check_rendering(encoded, tokens_too=False)


def test_a_tokenizer_without_llama3s_control_tokens_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        text = (tiny_llama / name).read_text().replace("<|start_header_id|>", "<|begin_header_id|>")
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="does not write the|has no token"):
        RowEncoder(tmp_path)
