"""Scores of the evaluations, beside one another and beside the published ones with what is wrong with those."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from coalm_nemo.evaluation.published import Published, load_published
from coalm_nemo.report.html import details, esc, section, table
from coalm_nemo.report.read_scores import Evaluated, Score, benchmarks_of


def scores_section(found: Sequence[Evaluated]) -> str:
    """A table a benchmark: ours first, then the published rows."""
    published = load_published()
    return section(
        "Scores",
        "".join(
            _benchmark(name, [e for e in found if e.benchmark == name], published) for name in benchmarks_of(found)
        ),
    )


def _benchmark(name: str, ours: Sequence[Evaluated], published: Published) -> str:
    named = published.metrics.get(name, {})
    headline = list(dict.fromkeys(m for e in ours for m in e.headline))
    metrics = list(dict.fromkeys([*named, *headline])) if named else headline
    rows = [
        [f"<b>{esc(e.label)}</b><small>{esc(e.model)}{_items(e)}</small>", *(_cell(e.scores.get(m)) for m in metrics)]
        for e in ours
    ]
    if len(ours) == 2:
        first, second = ours
        other = "<small>on different items</small>" if first.items != second.items else ""
        gains = (_gain(first.scores.get(m), second.scores.get(m)) for m in metrics)
        rows.append([f"<i>{esc(second.label)} minus {esc(first.label)}</i>{other}", *gains])
    notes: list[str] = []
    for model, tables in published.models.items() if named else ():
        if row := tables.get(name):
            mark = _marks(published.notes_on(name, model), notes)
            rows.append(
                [f"{esc(model)}{mark}<small>published</small>", *(f"{row[m]:.2f}" if m in row else "" for m in metrics)]
            )
    head = ["model", *(named.get(m, m.replace("_", " ")) for m in metrics)]
    told = "".join(f"<li>{esc(n)}</li>" for n in notes)
    legend = (
        f'<p class="note">Published: {esc(published.paper)}. The numbers say what to know before believing a row.</p>'
        if notes
        else ""
    )
    return (
        f"<h3>{esc(name)}</h3>{table(head, rows, numbers=range(1, len(head)), wide=len(metrics) > 3)}{legend}"
        + (f'<ol class="notes">{told}</ol>' if told else "")
        + "".join(_more(e, len(ours) > 1) for e in ours)
    )


def _items(e: Evaluated) -> str:
    return f", {esc(e.items)} items" if e.items else ""


def _cell(score: Score | None) -> str:
    if score is None or score.value is None:
        return ""
    spread = (
        f"<small>{score.low:.1f} to {score.high:.1f}</small>"
        if score.low is not None and score.high is not None
        else ""
    )
    return f"{score.value:.2f}{spread}"


def _gain(a: Score | None, b: Score | None) -> str:
    if not a or not b or a.value is None or b.value is None:
        return ""
    gain = b.value - a.value
    return f'<span class="{"good" if gain > 0 else "bad" if gain < 0 else "soft"}">{gain:+.2f}</span>'


def _marks(own: Sequence[str], notes: list[str]) -> str:
    for text in own:
        if text not in notes:
            notes.append(text)
    return f"<sup>{esc(','.join(str(notes.index(t) + 1) for t in own))}</sup>" if own else ""


def _more(e: Evaluated, several: bool) -> str:
    """Every metric, the faults and the protocol, folded."""
    rows = [[esc(name), _cell(score)] for name, score in e.scores.items()]
    faults = [[esc(k), esc(v)] for k, v in sorted(e.faults.items(), key=_count, reverse=True)]
    protocol = [[esc(k), esc(v)] for k, v in e.protocol.items()]
    body = (
        table(["metric", "percent"], rows, numbers=(1,))
        + table(["fault", "items"], faults, numbers=(1,))
        + table(["protocol", ""], protocol)
    )
    return details(f"All metrics, faults and protocol{' of ' + e.label if several else ''}", body)


def _count(item: tuple[str, object]) -> float:
    value = item[1]
    if isinstance(value, Mapping):
        value = value.get("count", 0)
    return float(value) if isinstance(value, int | float) else 0.0
