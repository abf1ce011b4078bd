"""The services of one SGD dialogue: its own calls with their real results, and an honest answer to every other call."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from coalm_nemo.data.sources.cra.dialogue import Act, Dialogue, Frame
from coalm_nemo.data.sources.cra.observe import observation, spoken_of, status_of, with_others
from coalm_nemo.data.sources.cra.schema import Function, Schema
from coalm_nemo.evaluation.calls import Call
from coalm_nemo.evaluation.dialogue_states.agent import Outcome
from coalm_nemo.evaluation.sgd.values import argument_text, normalize


@dataclass(frozen=True)
class GoldCall:
    """A call of the file's system."""

    turn: int
    """Which of the dialogue's user turns it answers, from 0."""
    function: Function
    parameters: Mapping[str, str]
    observation: str

    @property
    def service(self) -> str:
        return self.function.service

    def same_name(self, call: Call) -> bool:
        return call.name == self.function.name

    def same_arguments(self, call: Call) -> bool:
        """All of them and no others, with equal values."""
        given = {name: normalize(argument_text(value)) for name, value in call.arguments.items()}
        return given == {name: normalize(value) for name, value in self.parameters.items()}

    def answers(self, call: Call) -> bool:
        return self.same_name(call) and self.same_arguments(call)


def gold_calls(dialogue: Dialogue, schema: Schema) -> list[GoldCall]:
    """In order. A method that the schema lacks is left out: no model can know it."""
    found = []
    system = dialogue.turns[1::2]
    for turn, spoken in enumerate(system):
        for frame in spoken.frames:
            function = schema.functions.get((frame.service, frame.method))
            if function is not None:
                later = [tuple(act for f in t.frames for act in f.acts) for t in system[turn:]]
                found.append(GoldCall(turn, function, frame.parameters or {}, _observation(frame, later)))
    return found


def _observation(frame: Frame, acts: list[tuple[Act, ...]]) -> str:
    """As in our training rows: the records that are spoken of first, then the service's next best."""
    shown = with_others(frame.results, spoken_of(frame.results, acts))
    return observation(shown, len(frame.results), status_of(frame.acts))


@dataclass
class Services:
    """What the agent can call in a dialogue. The functions are those of the services that the dialogue is about."""

    schema: Schema
    names: tuple[str, ...]
    """The dialogue's services: where several have a function of one name, theirs is meant."""
    recorded: list[GoldCall]

    def function(self, call: Call) -> Function | None:
        """Of the services that have a function of this name and all its arguments, one of the dialogue's if there is one."""
        own = [self.schema.functions[s, call.name] for s in self.names if (s, call.name) in self.schema.functions]
        named = own or [f for (_, name), f in self.schema.functions.items() if name == call.name]
        fitting = [function for function in named if set(call.arguments) <= set(function.arguments)]
        return next(iter([*fitting, *named]), None)

    def run(self, call: Call) -> Outcome:
        """The recorded result of an equal call, at whichever turn it was made; otherwise no result, and why."""
        function = self.function(call)
        if function is None:
            return _refused("unknown_function", f"there is no function {call.name}")
        unknown = [name for name in call.arguments if name not in function.arguments]
        if unknown:
            return _refused("unknown_argument", f"{call.name} has no argument {unknown[0]}")
        if any(isinstance(value, list | dict) for value in call.arguments.values()):
            return _refused("argument_type", "every argument is one text, number or truth value")
        missing = [name for name in function.required if name not in call.arguments]
        if missing:
            return _refused("argument_missing", f"{call.name} needs {', '.join(missing)}")
        found = next((gold for gold in self.recorded if gold.answers(call)), None)
        return Outcome(found.observation if found else NO_RECORD)


NO_RECORD = json.dumps({"total": 0, "results": [], "reason": "the service has no record of this request"})
"""A call that the file's system never made has no result in the file; none is invented."""


def after_calls(state: Mapping[str, str], calls: Iterable[Call], services: Services) -> dict[str, str]:
    """`state` with the arguments of calls that were carried out; the latest value of a slot holds."""
    after = dict(state)
    for call in calls:
        function = services.function(call)
        assert function is not None
        after |= {f"{function.service}-{name}": argument_text(value) for name, value in call.arguments.items()}
    return {slot: value for slot, value in after.items() if value}


def from_answer(answer: Mapping[str, Any] | None, schema: Schema) -> dict[str, str]:
    """`{"Hotels_1-city": "Rome"}` or `{"Hotels_1": {"city": "Rome"}}` -> state; what is no slot is left out."""
    state = {}
    for key, value in (answer or {}).items():
        for name, held in value.items() if isinstance(value, dict) else [("", value)]:
            service, _, slot = (f"{key}-{name}" if name else key).partition("-")
            if slot in schema.slots.get(service, {}) and not isinstance(held, list | dict) and argument_text(held):
                state[f"{service}-{slot}"] = argument_text(held)
    return state


def _refused(fault: str, why: str) -> Outcome:
    return Outcome(json.dumps({"error": why}), fault)
