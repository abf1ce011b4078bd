"""Parts of turns -> the text of rows. The blocks and labels are those of the published rows, the wording is our own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from coalm_nemo.data.rows import Row, alpaca_messages
from coalm_nemo.data.sources.cra.turns import Turn

HISTORY_BEGIN = "[BEGIN OF CONVERSATION HISTORY]"
HISTORY_END = "[END OF CONVERSATION HISTORY]"

_ROLE = (
    "You are an assistant that talks with a user over several turns and can call functions of outside services.{today} "
    "In every turn you think first; where the turn needs it you call one function, read its result and think again; then "
    "you answer."
)
_ACTION_TASK = (
    "Write the function call that comes next. Use only functions from the list below, and only values that the "
    "conversation, or an earlier result, has given. The list shows each function's {shown}; further details that the "
    "user has settled and the service knows may be passed by name too."
)
_RESPONSE_TASK = (
    "Write what you say to the user next. Say only what the conversation, or a result in it, bears out, and ask for what "
    "is missing instead of guessing it."
)
_ACTION_FORMAT = "Action: FunctionName(first_argument='some text', second_argument=2)"
_ACTION_RULES = (
    "One call, with every argument by name. Text stands in single quotes, numbers and True or False stand bare. Dates are "
    "written YYYY-MM-DD and times HH:MM on the 24-hour clock."
)
_RESPONSE_FORMAT = "System: what you say to the user, on one line"
_THOUGHT_FORMAT = "Thought: what the user wants, what you know, and what you do next"
_THOUGHT_AFTER_FORMAT = "Thought: what the situation is and what you tell the user"


@dataclass(frozen=True)
class PromptOptions:
    tool_list: str
    """One signature a line."""
    optional_shown: bool
    today: str
    """A sentence that gives the date where the source's dialogues rest on one ("today" is a date in SGD's calls)."""
    thought_target: bool
    """The thought is part of what the model writes; otherwise it stands in the prompt, as in the published rows."""


def action_row(row_id: str, turn: Turn, history: Sequence[str], options: PromptOptions) -> Row:
    """`turn` up to its call, which is the target. `turn.call` must be there."""
    assert turn.call is not None
    shown = "arguments, the optional ones with their defaults" if options.optional_shown else "required arguments"
    format_lines = [_THOUGHT_FORMAT] * options.thought_target + [_ACTION_FORMAT, _ACTION_RULES]
    instruction = "\n".join(
        [
            _role(options) + " " + _ACTION_TASK.format(shown=shown),
            *_block("AVAILABLE TOOLS", [options.tool_list]),
            *_block("FORMAT INSTRUCTION", format_lines),
            *_history(history),
        ]
    )
    lines = [f"User: {turn.user}", f"Thought: {turn.thought}", f"Action: {turn.call.text}"]
    return _row(row_id, "cra_action", instruction, lines, 2 if options.thought_target else 1)


def response_row(row_id: str, turn: Turn, history: Sequence[str], options: PromptOptions) -> Row:
    """The whole turn; what is said is the target."""
    format_lines = [_THOUGHT_AFTER_FORMAT] * options.thought_target + [_RESPONSE_FORMAT]
    instruction = "\n".join(
        [
            _role(options) + " " + _RESPONSE_TASK,
            *_block("FORMAT INSTRUCTION", format_lines),
            *_history(history),
        ]
    )
    return _row(row_id, "cra_response", instruction, turn_lines(turn), 2 if options.thought_target else 1)


def turn_lines(turn: Turn, brief: bool = False) -> list[str]:
    """One line a step, in the training spelling. `brief` is for history: only the records that were spoken of."""
    lines = [f"User: {turn.user}", f"Thought: {turn.thought}"]
    if turn.call is not None:
        lines += [
            f"Action: {turn.call.text}",
            f"Observation: {turn.observation_brief if brief else turn.observation}",
            f"Thought: {turn.thought_after}",
        ]
    return [*lines, f"System: {turn.system}"]


def without_call(turn: Turn) -> list[str]:
    """A turn in the history whose call did not pass the checks: what was said, and nothing of the call."""
    return [f"User: {turn.user}", f"System: {turn.system}"]


def with_plain_thought(turn: Turn) -> list[str]:
    """A turn in the history whose answer its results do not bear out: a thought of its own would have to defend it."""
    if turn.call is None:
        return turn_lines(replace(turn, thought="I answer the user."))
    return turn_lines(replace(turn, thought_after="I have the result and answer the user."), brief=True)


def _role(options: PromptOptions) -> str:
    return _ROLE.format(today=f" {options.today}" if options.today else "")


def _block(name: str, lines: Sequence[str]) -> list[str]:
    return [f"[BEGIN OF {name}]", *lines, f"[END OF {name}]"]


def _history(lines: Sequence[str]) -> list[str]:
    return [HISTORY_BEGIN, *lines, HISTORY_END]


def _row(row_id: str, part: str, instruction: str, lines: Sequence[str], target_lines: int) -> Row:
    """The last `target_lines` of `lines` are what the model learns to write."""
    raw = {
        "instruction": instruction,
        "input": "\n".join(lines[:-target_lines]),
        "output": "\n".join(lines[-target_lines:]),
    }
    return Row(row_id, messages=alpaca_messages(raw, row_id), part=part)
