"""Reading calls: every form that models write, every way to get it wrong, and nothing ever run."""

from __future__ import annotations

import ast
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.fuzz_calls import FORBIDDEN_EVENTS, REAL, audited, mutate
from coalm_nemo.evaluation.calls import (
    MAX_CHARS,
    Call,
    parse_calls,
    parse_literal,
    parse_state,
    render_call,
    same_call,
)

F, G = Call("f", {"a": 1}), Call("g", {"b": "x"})
SOUND: list[tuple[str, str, list[Call]]] = [
    # text, form, calls
    ("[f(a=1), g(b='x')]", "python", [F, G]),
    ("  f(a=1)\n", "python", [F]),
    ("f(a=1), g(b='x')", "python", [F, G]),
    ("f(a=1)\ng(b='x')", "python", [F, G]),
    ("[f(a=1)]<|eot_id|>", "python", [F]),
    ("[math.hypot(x=-3, y=+4.5e-1)]", "python", [Call("math.hypot", {"x": -3, "y": 0.45})]),
    ("[Market Trends API(kind='INDEXES')]", "python", [Call("Market Trends API", {"kind": "INDEXES"})]),
    ("[/v1/users/get(id=7)]", "python", [Call("/v1/users/get", {"id": 7})]),
    (
        "[f(a=[1, [2, 'b']], d={'k': {'n': None}}, t=(1, 2), y=True, z=false, w=null)]", "python",
        [Call("f", {"a": [1, [2, "b"]], "d": {"k": {"n": None}}, "t": [1, 2], "y": True, "z": False, "w": None})],
    ),
    ("[f(a=1,)]", "python", [F]),
    (r"[f(a='it\'s', b=\"q\")]".replace(r"\"", '"'), "python", [Call("f", {"a": "it's", "b": "q"})]),
    (r"[f(a='\n\t\\\x41\u00e9\U0001F600\q')]", "python", [Call("f", {"a": "\n\t\\Aé😀\\q"})]),
    ("[f(a='),]}')]", "python", [Call("f", {"a": "),]}"})]),
    ("[f()]", "python", [Call("f", {})]),
    ('[{"name": "f", "arguments": {"a": 1}}]', "json", [F]),
    ('{"name": "f", "parameters": {"a": 1}}', "json", [F]),
    ('{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {"b": "x"}}', "json", [F, G]),
    ('{"type": "function", "function": {"name": "f", "arguments": "{\\"a\\": 1}"}}', "json", [F]),
    ("[{'name': 'f', 'arguments': {'a': True}}]", "json", [Call("f", {"a": True})]),
    ('{"name": "f", "arguments": {"a": "\\ud83d\\ude00 \\/"}}', "json", [Call("f", {"a": "😀 /"})]),
    ('```json\n[{"name": "f", "arguments": {"a": 1}}]\n```', "json", [F]),
    ('Sure:\n```\n{"name": "f", "arguments": {"a": 1}}\n```\nDone.', "json", [F]),
    ("```python\nf(a=1)\n```", "python", [F]),
    ("```\nnotes\n```\n```tool_code\n[f(a=1)]", "python", [F]),
    ("I will look. [f(a=1)] That is all.", "python", [F]),
    ("See [1] and {x}.\nf(a=1)", "python", [F]),
    ("Action: f(a=1)", "action", [F]),
    ("Thought: I need it. (Not [this].)\nAction 1: f(a=1)\nObservation: {}\nAction: g(b='x')", "action", [F]),
    ("[f(a='<tool_call>')]<|eot_id|><|eot_id|>", "python", [Call("f", {"a": "<tool_call>"})]),
    ("Action: f(a='<tool_call>')", "action", [Call("f", {"a": "<tool_call>"})]),
    ('<tool_call>f(a="</tool_call>")</tool_call>', "tool_call", [Call("f", {"a": "</tool_call>"})]),
    ("Action: [f(a=1), g(b='x')]", "action", [F, G]),
    ('Action: {"name": "f", "arguments": {"a": 1}}\nSystem: done', "action", [F]),
    ("Action: f(a=1)\nAction: g(b='x')", "action", [F, G]),
    ("<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>", "tool_call", [F]),
    ('<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call><tool_call>g(b="x")</tool_call>', "tool_call", [F, G]),
    ('<tool_call>{"name": "f", "arguments": {"a": 1}}', "tool_call", [F]),
    ('<|python_tag|>{"name": "f", "parameters": {"a": 1}}<|eom_id|>', "python_tag", [F]),
    ('<|python_tag|>brave_search.call(query="x")', "python_tag", [Call("brave_search.call", {"query": "x"})]),
]  # fmt: skip

