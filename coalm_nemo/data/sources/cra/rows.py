"""The parts of a dialogue's turns -> checked rows, one for every call and one for every answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from coalm_nemo.data.rows import Row
from coalm_nemo.data.sources.base import Dropped
from coalm_nemo.data.sources.cra.checks import check_row
from coalm_nemo.data.sources.cra.prompts import (
    PromptOptions,
    action_row,
    response_row,
    turn_lines,
    with_plain_thought,
    without_call,
)
from coalm_nemo.data.sources.cra.schema import Schema
from coalm_nemo.data.sources.cra.turns import Turn


@dataclass(frozen=True)
class RowOptions:
    prompt: PromptOptions
    strict_signatures: bool
    action_rows: bool
    response_rows: bool
    tools_of_dialogue: bool = False
    """The tool list has only the functions of the dialogue's services, not all of `prompt.tool_list`."""


def dialogue_rows(
    dialogue_id: str, turns: Sequence[Turn], schema: Schema, options: RowOptions
) -> Iterator[Row | Dropped]:
    """Every call becomes one action row or one Dropped, every turn one response row or one Dropped.

    A call that fails a check takes the answer that rests on it along, and later turns do not see it.
    """
    history: list[str] = []
    for turn in turns:
        name, fault = f"{dialogue_id}/{turn.number}", None
        if turn.call is None and turn.left_out:
            fault = turn.left_out[0]
        if turn.call is not None:
            row = action_row(f"{name}/action", turn, history, _prompt(turn, schema, options))
            fault = check_row(row, schema, turn.facts)
            reason = fault or _beyond_tool_list(turn, schema, options)
            if options.action_rows:
                yield Dropped(reason, row.row_id) if reason else row
        if options.action_rows:
            yield from _left_out(name, turn)
        if options.response_rows:
            yield _response(f"{name}/response", turn, history, schema, options, fault)
        if fault:
            history += without_call(turn)
        else:
            history += with_plain_thought(turn) if turn.unsupported else turn_lines(turn, brief=True)


def _prompt(turn: Turn, schema: Schema, options: RowOptions) -> PromptOptions:
    if not options.tools_of_dialogue:
        return options.prompt
    return replace(options.prompt, tool_list="\n".join(schema.signatures(options.prompt.optional_shown, turn.services)))


def _left_out(name: str, turn: Turn) -> Iterator[Dropped]:
    first = 1 if turn.call is None else 2
    for number, reason in enumerate(turn.left_out, first):
        yield Dropped(reason, f"{name}/action{number if number > 1 else ''}")


def _beyond_tool_list(turn: Turn, schema: Schema, options: RowOptions) -> str | None:
    """48 % of SGD's calls pass optional arguments, which the published tool list does not show."""
    if not options.strict_signatures or turn.call is None or turn.facts is None:
        return None
    function = schema.functions[turn.facts.service, turn.call.name]
    shown = function.shown_arguments(options.prompt.optional_shown)
    return None if set(turn.call.arguments) <= set(shown) else "argument_not_in_tool_list"


def _response(
    row_id: str, turn: Turn, history: Sequence[str], schema: Schema, options: RowOptions, fault: str | None
) -> Row | Dropped:
    if fault:
        return Dropped("call_dropped", row_id)
    if turn.unsupported:
        return Dropped(turn.unsupported, row_id)
    if not turn.system.strip():
        return Dropped("empty_response", row_id)
    row = response_row(row_id, turn, history, options.prompt)
    reason = check_row(row, schema, None)
    return Dropped(reason, row_id) if reason else row
