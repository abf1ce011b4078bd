"""The agent's prompt, in the blocks and labels of our CRA training rows, and the prompt that asks for a state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coalm_nemo.data.sources.cra.prompts import HISTORY_BEGIN, HISTORY_END
from coalm_nemo.evaluation.base import Message

_ROLE = (
    "You are an assistant that talks with a user over several turns and can call functions of outside services.{today} "
    "In every turn you think first; where the turn needs it you call one function, read its result and think again; then "
    "you answer."
)
_TASK = (
    "Write the next step: a thought, and after it either one function call or, once you know enough, what you say to the "
    "user. Use only functions from the list below, and only values that the conversation, or an earlier result, has given. "
    "The list shows each function's {shown}. {rules}"
)
_FORMAT = (
    "Thought: what the user wants, what you know, and what you do next",
    "Action: FunctionName(first_argument='some text', second_argument=2)",
    "or",
    "Thought: what the situation is and what you tell the user",
    "System: what you say to the user, on one line",
)
_CALL_RULES = (
    "One call at a time, with every argument by name. "
    "Text stands in single quotes, numbers and True or False stand bare."
)
_STATE_TASK = (
    "Below is a conversation between a user and an assistant. Write down what the user has settled so far: one JSON object "
    'from slot to value, with the slots below and no others. Leave out what the user has not settled; write "dontcare" '
    "where the user says that any value will do."
)
_STATE_FORMAT = 'System: {"slot": "value", "another slot": "value"}'


@dataclass(frozen=True)
class AgentPrompt:
    """What stays the same through a benchmark's prompts."""

    tool_list: str
    """One signature a line."""
    shown: str = "arguments, the optional ones with their defaults"
    rules: str = ""
    """What these functions need to be told beside."""
    value_rules: str = ""
    """How values are written."""
    today: str = ""

    def messages(self, history: Sequence[str], turn: Sequence[str]) -> list[Message]:
        """`history` are the lines of the turns before, `turn` the lines of this one so far."""
        today = f" {self.today}" if self.today else ""
        task = _TASK.format(shown=self.shown, rules=self.rules).strip()
        lines = [
            f"{_ROLE.format(today=today)} {task}",
            *block("AVAILABLE TOOLS", [self.tool_list]),
            *block("FORMAT INSTRUCTION", [*_FORMAT, f"{_CALL_RULES} {self.value_rules}".strip()]),
            HISTORY_BEGIN,
            *history,
            HISTORY_END,
        ]
        return user_message("\n".join(lines), "\n".join(turn))


def state_messages(slot_list: str, history: Sequence[str], user: str) -> list[Message]:
    """The separate question for the state after `user`. `history` are `User:` and `System:` lines."""
    lines = [
        _STATE_TASK,
        *block("SLOTS", [slot_list]),
        *block("FORMAT INSTRUCTION", [_STATE_FORMAT]),
        HISTORY_BEGIN,
        *history,
        HISTORY_END,
    ]
    return user_message("\n".join(lines), f"User: {user}")


def user_message(instruction: str, text: str) -> list[Message]:
    """An Alpaca row's prompt: instruction, blank line, input."""
    return [{"role": "user", "content": f"{instruction}\n\n{text}"}]


def block(name: str, lines: Sequence[str]) -> list[str]:
    return [f"[BEGIN OF {name}]", *lines, f"[END OF {name}]"]
