"""scores.json and items.jsonl: sums over items, intervals by bootstrap over groups, and every answer for reading."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from coalm_nemo.evaluation.base import Benchmark, Verdict
from coalm_nemo.evaluation.runner import Outcome

RESAMPLES = 2000
RESAMPLES_AT_ONCE = 200
BOOTSTRAP_SEED = 20
SCORES_FILE, ITEMS_FILE = "scores.json", "items.jsonl"
PACKAGES = ("coalm_nemo", "transformers", "torch", "numpy")


def metric_names(verdicts: Iterable[Verdict]) -> list[str]:
    """Every metric that any item counts for, in the order of first appearance."""
    return list(dict.fromkeys(name for v in verdicts for name in v.counts))


def group_sums(verdicts: Sequence[Verdict], names: Sequence[str]) -> np.ndarray:
    """Points and out-of by group and metric: float64 [groups, 2, metrics]."""
    groups = {g: i for i, g in enumerate(dict.fromkeys(v.group for v in verdicts))}
    columns = {name: i for i, name in enumerate(names)}
    sums = np.zeros((len(groups), 2, len(names)))
    for verdict in verdicts:
        for name, (points, of) in verdict.counts.items():
            sums[groups[verdict.group], :, columns[name]] += points, of
    return sums


def bootstrap(sums: np.ndarray, *, resamples: int = RESAMPLES, seed: int = BOOTSTRAP_SEED) -> np.ndarray:
    """Scores in percent of resampled groups: [resamples, metrics] from [groups, 2, metrics]; NaN where nothing counts.

    Groups are drawn with replacement; how often each comes is one multinomial draw, so a resample is a matrix product.
    """
    groups, _, metrics = sums.shape
    rng = np.random.default_rng(seed)
    flat, parts = sums.reshape(groups, 2 * metrics), []
    for start in range(0, resamples, RESAMPLES_AT_ONCE):
        count = min(RESAMPLES_AT_ONCE, resamples - start)
        weights = rng.multinomial(groups, np.full(groups, 1 / groups), size=count)
        parts.append(percent((weights @ flat).reshape(count, 2, metrics)))
    return np.concatenate(parts)


def percent(sums: np.ndarray) -> np.ndarray:
    """100 x points / out of: [..., metrics] from [..., 2, metrics]; NaN where nothing counts."""
    points, of = sums[..., 0, :], sums[..., 1, :]
    return np.divide(100.0 * points, of, out=np.full(of.shape, np.nan), where=of > 0)


def interval(samples: np.ndarray) -> tuple[float | None, float | None]:
    """The middle 95 % of the resampled scores."""
    there = samples[~np.isnan(samples)]
    if not there.size:
        return None, None
    low, high = np.percentile(there, [2.5, 97.5])
    return float(low), float(high)


def score_table(verdicts: Sequence[Verdict]) -> dict[str, dict[str, float | None]]:
    """Metric -> value, low, high (percent), points, of. Value is None where nothing counts."""
    names = metric_names(verdicts)
    if not names:
        return {}
    sums = group_sums(verdicts, names)
    total, resampled = sums.sum(axis=0), bootstrap(sums)
    table: dict[str, dict[str, float | None]] = {}
    for i, name in enumerate(names):
        points, of = float(total[0, i]), float(total[1, i])
        low, high = interval(resampled[:, i])
        value = 100 * points / of if of > 0 else None
        table[name] = {"value": value, "low": low, "high": high, "points": points, "of": of}
    return table


def make_scores(
    benchmark: Benchmark, outcomes: Sequence[Outcome], model: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """All of scores.json."""
    verdicts = [o.verdict for o in outcomes]
    table = score_table(verdicts)
    for name, value in benchmark.corpus_scores(verdicts).items():
        table[name] = {"value": float(value), "low": None, "high": None, "points": None, "of": None}
    return {
        "benchmark": benchmark.name,
        "model": dict(model),
        "settings": dict(settings),
        "protocol": dict(benchmark.protocol),
        "versions": versions(),
        "counts": {
            "items": len(outcomes),
            "groups": len({v.group for v in verdicts}),
            "answers": sum(len(o.steps) for o in outcomes),
        },
        "headline": [name for name in benchmark.headline if name in table],
        "scores": table,
        "faults": dict(Counter(f for v in verdicts for f in v.faults).most_common()),
        "interval": f"95 %, {RESAMPLES} bootstrap resamples of groups",
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that shape an answer or a score."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def item_line(outcome: Outcome) -> str:
    """One line of items.jsonl: the verdict, and every prompt with its answer and the gold one."""
    verdict = asdict(outcome.verdict)
    verdict["counts"] = {k: [float(p), float(of)] for k, (p, of) in outcome.verdict.counts.items()}
    steps = [
        {"messages": list(s.prompt.messages), "tools": s.prompt.tools, "gold": s.prompt.gold, "answer": s.answer}
        for s in outcome.steps
    ]
    return json.dumps(verdict | {"steps": steps}, ensure_ascii=False, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    """What JSON does not know: sets sorted, everything else as Python writes it."""
    return sorted(value, key=str) if isinstance(value, set | frozenset) else str(value)


def write_results(out: Path, scores: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    """items.jsonl, then scores.json, each under its name only when it is whole."""
    write_whole(out / ITEMS_FILE, "".join(item_line(o) for o in outcomes))
    write_whole(out / SCORES_FILE, json.dumps(scores, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write to another name on the same disk, then rename."""
    partial = path.with_name(f".{path.name}.partial{os.getpid()}")
    partial.write_text(text.encode("utf-8", "replace").decode("utf-8"), encoding="utf-8")
    partial.replace(path)
