"""What `coalm eval` left: scores.json, below a run or in a directory of its own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coalm_nemo.errors import UserError

SCORES = "scores.json"
DEPTH = 4
"""How far below a directory evaluations are looked for: checkpoints hold thousands of files further down."""
HEADLINE = 6
"""Metrics shown where the file does not say which matter."""


@dataclass(frozen=True)
class Score:
    """One metric, in percent."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Evaluated:
    """One evaluation of one model."""

    path: Path
    label: str
    benchmark: str
    model: str
    protocol: Mapping[str, Any]
    items: str
    scores: Mapping[str, Score]
    faults: Mapping[str, Any]
    headline: Sequence[str]
    """The metrics that a table shows, in order."""


def find_scores(path: Path) -> list[Path]:
    """Every scores.json in `path` and below it."""
    patterns = ["/".join(["*"] * depth + [SCORES]) for depth in range(DEPTH + 1)]
    found = {p for pattern in patterns for p in Path(path).glob(pattern) if "checkpoints" not in p.parts[:-1]}
    return sorted(found)


def read_scores(file: Path, root: Path) -> Evaluated:
    """Raises UserError where the file is damaged."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        scores = {str(k): _score(v) for k, v in raw["scores"].items()}
        model = raw["model"]["name"] if isinstance(raw["model"], Mapping) else raw["model"]
        benchmark, protocol = str(raw["benchmark"]), dict(raw.get("protocol") or {})
        faults, counts = dict(raw.get("faults") or {}), raw.get("counts") or {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{file} is no scores.json of `coalm eval` ({type(e).__name__}: {e})") from e
    within = file.parent.relative_to(root) if file.is_relative_to(root) else file.parent
    label = root.resolve().name if str(within) == "." else str(within)
    headline = [str(name) for name in raw.get("headline") or list(scores)[:HEADLINE] if str(name) in scores]
    return Evaluated(file.parent, label, benchmark, str(model), protocol, _items(counts), scores, faults, headline)


def _items(counts: object) -> str:
    if isinstance(counts, Mapping):
        return str(counts.get("scored", counts.get("items", "")))
    return str(counts)


def _score(raw: object) -> Score:
    if isinstance(raw, Mapping):
        value, low, high = (raw.get(k) for k in ("value", "low", "high"))
    else:
        value, low, high = raw, None, None
    numbers = [float(v) if isinstance(v, int | float) else None for v in (value, low, high)]
    return Score(*numbers)


def benchmarks_of(found: Iterable[Evaluated]) -> list[str]:
    """Names in the order of first appearance."""
    return list(dict.fromkeys(e.benchmark for e in found))
