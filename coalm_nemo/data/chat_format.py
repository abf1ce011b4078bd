"""Llama 3's chat format as turns: what is rendered, and which of it is a target, decided in one place.

A conversation is a list of turns `<|start_header_id|>ROLE<|end_header_id|>\\n\\nTEXT<|eot_id|>`. Because a turn keeps its
text apart from its control tokens, a text that spells a control token stays text: it can forge nothing.
Layout: Meta's Llama 3.1 prompt format (`prompt_format.md` of llama-models) and the chat template of
Llama-3.1-8B-Instruct and Llama-3.3-70B-Instruct, which are the same.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from coalm_nemo.errors import UserError

DATE_STRING = "26 Jul 2024"
"""Llama 3's templates print a date; a training set must not change with the day it is built."""

END_OF_TURN = "<|eot_id|>"

Message = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """One turn as it is rendered."""

    role: str
    """What stands in the header: system, user, assistant, ipython."""
    text: str
    message: int
    """Index of the row's message it renders; -1 for a turn that the format adds."""


class Unrenderable(Exception):
    """The format has no way to write this row; the message is the snake_case reason that the manifest counts."""


class ChatFormat(ABC):
    """Messages -> turns, and the same as a Jinja template for inference."""

    name: str
    template: str
    """What `convert export` writes as chat_template where the base has none."""

    @abstractmethod
    def turns(self, messages: list[Message], tools: list[dict[str, Any]] | None) -> list[Turn]:
        """The whole conversation. Raises Unrenderable."""

    def render(self, messages: list[Message], tools: list[dict[str, Any]] | None, bos: str) -> str:
        """The conversation as one string with its control tokens, as a chat template gives it."""
        return bos + "".join(render_turn(turn) for turn in self.turns(messages, tools))


def render_turn(turn: Turn) -> str:
    """One turn with its control tokens."""
    return f"<|start_header_id|>{turn.role}<|end_header_id|>\n\n{turn.text}{END_OF_TURN}"


class Llama31Format(ChatFormat):
    """Llama 3.1 to 3.3: a system turn with dates always, tools in the first user turn, calls and results as JSON."""

    name = "llama3.1"

    def turns(self, messages: list[Message], tools: list[dict[str, Any]] | None) -> list[Turn]:
        has_system = bool(messages) and messages[0]["role"] == "system"
        system = messages[0]["content"].strip() if has_system else ""
        result = [Turn("system", _preamble(tools) + system, 0 if has_system else -1)]
        for index, message in enumerate(messages[int(has_system) :], int(has_system)):
            role, text = _body(message)
            if tools and index == int(has_system):
                if message["role"] != "user":
                    raise Unrenderable("tools_without_user_turn")
                text = _tools_text(tools) + text
            result.append(Turn(role, text, index))
        return result

    template = (
        "{{- bos_token }}"
        "{%- set has_system = messages[0].role == 'system' %}"
        "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}"
        "{%- if tools %}{{- 'Environment: ipython\\n' }}{%- endif %}"
        "{{- 'Cutting Knowledge Date: December 2023\\nToday Date: ' + (date_string or '26 Jul 2024') + '\\n\\n' }}"
        "{%- if has_system %}{{- messages[0].content | trim }}{%- endif %}"
        "{{- '<|eot_id|>' }}"
        "{%- for message in (messages[1:] if has_system else messages) %}"
        "{%- if message.tool_calls %}"
        "{%- if message.tool_calls | length > 1 %}{{- raise_exception('one tool call a turn') }}{%- endif %}"
        "{%- set call = message.tool_calls[0].function %}"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
        "{{- '{\"name\": \"' + call.name + '\", \"parameters\": ' + (call.arguments | tojson) + '}' }}"
        "{%- elif message.role in ('tool', 'ipython') %}"
        "{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + (message.content | tojson) }}"
        "{%- else %}"
        "{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}"
        "{%- if tools and loop.first %}"
        "{{- 'Given the following functions, please respond with a JSON for a function call with its proper arguments "
        'that best answers the given prompt.\\n\\nRespond in the format {"name": function name, "parameters": '
        "dictionary of argument name and its value}.Do not use variables.\\n\\n' }}"
        "{%- for tool in tools %}{{- (tool | tojson(indent=4)) + '\\n\\n' }}{%- endfor %}"
        "{%- endif %}"
        "{{- message.content | trim }}"
        "{%- endif %}"
        "{{- '<|eot_id|>' }}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
    )


