"""The prompts of API-Bank's sample folders, in our words. Hammer's form brings its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from coalm_nemo.evaluation.apibank.samples import Question, render_sample_call
from coalm_nemo.evaluation.calls import Call

CALL_TASK = (
    "You assist a user and can call functions. Below are the functions and the conversation so far. Write the next call "
    "that you make.\nWrite exactly one call and nothing else, in this form: [FunctionName(name1='value1', "
    "name2='value2')]. Every value is text in quotes. The year is 2023."
)
SEARCH_TASK = (
    " Where no fitting function is known yet, look for one with ToolSearcher; what it finds stands in the conversation "
    "and may be called."
)
RESPONSE_TASK = (
    "You assist a user and can call functions. Below are the functions and the conversation so far, up to the result of "
    "your last call. Write what you say to the user next: one turn, without a label in front. The year is 2023."
)


def user_message(question: Question) -> str:
    """The one user turn of the prompt."""
    if question.form == "hammer":
        return question.prompt
    task = RESPONSE_TASK if question.call is None else CALL_TASK + (SEARCH_TASK if question.level == 2 else "")
    tools = "\n".join(json.dumps(t, ensure_ascii=False) for t in question.tools)
    turns = "\n".join(turn_line(t) for t in question.history)
    return f"{task}\n\nFunctions:\n{tools}\n\nConversation:\n{turns}"


def turn_line(turn: Mapping[str, Any]) -> str:
    """One line of the conversation as the prompt shows it."""
    if turn["role"] != "API":
        return f"{turn['role']}: {turn['text']}"
    result = turn.get("result") or {}
    shown = result.get("exception") or result.get("output")
    call = render_sample_call(Call(turn["api_name"], turn["param_dict"]))
    return f"Call: {call} -> {shown if isinstance(shown, str) else json.dumps(shown, ensure_ascii=False)}"


def messages(question: Question) -> Sequence[dict[str, str]]:
    return [{"role": "user", "content": user_message(question)}]
