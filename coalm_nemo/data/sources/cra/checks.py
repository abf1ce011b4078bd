"""Four checks on a row's final text: is the function defined, are its arguments, are their values grounded, does the
thought agree. The published set had 9 % of 100 dialogues at fault in one of these (arXiv 2502.08820, section 3).

They read the text alone, with the annotation only as evidence for grounding, so that they hold for rewritten rows too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from coalm_nemo.data.rows import Row
from coalm_nemo.data.sources.cra.literal import Value, parse_call
from coalm_nemo.data.sources.cra.prompts import HISTORY_BEGIN
from coalm_nemo.data.sources.cra.scene import Facts
from coalm_nemo.data.sources.cra.schema import DONTCARE, Function, Schema, Slot

_NUMBER_WORDS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    )
}
_WORDS = re.compile(r"[^\W_]+")
_IDENTIFIERS = re.compile(r"[A-Za-z]\w+")


def check_row(row: Row, schema: Schema, facts: Facts | None) -> str | None:
    """Why the row must go, as a reason for Dropped, or None. `facts` are needed for action rows only."""
    prompt, output = row.messages[0]["content"], row.messages[1]["content"]
    history = prompt[prompt.rindex(f"\n{HISTORY_BEGIN}\n") + 1 :]
    lines = [*history.split("\n")[1:], *output.split("\n")]
    if row.part == "cra_action":
        assert facts is not None
        return check_action(lines, schema, facts)
    return check_response(lines, schema)


def check_action(lines: list[str], schema: Schema, facts: Facts) -> str | None:
    """`lines` are the history, the turn's user line, its thought, and the action."""
    if not lines[-1].startswith("Action: ") or not lines[-2].startswith("Thought: "):
        return "not_in_format"
    try:
        name, arguments = parse_call(lines[-1].removeprefix("Action: "))
    except ValueError:
        return "not_in_format"
    function = schema.functions.get((facts.service, name))
    if function is None:
        return "function_not_defined"
    return (
        check_arguments(function, arguments)
        or check_grounding(function, arguments, lines[:-2], facts)
        or check_thought(lines[-2], function, arguments, schema)
    )


def check_arguments(function: Function, arguments: Mapping[str, Value]) -> str | None:
    """Names, types and completeness. `dontcare` is a value of every slot."""
    if any(name not in function.arguments for name in arguments):
        return "argument_not_defined"
    if any(name not in arguments for name in function.required):
        return "argument_missing"
    slots = [(function.slots[name], value) for name, value in arguments.items()]
    return next((fault for slot, value in slots if (fault := _type_fault(slot, value))), None)


def _type_fault(slot: Slot, value: Value) -> str | None:
    if value == DONTCARE:
        return None
    if type(value).__name__ != slot.kind:
        return "argument_type"
    return "argument_value" if slot.categorical and slot.values and str(value) not in slot.values else None


def check_grounding(function: Function, arguments: Mapping[str, Value], lines: list[str], facts: Facts) -> str | None:
    """Every value must come from the conversation. `lines` are what the model has read up to the call."""
    said = tokens(" ".join(line for line in lines if line.startswith(("User: ", "System: "))), True)
    read = said + tokens(" ".join(line for line in lines if line.startswith("Observation: ")))
    for name, value in arguments.items():
        if not _grounded(function.slots[name], str(value), said, read, facts):
            return "argument_not_grounded"
    return None


def _grounded(slot: Slot, value: str, said: str, read: str, facts: Facts) -> bool:
    """A value is grounded by one of these, and by nothing else:

    1. the slot's latest dialogue act has this value, and the slot is boolean or another categorical one or the value
       is `dontcare`: these are annotated without a span ("reasonably priced" is `moderate`, "with music" is True). It
       covers a default that the system confirmed. For truth values and `dontcare` it is the only rule.
    2. a number stands in what was said, as digits or as a word; digits inside an observation do not count;
    3. the value stands in what was said or observed;
    4. a form annotated with this canonical value stands in what was said ("today" for 2019-03-01).
    """
    latest = facts.said.get(slot.name) == value
    if slot.kind == "bool" or value == DONTCARE:
        return latest
    if slot.categorical and latest:
        return True
    if slot.kind == "int":
        return tokens(value) in said
    return tokens(value) in read or any(tokens(form) in said for form in facts.surfaces.get(value, ()))


def check_thought(thought: str, function: Function, arguments: Mapping[str, Value], schema: Schema) -> str | None:
    """The thought must name the function and every value, and no other function."""
    if named_functions(thought, schema) != {function.name}:
        return "thought_inconsistent"
    words = tokens(thought)
    return next(("thought_inconsistent" for value in arguments.values() if tokens(str(value)) not in words), None)


def check_response(lines: list[str], schema: Schema) -> str | None:
    """`lines` end with the whole turn. Its words are the source's own; only that there are some is checked."""
    if not lines[-1].removeprefix("System:").strip() or not lines[-1].startswith("System: "):
        return "empty_response"
    start = max(number for number, line in enumerate(lines) if line.startswith("User: "))
    calls = [line for line in lines[start:] if line.startswith("Action: ")]
    called = {parse_call(line.removeprefix("Action: "))[0] for line in calls}
    named = [named_functions(line, schema) for line in lines[start:] if line.startswith("Thought: ")]
    return None if all(names <= called for names in named) else "thought_inconsistent"


def named_functions(text: str, schema: Schema) -> set[str]:
    return {word for word in _IDENTIFIERS.findall(text) if word in schema.names}


def tokens(text: str, number_words: bool = False) -> str:
    """Case and spacing removed, with a space around every word, so that `in` asks for whole words in this order.

    Text without any letter or digit is kept as it is: it must not be found everywhere.
    """
    return _tokens(text, number_words) if len(text) < 100 else _split(text, number_words)


def _split(text: str, number_words: bool) -> str:
    words = _WORDS.findall(text.casefold())
    if number_words:
        words = [*words, *[_NUMBER_WORDS[word] for word in words if word in _NUMBER_WORDS]]
    return f" {' '.join(words)} " if words else f" {text} "


_tokens = lru_cache(maxsize=65536)(_split)