class Llama3Format(ChatFormat):
    """Llama 3.0: every message a turn, nothing added; it has no way to write tools."""

    name = "llama3"

    def turns(self, messages: list[Message], tools: list[dict[str, Any]] | None) -> list[Turn]:
        if tools or any(m.get("tool_calls") for m in messages):
            raise Unrenderable("format_has_no_tools")
        return [Turn(m["role"], m["content"].strip(), i) for i, m in enumerate(messages)]

    template = (
        "{{- bos_token }}"
        "{%- for message in messages %}"
        "{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + (message.content | trim) + '<|eot_id|>' }}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
    )


FORMATS: dict[str, ChatFormat] = {f.name: f for f in (Llama31Format(), Llama3Format())}

_TOOLS_INTRODUCTION = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best "
    'answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of argument '
    "name and its value}.Do not use variables.\n\n"
)
"""To the letter what Llama 3.1 was trained with, the missing space after the full stop included."""


def _preamble(tools: list[dict[str, Any]] | None) -> str:
    environment = "Environment: ipython\n" if tools else ""
    return f"{environment}Cutting Knowledge Date: December 2023\nToday Date: {DATE_STRING}\n\n"


def _tools_text(tools: list[dict[str, Any]]) -> str:
    return _TOOLS_INTRODUCTION + "".join(json.dumps(t, ensure_ascii=False, indent=4) + "\n\n" for t in tools)


def _body(message: Message) -> tuple[str, str]:
    """(header role, text) of one message."""
    if calls := message.get("tool_calls"):
        return "assistant", _call_text(message, calls)
    if message["role"] in ("tool", "ipython"):
        return "ipython", json.dumps(message["content"], ensure_ascii=False)
    return message["role"], message["content"].strip()


def _call_text(message: Message, calls: list[Any]) -> str:
    if len(calls) > 1:
        raise Unrenderable("several_calls_in_a_turn")
    if (message.get("content") or "").strip():
        raise Unrenderable("text_beside_a_call")  # the template would leave it out without a word
    call = calls[0].get("function") if isinstance(calls[0], dict) else None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
        raise Unrenderable("malformed_tool_call")
    return f'{{"name": "{call["name"]}", "parameters": {json.dumps(call["arguments"], ensure_ascii=False)}}}'


_PROBE: list[Message] = [
    {"role": "user", "content": "What is on tonight?"},
    {"role": "assistant", "content": "Two films and a concert."},
    {"role": "user", "content": "The concert, please."},
    {"role": "assistant", "content": "It starts at eight."},
]


def choose_format(name: str, tokenizer: Any) -> ChatFormat:
    """The format of that name, or with "auto" the one that the tokenizer's template speaks (3.1's if it has none).

    Raises UserError, with the first difference, where the template speaks none of them or another than `name`.
    """
    if name != "auto" and name not in FORMATS:
        raise UserError(f"template: there is no chat format '{name}'; there are auto, {', '.join(FORMATS)}")
    wanted = [FORMATS[name]] if name != "auto" else list(FORMATS.values())
    if not tokenizer.chat_template:
        return wanted[0]
    theirs = render_with_template(tokenizer, _PROBE, None)
    for chat_format in wanted:
        if chat_format.render(_PROBE, None, str(tokenizer.bos_token)) == theirs:
            return chat_format
    ours = wanted[0].render(_PROBE, None, str(tokenizer.bos_token))
    raise UserError(
        f"the tokenizer's chat template does not write the {wanted[0].name} format: {first_difference(ours, theirs)}"
    )


def render_with_template(tokenizer: Any, messages: list[Message], tools: list[dict[str, Any]] | None) -> str:
    """The tokenizer's own rendering. Raises UserError where its template refuses the row."""
    try:
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, date_string=DATE_STRING)
    except Exception as e:
        raise UserError(f"the tokenizer's chat template refuses a conversation ({str(e).splitlines()[0]})") from e
    return str(text)


def first_difference(ours: str, theirs: str) -> str:
    """Where two renderings part, with a little of what stands there in each."""
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    start = max(0, at - 20)
    return f"at character {at}, we write {ours[start : at + 40]!r}, the template {theirs[start : at + 40]!r}"
