"""Calls as text and back."""

from __future__ import annotations

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coalm_nemo.data.sources.cra.literal import literal, parse_call, quoted, render_call

TEXT = st.text(st.characters(exclude_categories=()), max_size=30)
NAME = st.from_regex(r"[A-Z][a-z]{1,8}_x", fullmatch=True)


@given(TEXT)
def test_quoted_is_a_single_quoted_literal_on_one_line(text: str) -> None:
    written = quoted(text)
    assert written[0] == written[-1] == "'" and "\n" not in written
    assert ast.literal_eval(written) == text


@given(NAME, st.dictionaries(NAME, TEXT | st.integers() | st.booleans(), max_size=5))
def test_a_call_comes_back_with_its_types(name: str, arguments: dict[str, str | int | bool]) -> None:
    parsed = parse_call(render_call(name, arguments))
    assert parsed == (name, arguments)
    assert [type(v) for v in parsed[1].values()] == [type(v) for v in arguments.values()]


def test_spelling() -> None:
    assert render_call("Fn", {"a": "v", "n": 2, "b": True}) == "Fn(a='v', n=2, b=True)"
    assert literal("it's") == r"'it\'s'"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Fn",
        "Fn(",
        "Fn('v')",
        "Fn(**{'a': 1})",
        "Fn(a=1, a=2)",
        "Fn(a=b)",
        "Fn(a=[1])",
        "Fn(a=g())",
        "x.Fn()",
        "Fn();",
    ],
)
def test_anything_but_one_call_with_literal_keywords_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_call(text)
