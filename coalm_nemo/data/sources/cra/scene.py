"""What is known at one turn of a dialogue: the annotation of the turn, and what was said before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from coalm_nemo.data.sources.cra.dialogue import Act, Frame
from coalm_nemo.data.sources.cra.literal import Value
from coalm_nemo.data.sources.cra.schema import Function, Schema
from coalm_nemo.data.sources.cra.wording import is_name

_VALUE_ACTS = ("INFORM", "SELECT", "CONFIRM", "OFFER")


@dataclass(frozen=True)
class Facts:
    """What the annotation up to a turn says about values: the grounding rules (checks.py) rest on it."""

    service: str
    surfaces: Mapping[str, frozenset[str]]
    """Canonical value -> the forms in which it was annotated: "2019-03-01" -> {"today", "March 1st"}."""
    said: Mapping[str, str]
    """Slot of the service -> canonical value of its latest act (the user's INFORM or SELECT, the system's CONFIRM or
    OFFER). A value that was said and then changed is not here."""


@dataclass
class Progress:
    """What the turns so far have said, kept while a dialogue is read."""

    surfaces: dict[str, frozenset[str]] = field(default_factory=dict)
    said: dict[str, dict[str, str]] = field(default_factory=dict)
    """Service -> slot -> latest canonical value."""
    shown: dict[str, dict[str, str]] = field(default_factory=dict)
    """The same in the words that were used."""
    states: dict[str, Mapping[str, list[str]]] = field(default_factory=dict)
    """Service -> the user's state at the turn before."""
    entity: dict[str, str] = field(default_factory=dict)
    """Service -> name of what was offered last; empty where several were offered at once."""
    results: set[str] = field(default_factory=set)
    """Every value of the records that the observations so far have shown."""
    last_acts: tuple[Act, ...] = ()
    """The system's, in its last turn."""

    def note(self, frame: Frame) -> None:
        for act in frame.acts:
            for surface, value in zip(act.values, act.canonical, strict=False):
                if surface not in self.surfaces.get(value, ()):
                    self.surfaces[value] = self.surfaces.get(value, frozenset()) | {surface}
            if act.act in _VALUE_ACTS and act.slot and len(act.canonical) == 1:
                self.said.setdefault(frame.service, {})[act.slot] = act.canonical[0]
                self.shown.setdefault(frame.service, {})[act.slot] = act.values[0]

    def note_user(self, frames: tuple[Frame, ...]) -> None:
        for frame in frames:
            self.note(frame)

    def end_turn(self, user: tuple[Frame, ...], system: tuple[Frame, ...]) -> None:
        for frame in user:
            self.states[frame.service] = frame.state or {}
        for frame in system:
            self.note(frame)
            for act in frame.acts:
                if act.act == "OFFER" and is_name(act.slot):
                    self.entity[frame.service] = act.values[0] if len(act.values) == 1 else ""
        self.last_acts = tuple(act for frame in system for act in frame.acts)

    def facts(self, service: str) -> Facts:
        return Facts(service, dict(self.surfaces), dict(self.said.get(service, {})))


@dataclass(frozen=True)
class Scene:
    """One user utterance and the answer to it, as thoughts are written about them."""

    schema: Schema
    user: tuple[Frame, ...]
    system: Frame
    """The frame with the call, or the first."""
    before: Progress
    """Up to, not including, this turn."""
    function: Function | None = None
    """What is called."""
    arguments: Mapping[str, Value] = field(default_factory=dict)

    @property
    def service(self) -> str:
        return self.system.service

    @property
    def intended(self) -> Function | None:
        """What the user is after in the system's service; it need not be called yet."""
        intents = [frame.intent for frame in self.user if frame.service == self.service]
        return self.schema.functions.get((self.service, intents[0])) if intents else None

    def user_does(self, *names: str) -> bool:
        return any(act.act in names for frame in self.user for act in frame.acts)

    def system_acts(self, name: str) -> list[Act]:
        return [act for act in self.system.acts if act.act == name]

    def followed(self, *names: str) -> bool:
        """Whether the system's last turn had one of these acts."""
        return any(act.act in names for act in self.before.last_acts)
