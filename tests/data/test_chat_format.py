"""Our turns against chat templates: the published Llama 3.1 layout, and a template that is not one of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coalm_nemo.data.chat import load_tokenizer
from coalm_nemo.data.chat_format import (
    FORMATS,
    ChatFormat,
    Unrenderable,
    choose_format,
    first_difference,
    render_with_template,
)
from coalm_nemo.errors import UserError

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find_hôtel",
            "description": "Rooms in a town.",
            "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
        },
    }
]
CALL = {
    "role": "assistant",
    "tool_calls": [{"function": {"name": "find_hôtel", "arguments": {"town": "Lyon", "n": 2}}}],
}
LLAMA31 = FORMATS["llama3.1"]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return load_tokenizer(tiny_llama)


def messages(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def test_llama31_layout_is_the_published_one() -> None:
    """Written out from Meta's prompt format: dates in a system turn, tools in the user's, calls and results as JSON."""
    conversation = [
        *messages(("system", " Be brief. "), ("user", "A room in Lyon?")),
        CALL,
        *messages(("tool", '{"free": 3}'), ("assistant", "Three are free.")),
    ]
    tool = json.dumps(TOOLS[0], ensure_ascii=False, indent=4)
    assert LLAMA31.render(conversation, TOOLS, "<|begin_of_text|>") == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nGiven the following functions, please respond with a JSON for a "
        "function call with its proper arguments that best answers the given prompt.\n\nRespond in the format "
        '{"name": function name, "parameters": dictionary of argument name and its value}.Do not use variables.\n\n'
        f"{tool}\n\nA room in Lyon?<|eot_id|>"
        '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "find_hôtel", "parameters": {"town": "Lyon", "n": 2}}'
        '<|eot_id|><|start_header_id|>ipython<|end_header_id|>\n\n"{\\"free\\": 3}"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\nThree are free.<|eot_id|>"
    )


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(lambda t: bool(t.strip()))
turns = st.lists(st.tuples(texts, texts), min_size=1, max_size=4)


@pytest.mark.parametrize("chat_format", FORMATS.values(), ids=FORMATS)
@given(pairs=turns, system=st.one_of(st.none(), texts), with_tools=st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_template_and_turns_write_the_same(
    tokenizer: Any, chat_format: ChatFormat, pairs: list[tuple[str, str]], system: str | None, with_tools: bool
) -> None:
    """What training renders is what the exported Jinja template renders."""
    conversation = messages(("system", system)) if system is not None else []
    for question, answer in pairs:
        conversation += messages(("user", question), ("assistant", answer))
    tools = TOOLS if with_tools and chat_format is LLAMA31 else None
    if tools:
        conversation += [CALL, *messages(("ipython", pairs[0][1]), ("assistant", pairs[0][0]))]
    tokenizer.chat_template = chat_format.template
    theirs = render_with_template(tokenizer, conversation, tools)
    assert chat_format.render(conversation, tools, str(tokenizer.bos_token)) == theirs


@pytest.mark.parametrize("name", FORMATS)
def test_auto_finds_the_format_a_template_speaks(tokenizer: Any, name: str) -> None:
    tokenizer.chat_template = FORMATS[name].template
    assert choose_format("auto", tokenizer).name == name


def test_no_template_means_llama31(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    assert choose_format("auto", tokenizer).name == "llama3.1"


@pytest.mark.parametrize(
    ("broken", "shown"),
    [
        (LLAMA31.template.replace("{{- '<|eot_id|>' }}{%- endfor", "{%- endfor"), "<|eot_id|>"),
        (LLAMA31.template.replace("December 2023", "December 2024"), "2023"),
        ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}", "im_start"),
    ],
    ids=["no end of turn", "another date", "another family"],
)
def test_another_template_is_refused_with_the_first_difference(tokenizer: Any, broken: str, shown: str) -> None:
    tokenizer.chat_template = broken
    with pytest.raises(UserError, match="at character") as refused:
        choose_format("auto", tokenizer)
    assert shown in str(refused.value)


def test_a_named_format_has_to_be_the_templates(tokenizer: Any) -> None:
    tokenizer.chat_template = FORMATS["llama3"].template
    with pytest.raises(UserError, match=r"does not write the llama3\.1 format"):
        choose_format("llama3.1", tokenizer)


def test_first_difference_of_a_prefix() -> None:
    assert "at character 3" in first_difference("abc", "abcd")


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({**CALL, "tool_calls": CALL["tool_calls"] * 2}, "several_calls_in_a_turn"),
        ({**CALL, "content": "I call."}, "text_beside_a_call"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}, "malformed_tool_call"),
    ],
)
def test_what_llama31_cannot_write(message: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unrenderable, match=reason):
        LLAMA31.turns([*messages(("user", "a")), message], None)


def test_llama3_has_no_tools() -> None:
    with pytest.raises(Unrenderable, match="format_has_no_tools"):
        FORMATS["llama3"].turns(messages(("user", "a"), ("assistant", "b")), TOOLS)
