"""A run directory as the report shows it: finished, going on, or cut off in the middle of a line."""

from __future__ import annotations

import csv
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from coalm_nemo.errors import UserError
from coalm_nemo.report.series import Series
from coalm_nemo.training.callbacks.events_file import EVENTS
from coalm_nemo.training.callbacks.line_file import read_lines

METRICS, CONFIG, SLURM_EVENTS = "metrics.jsonl", "run.yaml", "slurm_events.tsv"
QUIET_S = 600.0
"""A run that has written nothing for this long (or 20 steps) is not going on."""


@dataclass
class Start:
    """One start of a run, until it ended or the next one began."""

    began: float
    step: int
    """After which step it went on."""
    ended: float
    last_step: int
    cause: str
    """Why it ended; "" while it goes on."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    job: str = ""
    nodes: str = ""


@dataclass
class Run:
    """What is known of one run."""

    path: Path
    name: str
    config: dict[str, str]
    """Dotted keys, values as text."""
    series: dict[str, Series]
    events: list[dict[str, Any]]
    starts: list[Start]
    total_steps: int
    status: str

    def of(self, event: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e.get("event") == event]

    @property
    def facts(self) -> Mapping[str, Any]:
        """Of the newest start: layout, code, environment, data, plan."""
        return self.starts[-1].facts if self.starts else {}

    @property
    def step(self) -> int:
        loss = self.series.get("lm_loss")
        return int(loss.steps[-1]) if loss else 0


def is_run(path: Path) -> bool:
    """Whether `path` is the directory of a `coalm train` run."""
    return any((Path(path) / name).is_file() for name in (METRICS, CONFIG, EVENTS))


def read_run(path: Path, name: str = "") -> Run:
    """Raises UserError where the configuration is unreadable; a torn or missing line of a log is passed over."""
    path = Path(path)
    series = _series(path / METRICS)
    events = [e for line in read_lines(path / EVENTS) if "time" in (e := clean(line))]
    _add_scores(series, events)
    run = Run(path, name or _name(path), _config(path / CONFIG), series, events, [], 0, "")
    run.starts = _starts(run)
    run.total_steps = int(run.facts.get("total_steps") or _number(run.config.get("train.steps")) or run.step)
    run.status = _status(run)
    return run


def clean(event: Mapping[str, Any]) -> dict[str, Any]:
    """An event without what is not of the type that it should be: another version may have written it."""
    checked = dict(event)
    for key in KINDS.keys() & event.keys():
        if (value := KINDS[key](event[key])) is None:
            del checked[key]
        else:
            checked[key] = value
    return checked


def _count(value: object) -> int | None:
    number = number_or_none(value)
    return None if number is None else int(number)


def _list(value: object) -> list[Any] | None:
    return value if isinstance(value, list) else None


def number_or_none(value: object) -> float | None:
    """A finite number of a size that clocks and counters have."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e18:
        return None
    return value


def _mapping(value: object) -> Mapping[str, Any] | None:
    return value if isinstance(value, Mapping) else None


KINDS: Mapping[str, Callable[[object], Any]] = {
    **dict.fromkeys(("time", "seconds", "size_bytes"), number_or_none),
    **dict.fromkeys(("step", "total_steps"), _count),
    **dict.fromkeys(("data", "code", "environment", "layout", "scores", "reached"), _mapping),
    **dict.fromkeys(("samples", "plan"), _list),
}


def _name(path: Path) -> str:
    resolved = path.resolve()
    return resolved.parent.name if resolved.name == "run" else resolved.name


def _number(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0


def _config(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    import yaml

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not valid YAML: {str(e).splitlines()[0]}") from e
    return dict(_flat(tree)) if isinstance(tree, dict) else {}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "" if value is None else str(value)


def _series(path: Path) -> dict[str, Series]:
    found: dict[str, Series] = defaultdict(Series)
    for line in read_lines(path):
        step = number_or_none(line.pop("step", None))
        if step is not None:
            for key, value in line.items():
                _add(found, key, step, value)
    return dict(found)


def _add(found: dict[str, Series], key: str, step: float, value: object) -> None:
    if isinstance(value, Mapping):
        for name, part in value.items():
            _add(found, f"{key}/{name}", step, part)
    elif isinstance(value, float) or number_or_none(value) is not None:  # a loss may be NaN, and is kept
        found[key].add(step, value)  # type: ignore[arg-type]


def _add_scores(series: dict[str, Series], events: list[dict[str, Any]]) -> None:
    for event in events:
        scores = event.get("scores")
        if event.get("event") == "scores" and scores and "step" in event:
            for name, value in scores.items():
                if number_or_none(value) is not None:
                    series.setdefault(f"eval/{name}", Series()).add(event["step"], value)


def _starts(run: Run) -> list[Start]:
    """From the events; what SLURM's side wrote says which job, which nodes and why."""
    times = run.series.get("time", Series())
    began = [e for e in run.events if e.get("event") == "start"]
    found = []
    for i, event in enumerate(began):
        until = began[i + 1]["time"] if i + 1 < len(began) else float("inf")
        own = [e for e in run.events if event["time"] <= e["time"] < until]
        end = next((e for e in own if e.get("event") == "end"), None)
        last = max([e["time"] for e in own], default=event["time"])
        step = max([int(event.get("step", 0)), *_steps(own)])
        before = bisect_left(times.values, until) - 1  # a step trained again is known by its last time only
        if before >= 0 and times.values[before] >= event["time"]:
            last, step = max(last, times.values[before]), max(step, int(times.steps[before]))
        if i + 1 < len(began) and not end:  # what it trained beyond its last checkpoint is known by its successor
            reached = began[i + 1].get("reached") or {}
            last = max(last, min(number_or_none(reached.get("time")) or 0.0, until))
            step = max(step, int(number_or_none(reached.get("step")) or 0))
        cause = str(end.get("status", "")) if end else ("killed" if until < float("inf") else "")
        found.append(Start(event["time"], int(event.get("step", 0)), end["time"] if end else last, step, cause, event))
    _tell_causes(run.path, found)
    return found


def _steps(events: list[dict[str, Any]]) -> list[int]:
    return [e["step"] for e in events if isinstance(e.get("step"), int)]


def _tell_causes(path: Path, starts: list[Start]) -> None:
    """What the job script notes (time, job, what, step reached, newest checkpoint's step, nodes): whose start it was, and
    why it ended. A job that never came to train has no start of ours to speak of."""
    begun = 0.0
    for row in _rows(path / SLURM_EVENTS):
        if len(row) < 6 or not (at := _seconds(row[0])):
            continue
        if row[2] == "start":
            begun = at
            for start in [s for s in starts if s.began >= at][:1]:
                start.job, start.nodes = row[1], row[5]
        else:
            for start in [s for s in starts if begun <= s.began <= at + 1][-1:]:  # its clock shows whole seconds
                start.cause = row[2]


def _rows(path: Path) -> list[list[str]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        return list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def _seconds(text: str) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return 0.0


def _status(run: Run) -> str:
    """finished | stopped | non-finite | ... as the run said, "running", or "silent since" it was last heard."""
    if run.starts and run.starts[-1].cause:
        return run.starts[-1].cause
    if not run.starts:
        return "finished" if run.total_steps and run.step >= run.total_steps else "not known"
    seconds = run.series.get("step_time_s", Series()).recent()
    patience = max(QUIET_S, 20 * max(seconds, default=0.0))
    return "running" if time.time() - run.starts[-1].ended < patience else "silent"