FAULTY: list[tuple[str, str]] = [
    ("[f(1)]", "positional_argument"),
    ("Action: f('x', a=1)", "positional_argument"),
    ("[f(a=1, a=2)]", "duplicate_argument"),
    ('{"name": "f", "arguments": {"a": 1, "a": 2}}', "duplicate_argument"),
    ("[f(a=g())]", "not_a_literal"),
    ("[f(a=__import__('os'))]", "not_a_literal"),
    ("[f(a=x)]", "not_a_literal"),
    ("[f(a=1]", "malformed_call"),
    ("[f(a=1)", "malformed_call"),
    ("[f(a=2*3)]", "malformed_call"),
    ("[f(a=007)]", "malformed_call"),
    ("[f(a=1e999)]", "malformed_call"),
    ("[f(**{'a': 1})]", "malformed_call"),
    ("[f(a='x\ny')]", "malformed_call"),
    ("Action: f(a=1) or so", "malformed_call"),
    ("Action: I cannot", "malformed_call"),
    ('{"name": "f", "arguments": [1]}', "malformed_call"),
    ('{"name": "f", "arguments": {"a": 1}', "malformed_call"),
    ("<tool_call>nothing</tool_call>", "malformed_call"),
    ("```json\n{\"name\": \"f\", \"arguments\": \n```", "malformed_call"),
    ("[f(a=" + "[" * 100 + "]" * 100 + ")]", "too_deep"),
    ("[f(a=" + "9" * 1000 + ")]", "too_long"),
    ("[f(a='" + "x" * MAX_CHARS + "')]", "too_long"),
    ("[" + "f(a=1)," * 300 + "]", "too_long"),
]  # fmt: skip

NO_CALL = ["", "[]", "System: All done (see below).", "Which city [of two]?", '{"domain": "x", "slot_values": {}}',
           "Please call (me).", "Action: []", "```\nx = 1\n```", "f", "[1, 2]", "null",
           "That is f(a=1), is it not?"]  # fmt: skip


@pytest.mark.parametrize(("text", "form", "calls"), SOUND, ids=[s[0][:30] for s in SOUND])
def test_every_form_is_read(text: str, form: str, calls: list[Call]) -> None:
    parsed = parse_calls(text)
    assert (list(parsed.calls), parsed.form, parsed.fault) == (calls, form, "")


@pytest.mark.parametrize(("text", "fault"), FAULTY, ids=[f[0][:30] for f in FAULTY])
def test_a_failed_attempt_is_counted_by_its_reason(text: str, fault: str) -> None:
    parsed = parse_calls(text)
    assert (parsed.calls, parsed.form, parsed.fault, parsed.text) == ((), "", fault, text)


@pytest.mark.parametrize("text", NO_CALL)
def test_an_answer_without_a_call_has_no_fault(text: str) -> None:
    parsed = parse_calls(text)
    assert (parsed.calls, parsed.form, parsed.fault, parsed.text) == ((), "", "", text)


def test_what_is_said_beside_the_calls_is_kept() -> None:
    assert parse_calls("I look. [f(a=1)] Done.").text == "I look.  Done."
    assert parse_calls("Thought: now\nAction: f(a=1)\nSystem: wait").text == "Thought: now\nSystem: wait"
    assert parse_calls("Action: f(a=1)").text == ""
    assert parse_calls("So: <tool_call>f(a=1)</tool_call>").text == "So:"


def test_same_call() -> None:
    assert same_call(Call("f", {"a": 1, "b": [1.0]}), Call("f", {"b": [1], "a": 1.0}))
    assert not same_call(F, Call("f", {"a": "1"})) and not same_call(F, Call("f", {"a": True}))
    assert not same_call(F, Call("F", {"a": 1})) and not same_call(None, F)
    assert not same_call(F, Call("f", {"a": 1, "b": None}))


