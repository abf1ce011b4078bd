"""The published results that ours are put beside, with their own errors noted (`published.json`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from coalm_nemo.errors import UserError

FILE = Path(__file__).parent / "published.json"


@dataclass(frozen=True)
class Published:
    """One table: percentages by model, benchmark and metric; metrics have the names that scores.json gives them."""

    paper: str
    metrics: dict[str, dict[str, str]]
    """Benchmark -> metric -> what the paper calls it."""
    models: dict[str, dict[str, dict[str, float]]]
    """Model -> benchmark -> metric -> percent."""
    ablation_8b: dict[str, list[Any]]
    notes: list[dict[str, Any]]
    """{"benchmark", "models" (none: all of them), "text"}: what is wrong with a figure, or unclear."""

    def row(self, model: str, benchmark: str) -> dict[str, float]:
        """Metric -> percent. Raises UserError where the table has no such row."""
        names = {name.lower(): name for name in self.models}
        if model.lower() not in names:
            raise UserError(f"the published table has no {model!r}; it has {', '.join(self.models)}")
        row = self.models[names[model.lower()]].get(benchmark)
        if row is None:
            raise UserError(f"the published table has no {benchmark} score of {names[model.lower()]}")
        return row

    def notes_on(self, benchmark: str, model: str) -> list[str]:
        """What to know before believing a row."""
        model = model.lower()
        return [
            str(n["text"])
            for n in self.notes
            if n["benchmark"] == benchmark and (not n["models"] or model in map(str.lower, n["models"]))
        ]


@cache
def load_published() -> Published:
    return Published(**json.loads(FILE.read_text(encoding="utf-8")))
