"""Dialogue files of Schema-Guided Dialogue, and of MultiWOZ 2.2 in the same layout, as dataclasses."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coalm_nemo.errors import UserError

NO_INTENT = "NONE"


@dataclass(frozen=True, slots=True)
class Act:
    """A dialogue act. `values` are words of the utterance, `canonical` the same values as a service takes them."""

    act: str
    slot: str
    values: tuple[str, ...]
    canonical: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Frame:
    """What one turn says and does within one service."""

    service: str
    acts: tuple[Act, ...]
    intent: str = ""
    """The user's active intent; user turns only."""
    state: Mapping[str, list[str]] | None = None
    """Slot -> surface forms, as far as the user has settled them; user turns only."""
    requested: tuple[str, ...] = ()
    """Slots that the user asks about; user turns only."""
    method: str = ""
    """Function that the system called before it spoke."""
    parameters: Mapping[str, str] | None = None
    results: tuple[Mapping[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class SourceTurn:
    user: bool
    utterance: str
    """On one line."""
    frames: tuple[Frame, ...]


@dataclass(frozen=True, slots=True)
class Dialogue:
    dialogue_id: str
    turns: tuple[SourceTurn, ...]

    @property
    def services(self) -> frozenset[str]:
        """Those that the user wants something of, or that are called; MultiWOZ has frames of the others too."""
        frames = [frame for turn in self.turns for frame in turn.frames]
        return frozenset(frame.service for frame in frames if frame.method or frame.intent not in ("", NO_INTENT))


def read_dialogues(path: Path, rename: Callable[[str], str] = str) -> list[Dialogue]:
    """One dialogues_*.json. Raises UserError naming the file and the first dialogue that is not in the layout."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not valid JSON ({e})") from e
    if not isinstance(raw, list):
        raise UserError(f"{path}: a dialogue file is a JSON list of dialogues, not {type(raw).__name__}")
    return [_checked_dialogue(dialogue, number, path, rename) for number, dialogue in enumerate(raw, 1)]


def _checked_dialogue(raw: Any, number: int, path: Path, rename: Callable[[str], str]) -> Dialogue:
    name = f"dialogue {raw['dialogue_id']}" if isinstance(raw, dict) and "dialogue_id" in raw else f"dialogue {number}"
    try:
        return _dialogue(raw, rename)
    except KeyError as e:
        raise UserError(f"{path}: {name} lacks {e}") from e
    except (TypeError, AttributeError, ValueError) as e:
        raise UserError(f"{path}: {name} is not in the layout of an SGD dialogue ({e})") from e


def _dialogue(raw: dict[str, Any], rename: Callable[[str], str]) -> Dialogue:
    turns = []
    for number, turn in enumerate(raw["turns"]):
        if turn["speaker"] != ("SYSTEM" if number % 2 else "USER"):
            raise ValueError(f"turn {number}: USER and SYSTEM must alternate, USER first")
        frames = tuple(_frame(frame, rename) for frame in turn["frames"])
        turns.append(SourceTurn(number % 2 == 0, " ".join(turn["utterance"].split()), frames))
    return Dialogue(str(raw["dialogue_id"]), tuple(turns))


def _frame(raw: dict[str, Any], rename: Callable[[str], str]) -> Frame:
    acts = tuple(_act(act, rename) for act in raw.get("actions", ()))
    state = raw.get("state")
    if state is not None:
        values = {rename(slot): [*map(str, surfaces)] for slot, surfaces in state["slot_values"].items()}
        requested = tuple(rename(slot) for slot in state.get("requested_slots", ()))
        return Frame(raw["service"], acts, state["active_intent"], values, requested)
    if "service_call" not in raw:
        return Frame(raw["service"], acts)
    call = raw["service_call"]
    results = tuple({str(k): str(v) for k, v in result.items()} for result in raw["service_results"])
    parameters = {str(name): str(value) for name, value in call["parameters"].items()}
    return Frame(raw["service"], acts, method=call["method"], parameters=parameters, results=results)


def _act(raw: dict[str, Any], rename: Callable[[str], str]) -> Act:
    values, canonical = raw["values"], raw["canonical_values"]
    if not isinstance(values, list) or not isinstance(canonical, list) or len(values) != len(canonical):
        raise ValueError(f"act {raw['act']}: values and canonical_values must be lists of the same length")
    return Act(raw["act"], rename(raw["slot"]), tuple(map(str, values)), tuple(map(str, canonical)))