@pytest.mark.parametrize("text", [
    'System: {"domain": "x", "slot_values": {"a": 1}}', '{"domain": "x", "slot_values": {"a": 1}}<|eot_id|>',
    "```json\n{'domain': 'x', 'slot_values': {'a': 1}}\n```",
])  # fmt: skip
def test_states(text: str) -> None:
    assert parse_state(text) == {"domain": "x", "slot_values": {"a": 1}}


@pytest.mark.parametrize("text", ["", "System: hello", "System: {", "[]", "{1: 2}", "{" * 1000, "x" * (MAX_CHARS + 1)])
def test_what_is_no_state_is_none(text: str) -> None:
    assert parse_state(text) is None


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,12}", fullmatch=True)
CALLS = st.builds(Call, NAMES, st.dictionaries(NAMES, VALUES, max_size=4))


@given(st.lists(CALLS, min_size=1, max_size=4))
def test_whatever_can_be_written_is_read_back(calls: list[Call]) -> None:
    python = "[" + ", ".join(render_call(c.name, c.arguments) for c in calls) + "]"
    records = json.dumps([{"name": c.name, "arguments": c.arguments} for c in calls])
    for text in (python, records, f"```json\n{records}\n```", f"Action: {python}", f"<tool_call>{records}</tool_call>"):
        parsed = parse_calls(text)
        assert parsed.fault == "" and list(parsed.calls) == calls, text


@given(VALUES)
def test_literals_are_those_of_python_and_of_json(value: Any) -> None:
    assert parse_literal(repr(value)) == value == ast.literal_eval(repr(value))
    assert parse_literal(json.dumps(value)) == value == parse_literal(json.dumps(value, ensure_ascii=False, indent=1))


@given(st.text(max_size=200) | st.text(alphabet="[]{}()'\"=,:\\fa1 \n`<|>Action", max_size=200))
def test_no_text_raises_or_runs_anything(text: str) -> None:
    with audited() as events:
        parsed = parse_calls(text)
        parse_state(text)
    assert not events and bool(parsed.calls) == bool(parsed.form) and not (parsed.calls and parsed.fault)


@settings(max_examples=300)
@given(st.sampled_from(REAL), st.integers(0, 2**32))
def test_no_mutation_of_a_real_call_raises_or_runs_anything(text: str, seed: int) -> None:
    with audited() as events:
        parse_calls(mutate(text, seed))
    assert not events


def test_the_audit_sees_what_it_must_not_find() -> None:
    with audited() as events:
        eval("1")
    assert set(events) & FORBIDDEN_EVENTS


HOSTILE = [
    "[" * 100_000, "[" * MAX_CHARS, "{" * MAX_CHARS, "(" * MAX_CHARS, "[1," * 10_000, '{"a":' * 6_000, "-" * MAX_CHARS,
    "f(a=" * 8_000, "`" * MAX_CHARS, "```" + " " * 32_000, "```\n" * 8_000, "Action:" * 4_000, "Action: " + " " * 32_000,
    "<tool_call>" * 2_900, " " * MAX_CHARS, "\n" * MAX_CHARS, "a" * MAX_CHARS, "a." * 16_000, "\\" * MAX_CHARS,
    "'" * MAX_CHARS, "[f(a='" + "\\" * 32_000, "[" + "f(a=1)," * 4_600, '[{"name":"f",' * 2_500, "[[],[]," * 4_600,
    "f(" * 16_000, "\nf(a=" * 6_500, "9" * MAX_CHARS, "[" + "1," * 16_000, "[f(a=" + "9_" * 16_000, "[" + " " * 32_000,
    "f" + " " * 32_000 + "(", "['" + "[', '" * 6_500, "Action: f(a=1)\n" * 2_000, "\ud800" * 1000, "\0" * 1000,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=[repr(h[:12]) for h in HOSTILE])
def test_work_grows_with_length_alone(text: str) -> None:
    """Counted in lines of Python that run, not seconds: a bound that holds on any machine."""
    import sys

    count = 0

    def tracer(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        count += event == "line"
        return tracer

    sys.settrace(tracer)
    try:
        parse_calls(text)
        parse_state(text)
    finally:
        sys.settrace(None)
    assert count < 100 * min(len(text), MAX_CHARS) + 10_000
