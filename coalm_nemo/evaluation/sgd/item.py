"""One SGD dialogue as an item: gold user turns, an agent with its services, a state and calls a turn, one verdict."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field

from coalm_nemo.data.sources.cra.dialogue import Dialogue
from coalm_nemo.data.sources.cra.literal import render_call
from coalm_nemo.data.sources.cra.schema import Schema
from coalm_nemo.evaluation.base import Item, Prompt, Verdict
from coalm_nemo.evaluation.calls import Call, parse_state
from coalm_nemo.evaluation.dialogue_states.agent import (
    MAX_CALLS,
    GoldTurn,
    HistoryOf,
    TurnResult,
    history_lines,
    take_turn,
)
from coalm_nemo.evaluation.dialogue_states.prompts import AgentPrompt, state_messages
from coalm_nemo.evaluation.dialogue_states.scores import Counts, GoldState, Points, State, count_turn
from coalm_nemo.evaluation.sgd.services import GoldCall, Services, after_calls, from_answer, gold_calls
from coalm_nemo.evaluation.sgd.values import right_values, said_as

_STATE_STOP = ("\nUser:", "\nObservation")
_STATE_TOKENS = 384


@dataclass(frozen=True)
class Protocol:
    """What all dialogues of a run share."""

    schema: Schema
    prompt: AgentPrompt
    ways: Mapping[str, Points]
    state_from: str
    history: HistoryOf


@dataclass
class Sums:
    """What was counted of a dialogue so far."""

    counts: Counts = field(default_factory=Counts)
    faults: list[str] = field(default_factory=list)
    gold_states: list[GoldState] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    results: list[TurnResult] = field(default_factory=list)


def dialogue_item(dialogue: Dialogue, protocol: Protocol) -> Item:
    """Prompts of every turn, then the verdict."""
    recorded = gold_calls(dialogue, protocol.schema)
    states = gold_states(dialogue)
    services = Services(protocol.schema, _services(dialogue), recorded)
    sums, history, said = Sums(gold_states=states), list[str](), list[str]()
    state: State = {}
    for number, gold_state in enumerate(states):
        user, words = dialogue.turns[2 * number].utterance, dialogue.turns[2 * number + 1].utterance
        own = [call for call in recorded if call.turn == number]
        gold = GoldTurn([_action(call) for call in own[:MAX_CALLS]], lambda words=words: words)  # type: ignore[misc]
        result = yield from take_turn(protocol.prompt, history, user, services.run, gold)
        if protocol.state_from == "calls":
            state = after_calls(state, result.carried_out, services)
        else:
            state = yield from _asked_state(protocol.schema, services.names, said, user, gold_state, sums.faults)
        _count(sums, protocol, services.names, own, result, gold_state, state)
        history += history_lines(result, user, words, protocol.history)
        said += [f"User: {user}", f"System: {words if protocol.history == 'gold' else result.words}"]
    return _verdict(dialogue, sums, protocol)


def gold_states(dialogue: Dialogue) -> list[GoldState]:
    """The state after each user turn that has an answer: of every service up to then, each at its latest."""
    forms = said_as(dialogue)
    by_service: dict[str, GoldState] = {}
    states: list[GoldState] = []
    for user in dialogue.turns[: len(dialogue.turns) // 2 * 2 : 2]:
        by_service |= {frame.service: right_values(frame.service, frame.state or {}, forms) for frame in user.frames}
        states.append({slot: values for state in by_service.values() for slot, values in state.items()})
    return states


def _services(dialogue: Dialogue) -> tuple[str, ...]:
    return tuple(dict.fromkeys(frame.service for turn in dialogue.turns for frame in turn.frames))


def _action(call: GoldCall) -> str:
    return render_call(call.function.name, call.function.typed(call.parameters))


def _asked_state(
    schema: Schema, names: Sequence[str], said: list[str], user: str, gold: GoldState, faults: list[str]
) -> Generator[Prompt, str, dict[str, str]]:
    """The state as the model writes it when asked. One that cannot be read is empty, and a fault."""
    slots = "\n".join(f"{name}: {', '.join(f'{name}-{slot}' for slot in schema.slots[name])}" for name in names)
    gold_text = f"System: {json.dumps({slot: values[0] for slot, values in gold.items()}, ensure_ascii=False)}"
    messages = state_messages(slots, said, user)
    answer = parse_state((yield Prompt(messages, gold_text, None, _STATE_TOKENS, _STATE_STOP)))
    faults += ["malformed_state"] * (answer is None)
    return from_answer(answer, schema)


def _count(
    sums: Sums, protocol: Protocol, names: Sequence[str], own: Sequence[GoldCall], result: TurnResult,
    gold_state: GoldState, state: State,
) -> None:  # fmt: skip
    slots = {f"{name}-{slot}" for name in names for slot in protocol.schema.slots[name]} | {*state}
    wrong = count_turn(sums.counts, gold_state, state, protocol.ways, slots)
    count_calls(sums.counts, sums.faults, own, result.calls)
    if own:
        called = {slot: values for slot, values in gold_state.items() if slot.partition("-")[0] == own[0].service}
        right = all(
            slot in state and protocol.ways["jga"](slot, state[slot], values) for slot, values in called.items()
        )
        sums.counts.add("state_at_calls", right)
        sums.faults += ["state_not_in_call"] * (not right)
    sums.faults += [*result.faults, *wrong]
    sums.states.append(dict(state))
    sums.results.append(result)


def count_calls(counts: Counts, faults: list[str], own: Sequence[GoldCall], made: Sequence[Call]) -> None:
    """Adds a turn's calls: of the gold ones how many have the name, the arguments, both; of the made ones how many are right
    (`call_precision`). A call that is made answers one gold call only."""
    left = list(made)
    for gold in own:
        best = max(
            left, key=lambda call: (gold.answers(call), gold.same_name(call), gold.same_arguments(call)), default=None
        )
        name, arguments = (best is not None and test(best) for test in (gold.same_name, gold.same_arguments))
        counts.add("call_name", name)
        counts.add("call_arguments", arguments)
        counts.add("call", name and arguments)
        if best is not None and (name or arguments):
            left.remove(best)
        if not (name and arguments):
            faults.append(
                "call_missing" if not name and not arguments else "wrong_argument" if name else "wrong_function"
            )
    if made:
        counts.add("call_precision", sum(any(gold.answers(call) for gold in own) for call in made), len(made))


def _verdict(dialogue: Dialogue, sums: Sums, protocol: Protocol) -> Verdict:
    gold = [{slot: list(values) for slot, values in state.items()} for state in sums.gold_states]
    details = {
        "services": list(_services(dialogue)),
        "calls": [[render_call(c.name, c.arguments) for c in result.calls] for result in sums.results],
        "responses": [result.words for result in sums.results],
        "references": [turn.utterance for turn in dialogue.turns[1::2]],
    }
    if protocol.state_from == "calls":
        sums.faults += ["state_ahead_of_calls"] * _ahead_of_calls(dialogue, sums, protocol)
    return Verdict(
        dialogue.dialogue_id, dialogue.dialogue_id, sums.counts.sums, gold, sums.states, sums.faults, details
    )


def _ahead_of_calls(dialogue: Dialogue, sums: Sums, protocol: Protocol) -> int:
    """Turns whose gold state the file's own calls do not show (yet): no agent that calls as the file does has them right."""
    recorded = gold_calls(dialogue, protocol.schema)
    services = Services(protocol.schema, _services(dialogue), recorded)
    state: dict[str, str] = {}
    ahead = 0
    for number, gold in enumerate(sums.gold_states):
        made = [Call(c.function.name, dict(c.parameters)) for c in recorded if c.turn == number]
        state = after_calls(state, made, services)
        held = all(slot in state and protocol.ways["jga"](slot, state[slot], values) for slot, values in gold.items())
        ahead += not held or set(state) != set(gold)
    return ahead
