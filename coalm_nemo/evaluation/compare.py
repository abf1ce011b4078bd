"""`coalm eval compare`: paired differences between two evaluations, or between one and the published table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coalm_nemo.errors import UserError
from coalm_nemo.evaluation.base import Verdict
from coalm_nemo.evaluation.published import load_published
from coalm_nemo.evaluation.scores import ITEMS_FILE, SCORES_FILE, bootstrap, group_sums, interval, metric_names, percent


@dataclass(frozen=True)
class Evaluation:
    """One --out directory as it was written."""

    path: Path
    scores: dict[str, Any]
    verdicts: dict[str, Verdict]
    """By item id."""


def load_evaluation(path: Path) -> Evaluation:
    """Raises UserError where the directory holds no finished evaluation."""
    scores_file, items_file = path / SCORES_FILE, path / ITEMS_FILE
    if not scores_file.is_file():
        raise UserError(f"{path} holds no {SCORES_FILE}; give the --out directory of a finished `coalm eval`")
    try:
        scores = json.loads(scores_file.read_text(encoding="utf-8"))
        _ = scores["benchmark"], scores["protocol"].items(), scores["scores"].items(), scores["model"]["name"]
        lines = items_file.read_text(encoding="utf-8").splitlines() if items_file.is_file() else []
        verdicts = [_verdict(json.loads(line)) for line in lines]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path} holds a damaged evaluation ({e}); run `coalm eval` again") from e
    return Evaluation(path, scores, {v.id: v for v in verdicts})


def _verdict(item: Mapping[str, Any]) -> Verdict:
    counts = {name: (float(points), float(of)) for name, (points, of) in item["counts"].items()}
    return Verdict(str(item["id"]), str(item["group"]), counts)


def compare_command(runs: Sequence[Path], published: str, as_json: bool) -> None:
    """Print the comparison. Raises UserError."""
    if len(runs) != (1 if published else 2):
        raise UserError("give two evaluations, A and B; or A alone with --published MODEL")
    first = load_evaluation(runs[0])
    result = compare_published(first, published) if published else compare(first, load_evaluation(runs[1]))
    print(json.dumps(result, ensure_ascii=False)) if as_json else print_comparison(result)


def compare(a: Evaluation, b: Evaluation) -> dict[str, Any]:
    """B minus A on the items that both have; groups are resampled for both together. Raises UserError."""
    if a.scores["benchmark"] != b.scores["benchmark"]:
        raise UserError(
            f"{a.path} is an evaluation on {a.scores['benchmark']}, {b.path} on {b.scores['benchmark']}; "
            "only one benchmark can be compared"
        )
    ids = [i for i in a.verdicts if i in b.verdicts]
    if not ids:
        raise UserError(f"{a.path} and {b.path} have no item in common")
    names = [n for n in metric_names(a.verdicts[i] for i in ids) if n in metric_names(b.verdicts[i] for i in ids)]
    sums_a = group_sums([a.verdicts[i] for i in ids], names)
    # Grouped as A groups them: an item must fall into the same group on both sides.
    sums_b = group_sums([Verdict(i, a.verdicts[i].group, b.verdicts[i].counts) for i in ids], names)
    rows = difference_rows(names, sums_a, sums_b)
    notes = [*_other_items(a, b, len(ids)), *_other_protocol(a, b), *_unpaired(a, b)]
    return _result(a, f"{b.scores['model']['name']} ({b.path})", len(ids), rows, notes)


def difference_rows(names: Sequence[str], sums_a: np.ndarray, sums_b: np.ndarray) -> list[dict[str, Any]]:
    """One row a metric: A, B, B - A and its interval. The same seed draws the same groups on both sides."""
    value_a, value_b = percent(sums_a.sum(axis=0)), percent(sums_b.sum(axis=0))
    resampled = bootstrap(sums_b) - bootstrap(sums_a)
    rows = []
    for i, name in enumerate(names):
        low, high = interval(resampled[:, i])
        a, b = _or_none(value_a[i]), _or_none(value_b[i])
        difference = None if a is None or b is None else b - a
        rows.append({"metric": name, "a": a, "b": b, "difference": difference, "low": low, "high": high})
    return rows


def compare_published(a: Evaluation, model: str) -> dict[str, Any]:
    """A minus the published figure. The published one is taken as exact: nobody published its items. Raises UserError."""
    published, benchmark = load_published(), a.scores["benchmark"]
    rows = []
    for name, theirs in published.row(model, benchmark).items():
        ours = a.scores["scores"].get(name)
        if ours is None or ours["value"] is None:
            continue
        low, high = (None if ours[k] is None else ours[k] - theirs for k in ("low", "high"))
        difference = ours["value"] - theirs
        row = {"metric": name, "a": theirs, "b": ours["value"], "difference": difference, "low": low, "high": high}
        rows.append(row)
    if not rows:
        wanted = ", ".join(published.row(model, benchmark))
        raise UserError(f"{a.path} has none of the metrics that are published for {model}: {wanted}")
    notes = ["The published figure is taken as exact; the interval is that of our own score."]
    if a.scores.get("settings", {}).get("limit"):
        notes.append("Ours is a part of the benchmark only (--limit).")
    result = _result(a, str(a.path), a.scores["counts"]["items"], rows, notes + published.notes_on(benchmark, model))
    return result | {"a": f"{model}, {published.paper}", "b": f"{a.scores['model']['name']} ({a.path})"}


def _result(a: Evaluation, b: str, items: int, rows: list[dict[str, Any]], notes: list[str]) -> dict[str, Any]:
    name = f"{a.scores['model']['name']} ({a.path})"
    return {"benchmark": a.scores["benchmark"], "a": name, "b": b, "items": items, "rows": rows, "notes": notes}


def _other_items(a: Evaluation, b: Evaluation, common: int) -> list[str]:
    only_a, only_b = len(a.verdicts) - common, len(b.verdicts) - common
    if not only_a and not only_b:
        return []
    return [f"The item sets differ: {common} are compared, {only_a} are in A only and {only_b} in B only."]


def _other_protocol(a: Evaluation, b: Evaluation) -> list[str]:
    """One sentence a difference of protocol."""
    ours, theirs = a.scores["protocol"], b.scores["protocol"]
    keys = [k for k in dict.fromkeys([*ours, *theirs]) if ours.get(k) != theirs.get(k)]
    return [f"The protocols differ in {k}: {ours.get(k)!r} in A, {theirs.get(k)!r} in B." for k in keys]


def _unpaired(a: Evaluation, b: Evaluation) -> list[str]:
    """Scores of a whole corpus have no items to pair."""
    rows = []
    for name, row in a.scores["scores"].items():
        other = b.scores["scores"].get(name)
        if row["of"] is None and other and row["value"] is not None and other["value"] is not None:
            rows.append(
                f"{name} (of the corpus, without interval): {row['value']:.2f} in A, {other['value']:.2f} in B."
            )
    return rows


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def print_comparison(result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(title=f"{result['benchmark']}, {result['items']} items", caption="B - A with 95 % intervals")
    for column in ("metric", "A", "B", "B - A", "95 %"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for row in result["rows"]:
        figures = ["-" if row[k] is None else f"{row[k]:.2f}" for k in ("a", "b")]
        change = "-" if row["difference"] is None else f"{row['difference']:+.2f}"
        span = "-" if row["low"] is None else f"{row['low']:+.2f} to {row['high']:+.2f}"
        table.add_row(row["metric"], *figures, change, span)
    console.print(f"A: {result['a']}\nB: {result['b']}", soft_wrap=True)
    console.print(table)
    for note in result["notes"]:
        console.print(f"- {note}", soft_wrap=True)
