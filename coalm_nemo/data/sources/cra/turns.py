"""A dialogue -> the parts of its turns, thoughts included: what rows are assembled from, and what a rewriter may reword."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

from coalm_nemo.data.sources.cra import observe
from coalm_nemo.data.sources.cra.dialogue import Act, Dialogue, Frame
from coalm_nemo.data.sources.cra.literal import Value, render_call
from coalm_nemo.data.sources.cra.scene import Facts, Progress, Scene
from coalm_nemo.data.sources.cra.schema import Function, Schema
from coalm_nemo.data.sources.cra.thoughts import thought_after, thought_before
from coalm_nemo.errors import UserError


@dataclass(frozen=True)
class Call:
    name: str
    arguments: Mapping[str, Value]

    @property
    def text(self) -> str:
        return render_call(self.name, self.arguments)


@dataclass(frozen=True)
class Turn:
    """A user utterance and the answer to it. A rewriter replaces `thought`, `thought_after` and `system`."""

    number: int
    """Position of the system's turn in the source."""
    user: str
    thought: str
    system: str
    call: Call | None = None
    observation: str = ""
    observation_brief: str = ""
    """The same with only the records that are spoken of: what later turns see of it."""
    thought_after: str = ""
    facts: Facts | None = None
    """Where there is a call."""
    unsupported: str = ""
    """Why the source's answer is not borne out by its own results, where it is not (rare): a reason for Dropped."""
    left_out: tuple[str, ...] = ()
    """Reasons why further calls of this turn, or its only one, are not made."""
    services: frozenset[str] = frozenset()
    """Those of the whole dialogue."""


def make_turns(dialogue: Dialogue, schema: Schema, seed: int) -> list[Turn]:
    """The parts of every turn of an SGD dialogue. The words depend on the seed and the turn's id, on nothing else.

    Raises UserError for a service that the schema lacks.
    """
    progress, turns = Progress(), []
    for number in range(1, len(dialogue.turns), 2):
        user, system = dialogue.turns[number - 1], dialogue.turns[number]
        rng = random.Random(f"{seed}:{dialogue.dialogue_id}/{number}")
        scene = _scene(schema, user.frames, system.frames, progress)
        turn = Turn(number, user.utterance, thought_before(scene, rng), system.utterance, services=dialogue.services)
        progress.note_user(user.frames)
        if scene.function:
            turn = _with_call(turn, scene, progress, _acts_until_next_call(dialogue, number), rng)
        unsupported = turn.unsupported or _unsupported(system.frames, progress)
        turns.append(replace(turn, unsupported=unsupported, left_out=_further_calls(system.frames)))
        progress.end_turn(user.frames, system.frames)
    return turns


def _scene(schema: Schema, user: tuple[Frame, ...], system: tuple[Frame, ...], progress: Progress) -> Scene:
    if not user or not system:
        raise UserError("a turn has no frame, so nothing says what it is about")
    for frame in (*user, *system):
        if frame.service not in schema.slots:
            raise UserError(f"service {frame.service} is not in the schema; is schema.json of the same split?")
    frame = next((frame for frame in system if frame.method), system[0])
    if not frame.method:
        return Scene(schema, user, frame, progress)
    function = schema.functions.get((frame.service, frame.method)) or _undefined(frame)
    return Scene(schema, user, frame, progress, function, function.typed(frame.parameters or {}))


def _undefined(frame: Frame) -> Function:
    """A stand-in for a method that the schema lacks, so that the check that drops the row sees it as it is."""
    return Function(frame.service, frame.method, "", False, (), {}, {})


def _further_calls(system: tuple[Frame, ...]) -> tuple[str, ...]:
    return ("second_call_in_turn",) * (sum(bool(frame.method) for frame in system) - 1)


def _acts_until_next_call(dialogue: Dialogue, number: int) -> list[tuple[Act, ...]]:
    """The system's acts in turn `number` and the following ones up to its next call."""
    acts = []
    for later in range(number, len(dialogue.turns), 2):
        frames = dialogue.turns[later].frames
        if later > number and any(frame.method for frame in frames):
            break
        acts.append(tuple(act for frame in frames for act in frame.acts))
    return acts


def _with_call(turn: Turn, scene: Scene, progress: Progress, acts: list[tuple[Act, ...]], rng: random.Random) -> Turn:
    results, status = scene.system.results, observe.status_of(scene.system.acts)
    first = observe.spoken_of(results, acts)
    shown = observe.with_others(results, first)
    brief = first or shown[:1]
    progress.results.update(value for record in brief for value in record.values())
    unlike = status == "success" and observe.differences(scene.system.parameters or {}, results)
    return replace(
        turn,
        call=Call(scene.system.method, scene.arguments),
        observation=observe.observation(shown, len(results), status),
        observation_brief=observe.observation(brief, len(results), status),
        thought_after=thought_after(scene, rng),
        facts=progress.facts(scene.service),
        unsupported="result_differs_from_call" if unlike else "",
    )


def _unsupported(system: tuple[Frame, ...], progress: Progress) -> str:
    """SGD's system now and then offers what none of its results holds (16 values of 9,200)."""
    said = [act for frame in system for act in frame.acts if act.act in ("OFFER", "INFORM")]
    held = all(value in progress.results for act in said for value in act.canonical)
    return "" if held else "answer_not_in_results"
