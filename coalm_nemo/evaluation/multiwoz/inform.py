"""Inform and Success: did the dialogue offer what the user's goal asks for, and tell what the goal wants to know?

Both follow the standard evaluation (Nekvinda and Dusek 2021) in what counts, and differ in how a response is read: that one
is given delexicalised text, an agent speaks in values. So a name, train number or attribute counts where the response holds
a value of the domain's database, or a reference that a booking of the domain gave.

`state`: as the standard does, a domain's offer is every record that meets the state at the turn in which a name (or train
number) is said, and the domain that is talked about is read from changes of the state. `named`: the offer is the records
named in the domain's last such turn, one of which must meet the goal; an attribute counts in the domain whose value it is,
if a named record (where there is one) has it. The second is what the user sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from coalm_nemo.evaluation.dialogue_states.scores import State
from coalm_nemo.evaluation.multiwoz.database import WITH_DATABASE, Database
from coalm_nemo.evaluation.multiwoz.mentions import Mention
from coalm_nemo.evaluation.multiwoz.reader import Goal

Meets = Callable[[list[int], list[int]], bool]
"""(offered, what meets the goal) -> whether the offer will do."""
OFFERED_BY = {"attraction": "name", "hotel": "name", "restaurant": "name", "train": "trainid"}


@dataclass(frozen=True)
class SpokenTurn:
    """What a turn's response mentions, and the state when it was said."""

    state: State
    mentions: Sequence[Mention]


@dataclass
class Judgement:
    """Inform and success, by domain; reasons why points are missing."""

    inform: dict[str, bool]
    success: dict[str, bool]
    faults: list[str] = field(default_factory=list)

    @property
    def informed(self) -> bool:
        return all(self.inform.values())

    @property
    def succeeded(self) -> bool:
        return self.informed and all(self.success.values())


@dataclass
class _Told:
    """What the responses so far have said about one domain."""

    offered: list[int] = field(default_factory=list)
    attributes: set[str] = field(default_factory=set)


def judge_by_state(goals: Mapping[str, Goal], turns: Sequence[SpokenTurn], database: Database) -> Judgement:
    told = {domain: _Told() for domain in goals}
    for turn, active in zip(turns, active_domains([turn.state for turn in turns]), strict=True):
        if active in told:
            _hear(told[active], active, turn, database)
    return _judge(goals, told, database, lambda offered, wanted: set(offered) <= set(wanted))


def _hear(told: _Told, domain: str, turn: SpokenTurn, database: Database) -> None:
    kinds = {mention.kind for mention in turn.mentions if mention.domain == domain}
    if OFFERED_BY.get(domain) in kinds:
        found = database.query(domain, domain_constraints(turn.state, domain))
        if not told.offered or any(number not in found for number in told.offered):
            told.offered = found
    told.attributes |= kinds


def judge_by_name(goals: Mapping[str, Goal], turns: Sequence[SpokenTurn], database: Database) -> Judgement:
    told = {domain: _Told() for domain in goals}
    for domain, heard in told.items():
        mentions = [mention for turn in turns for mention in turn.mentions if mention.domain == domain]
        for turn in turns:
            named = [m for m in turn.mentions if m.domain == domain and m.kind == OFFERED_BY.get(domain)]
            heard.offered = sorted(frozenset().union(*(m.records for m in named))) if named else heard.offered
        names = {number for m in mentions if m.kind == OFFERED_BY.get(domain) for number in m.records}
        heard.attributes = {m.kind for m in mentions if not m.records or not names or names & m.records}
    return _judge(goals, told, database, lambda offered, wanted: bool(set(offered) & set(wanted)))


def _judge(goals: Mapping[str, Goal], told: Mapping[str, _Told], database: Database, meets: Meets) -> Judgement:
    verdict = Judgement({}, {})
    for domain, goal in goals.items():
        offered = told[domain].offered
        if _needs_no_offer(domain, goal, offered):
            verdict.inform[domain] = True
        else:
            verdict.inform[domain] = bool(offered) and meets(offered, database.query(domain, goal.constraints))
            fault = "offer_fails_goal" if offered else "nothing_offered"
            verdict.faults += [] if verdict.inform[domain] else [f"{fault}_{domain}"]
        missing = sorted(goal.requested - told[domain].attributes)
        verdict.success[domain] = not missing
        verdict.faults += [f"{kind}_not_told_{domain}" for kind in missing]
    return verdict


def _needs_no_offer(domain: str, goal: Goal, offered: Sequence[int]) -> bool:
    """A goal that names its place, a domain without a database, a train that is only asked about."""
    if "name" in goal.constraints or domain not in WITH_DATABASE:
        return True
    return domain == "train" and not offered and "trainid" not in goal.requested


def domain_constraints(state: State, domain: str) -> dict[str, str]:
    """A state's slots of one domain, without the domain's name."""
    return {slot.partition("-")[2]: value for slot, value in state.items() if slot.startswith(f"{domain}-")}


def active_domains(states: Sequence[State]) -> list[str]:
    """The domain that each turn is about, "" before there is any, as the standard evaluation estimates it: the one whose
    state changed; of several the one before, if it is among them, else the fullest. At the first turn without a change
    after several changed, the next of them."""
    active, found = "", list[str]()
    before: State = {}
    changed: list[str] = []
    for state in states:
        others = [domain for domain in changed if domain != active and domain in _domains(state)]
        several = len(changed) > 1
        changed = [domain for domain in _domains(state) if _of(state, domain) - _of(before, domain)]
        if changed and active not in changed:
            active = max(changed, key=lambda domain: len(_of(state, domain)))
        elif not changed and several and others:
            active = others[0]
        before = state
        found.append(active)
    return found


def _domains(state: State) -> list[str]:
    return list(dict.fromkeys(slot.partition("-")[0] for slot in state))


def _of(state: State, domain: str) -> set[tuple[str, str]]:
    return {(slot, value) for slot, value in state.items() if slot.startswith(f"{domain}-")}
