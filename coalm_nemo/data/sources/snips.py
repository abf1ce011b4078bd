"""SNIPS (custom intent engines, 2017): one utterance a row, its intent and slots read off as a dialogue state."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from coalm_nemo.data.rows import Row, alpaca_messages
from coalm_nemo.data.sources.base import Block, Dropped, Source
from coalm_nemo.data.sources.readers import MAX_RECORD_BYTES, bad_record
from coalm_nemo.errors import UserError

_PREFIX, _FULL = "train_", "_full"
_HIGH_BYTES = re.compile(rb"[\x80-\xff]+")

Slots = tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class SnipsSource(Source):
    """`train_INTENT_full.json` (or `train_INTENT.json`), all in one directory or in a folder per intent."""

    def files(self) -> list[Path]:
        return list(_training_files(Path(self.path)).values())

    def blocks(self) -> Iterator[Block]:
        for file in self.files():
            yield Block(file, 1)

    def rows(self, block: Block, seed: int) -> Iterator[Row | Dropped]:
        stamps = tuple((file, file.stat().st_mtime_ns) for file in self.files())
        instruction = _instruction(_slots_by_domain(stamps))
        number = 0
        for domain, pieces in _utterances(block.file):
            number += 1
            row_id = f"{block.file.name}:{number}"
            text = _one_line("".join(piece["text"] for piece in pieces))
            if not text:
                yield Dropped("empty_text", row_id)
                continue
            state = {"domain": domain, "slot_values": _slot_values(pieces)}
            output = f"System: {json.dumps(state, ensure_ascii=False)}"
            record = {"instruction": instruction, "input": f"User: {text}", "output": output}
            yield Row(row_id, messages=alpaca_messages(record, row_id), part="tod")


def _training_files(path: Path) -> dict[str, Path]:
    """Intent -> its file, sorted by intent; the full file where there is a short one too."""
    if not path.is_dir():
        raise UserError(f"SNIPS source {path} is not a directory; it must hold train_INTENT_full.json files")
    found: dict[str, Path] = {}
    for file in sorted(path.rglob(f"{_PREFIX}*.json"), key=lambda f: (_intent(f), _FULL not in f.stem, str(f))):
        first = found.setdefault(_intent(file), file)
        if first is not file and first.stem == file.stem:
            raise UserError(f"SNIPS source {path} holds {file.name} twice: {first} and {file}")
    if not found:
        raise UserError(f"directory {path} holds no SNIPS training file (train_INTENT_full.json or train_INTENT.json)")
    return found


def _intent(file: Path) -> str:
    return file.stem.removeprefix(_PREFIX).removesuffix(_FULL)


def _utterances(file: Path) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """(intent, pieces of the utterance), in order. Raises UserError for a file of another layout."""
    value = _load(file)
    if isinstance(value, list):
        value = {_intent(file): value}
    if not isinstance(value, dict):
        raise UserError(f"{file} is not a SNIPS file; expected {{INTENT: [{{'data': [...]}}]}}")
    number = 0
    for domain, utterances in value.items():
        if not isinstance(utterances, list):
            raise UserError(f"{file} is not a SNIPS file; {domain!r} must be a list of utterances")
        for utterance in utterances:
            number += 1
            pieces = utterance.get("data") if isinstance(utterance, dict) else None
            if not isinstance(pieces, list) or not all(map(_is_piece, pieces)):
                raise bad_record(file, number, "needs 'data', a list of objects with a 'text' and perhaps an 'entity'")
            yield domain, pieces


def _is_piece(piece: Any) -> bool:
    return (
        isinstance(piece, dict) and isinstance(piece.get("text"), str) and isinstance(piece.get("entity"), str | None)
    )


def _load(file: Path) -> Any:
    if file.stat().st_size > MAX_RECORD_BYTES:
        raise UserError(f"{file} is over {MAX_RECORD_BYTES >> 20} MB; no SNIPS file is, so it must be something else")
    raw = file.read_bytes()
    try:
        value = json.loads(_as_text(raw))
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file} is not valid JSON ({e})") from e
    return value


def _as_text(raw: bytes) -> str:
    """UTF-8. Some of the public files are Latin-1, or UTF-8 with Latin-1 letters: only what is not UTF-8 is taken so."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return _HIGH_BYTES.sub(_high_bytes_as_utf8, raw).decode()


def _high_bytes_as_utf8(run: re.Match[bytes]) -> bytes:
    try:
        run[0].decode()
    except UnicodeDecodeError:
        return run[0].decode("latin-1").encode()
    return run[0]


def _slot_values(pieces: list[dict[str, str]]) -> dict[str, str | list[str]]:
    """Slot -> value, or list of values where the utterance names several."""
    values: dict[str, list[str]] = {}
    for piece in pieces:
        if piece.get("entity") and _one_line(piece["text"]):
            values.setdefault(piece["entity"], []).append(_one_line(piece["text"]))
    return {slot: found[0] if len(found) == 1 else list(found) for slot, found in values.items()}


def _one_line(text: str) -> str:
    return " ".join(text.split())


@lru_cache(maxsize=4)
def _slots_by_domain(stamps: tuple[tuple[Path, int], ...]) -> Slots:
    """Every domain with its slots, both sorted. The times of change are in the key: an edited file is read again."""
    slots: dict[str, set[str]] = {}
    for file, _ in stamps:
        for domain, pieces in _utterances(file):
            slots.setdefault(domain, set()).update(piece["entity"] for piece in pieces if piece.get("entity"))
    return tuple((domain, tuple(sorted(slots[domain]))) for domain in sorted(slots))


@lru_cache(maxsize=4)
def _instruction(domains: Slots) -> str:
    """Our wording of the task: the release's own text is not ours to copy."""
    lists = "\n".join(f"- {domain}: {', '.join(slots)}" for domain, slots in domains)
    domain, slots = next((d for d in domains if d[1]), ("Domain", ("slot",)))
    sample = json.dumps({"domain": domain, "slot_values": {slots[0]: "words of the user"}}, ensure_ascii=False)
    return (
        "Track the state of a dialogue between a user and an assistant. Decide which one of the domains below the "
        "user's request belongs to, and copy from the request the value of every slot that it fills.\n"
        f"Domains and their slots:\n{lists}\n"
        "Capture no slot that is not listed for the domain, and none that the user says nothing about. A slot with "
        "several values holds a list of them. Answer with one JSON object after 'System:', in this form:\n"
        f"System: {sample}"
    )
