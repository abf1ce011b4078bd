"""Small pieces of HTML. Whatever came from data, a model, a path or a configuration goes through `esc`."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from datetime import datetime


def esc(text: object) -> str:
    """Text as text, inside elements and quoted attributes."""
    return html.escape(str(text), quote=True)


def section(title: str, body: str, note: str = "") -> str:
    """A titled part of the page; nothing where there is nothing to show."""
    if not body:
        return ""
    told = f'<p class="note">{esc(note)}</p>' if note else ""
    return f"<section><h2>{esc(title)}</h2>{told}{body}</section>\n"


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Iterable[int] = (), wide: bool = False
) -> str:
    """`rows` hold HTML. Columns in `numbers` are set to the right; a wide table scrolls by itself."""
    right = set(numbers)

    def cells(row: Sequence[str], tag: str) -> str:
        marks = (' class="n"' if i in right else "" for i in range(len(row)))
        return "".join(f"<{tag}{mark}>{cell}</{tag}>" for mark, cell in zip(marks, row, strict=True))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    if not body:
        return ""
    kind = "scroll wide" if wide else "scroll"
    top = cells([esc(h) for h in head], "th")
    return f'<div class="{kind}"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def details(summary: str, body: str) -> str:
    """Folded away. `body` is HTML."""
    return f"<details><summary>{esc(summary)}</summary>{body}</details>" if body else ""


def swatch(color: int) -> str:
    """The colour of a line, as a dot."""
    return f'<i class="dot c{color % 8}"></i>'


def number(value: float | None) -> str:
    """Four figures, with k, M, G; small ones with an exponent: `12.3k`, `0.0312`, `3e-06`."""
    if value is None or value != value:
        return "-"
    size = abs(value)
    if size == float("inf"):
        return "∞" if value > 0 else "-∞"
    for unit, mark in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / (1e3 if mark == 'k' else unit):.4g}{mark}"
    if size and size < 1e-3:
        mantissa, exponent = f"{value:.3g}".split("e") if "e" in f"{value:.3g}" else (f"{value * 1e4:.3g}", "-4")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.4g}"


def size(bytes_: float | None) -> str:
    """GiB, MiB or KiB."""
    if bytes_ is None:
        return "-"
    for unit, mark in ((2**30, "GiB"), (2**20, "MiB")):
        if abs(bytes_) >= unit:
            return f"{bytes_ / unit:.3g} {mark}"
    return f"{bytes_ / 1024:.3g} KiB"


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    total = max(0, round(seconds))
    if total < 120:
        return f"{total} s"
    minutes, hours, days = total // 60 % 60, total // 3600 % 24, total // 86400
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def moment(seconds: float) -> str:
    """`2026-01-31 14:05:09`, local time."""
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S") if seconds > 0 else "-"
