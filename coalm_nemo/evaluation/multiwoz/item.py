"""One MultiWOZ dialogue as an item: gold user turns, an agent with tools, a state and a response a turn, one verdict."""

from __future__ import annotations

from collections.abc import Collection, Generator
from dataclasses import dataclass
from typing import Any, Literal

from coalm_nemo.evaluation.base import Item, Prompt, Verdict
from coalm_nemo.evaluation.calls import parse_state
from coalm_nemo.evaluation.dialogue_states.agent import GoldTurn, HistoryOf, TurnResult, history_lines, take_turn
from coalm_nemo.evaluation.dialogue_states.prompts import AgentPrompt, state_messages
from coalm_nemo.evaluation.dialogue_states.scores import Counts, State, count_turn
from coalm_nemo.evaluation.multiwoz.gold import gold_actions, gold_words, kept_values
from coalm_nemo.evaluation.multiwoz.inform import SpokenTurn, judge_by_name, judge_by_state
from coalm_nemo.evaluation.multiwoz.mentions import MentionFinder
from coalm_nemo.evaluation.multiwoz.reader import Booking, WozDialogue
from coalm_nemo.evaluation.multiwoz.slots import SLOTS, TRACKED
from coalm_nemo.evaluation.multiwoz.states import SLOT_LIST, WAYS, after_calls, from_answer
from coalm_nemo.evaluation.multiwoz.tools import RULES, SIGNATURES, VALUE_RULES, Toolbox

StateFrom = Literal["calls", "prompt"]
PROMPT = AgentPrompt(SIGNATURES, rules=RULES, value_rules=VALUE_RULES)
_STATE_STOP = ("\nUser:", "\nObservation")
_STATE_TOKENS = 384


@dataclass(frozen=True)
class Protocol:
    """What all dialogues of a run share."""

    finder: MentionFinder
    state_from: StateFrom
    history: HistoryOf


@dataclass(frozen=True)
class Spoken:
    """A turn as it was scored."""

    turn: TurnResult
    state: State
    gold_actions: list[str]


def dialogue_item(dialogue: WozDialogue, protocol: Protocol) -> Item:
    """Prompts of every turn, then the verdict."""
    toolbox = Toolbox(protocol.finder.database)
    spoken, counts, faults = [], Counts(), list[str]()
    history: list[str] = []
    said: list[str] = []
    booked: list[Booking] = []
    before: State = {}
    state: State = {}
    for turn, kept in zip(dialogue.turns, kept_values(dialogue.turns), strict=True):
        booked += turn.booked
        actions, beyond = gold_actions(turn, before, kept)
        words = _words(turn.system, booked, toolbox)
        result = yield from take_turn(PROMPT, history, turn.user, toolbox.run, GoldTurn(actions, words))
        if protocol.state_from == "calls":
            state = after_calls(state, result.carried_out)
        else:
            state = yield from _asked_state(said, turn.user, kept, faults)
        faults += [*result.faults, *beyond, *count_turn(counts, turn.state, state, WAYS, _tracked(turn.state, state))]
        history += history_lines(result, turn.user, turn.system, protocol.history)
        said += [f"User: {turn.user}", f"System: {turn.system if protocol.history == 'gold' else result.words}"]
        before = kept
        spoken.append(Spoken(result, state, actions))
    if dialogue.goals:
        faults += _judge(dialogue, spoken, toolbox, protocol.finder, counts)
    return _verdict(dialogue, spoken, counts, faults, protocol.finder)


def _words(words: str, booked: list[Booking], toolbox: Toolbox) -> Any:
    return lambda: gold_words(words, booked, toolbox.references)


def _asked_state(said: list[str], user: str, gold: State, faults: list[str]) -> Generator[Prompt, str, dict[str, str]]:
    """The state as the model writes it when asked. One that cannot be read is empty, and a fault."""
    import json

    messages = state_messages(SLOT_LIST, said, user)
    gold_text = f"System: {json.dumps(dict(gold), ensure_ascii=False)}"
    answer = parse_state((yield Prompt(messages, gold_text, None, _STATE_TOKENS, _STATE_STOP)))
    faults += ["malformed_state"] * (answer is None)
    return from_answer(answer)


def _tracked(gold: Any, state: State) -> Collection[str]:
    """The 30 slots, and the hospital's where a turn has it: the training split does."""
    other = any(slot not in TRACKED for slot in (*gold, *state))
    return SLOTS if other else TRACKED


def _judge(
    dialogue: WozDialogue, spoken: list[Spoken], toolbox: Toolbox, finder: MentionFinder, counts: Counts
) -> list[str]:
    goals = dialogue.goals or {}
    turns = [SpokenTurn(s.state, finder.find(s.turn.words, toolbox.references)) for s in spoken]
    by_state = judge_by_state(goals, turns, finder.database)
    by_name = judge_by_name(goals, turns, finder.database)
    counts.add("inform", by_state.informed)
    counts.add("success", by_state.succeeded)
    counts.add("inform_named", by_name.informed)
    counts.add("success_named", by_name.succeeded)
    for domain in goals:
        counts.add(f"inform/{domain}", by_state.inform[domain])
        counts.add(f"success/{domain}", by_state.informed and by_state.success[domain])
    return by_state.faults


def _verdict(
    dialogue: WozDialogue, spoken: list[Spoken], counts: Counts, faults: list[str], finder: MentionFinder
) -> Verdict:
    counts.add(
        "calls_carried_out", sum(len(s.turn.carried_out) for s in spoken), sum(len(s.turn.calls) for s in spoken)
    )
    details = {
        "domains": sorted(dialogue.goals or {slot.partition("-")[0] for turn in dialogue.turns for slot in turn.state}),
        "responses": [s.turn.words for s in spoken],
        "references": [turn.system for turn in dialogue.turns],
        "responses_delexicalized": [finder.delexicalized(s.turn.words) for s in spoken],
        "references_delexicalized": [finder.delexicalized(turn.system) for turn in dialogue.turns],
    }
    gold = [{slot: list(values) for slot, values in turn.state.items()} for turn in dialogue.turns]
    return Verdict(dialogue.id, dialogue.id, counts.sums, gold, [dict(s.state) for s in spoken], faults, details)
