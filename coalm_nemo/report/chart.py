"""A line chart as SVG that reads on a phone, with the points beside it for the pointer's tooltip."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coalm_nemo.report.html import esc, number, swatch
from coalm_nemo.report.series import Point

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 8, 24
COLORS = 8
LOG_FROM = 30.0
"""How many times the smallest value the largest must be for a logarithmic scale."""


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    name: str
    points: Sequence[Point]
    color: int = 0
    dashed: bool = False
    dots: bool = False
    mean: Sequence[Point] = ()
    """Drawn over the points, which are faint then."""


@dataclass(frozen=True)
class Scale:
    """Where a point lies."""

    low_x: float
    high_x: float
    low_y: float
    """The exponent of ten, on a logarithmic scale."""
    high_y: float
    log: bool

    @staticmethod
    def of(points: Sequence[Point], log: bool) -> Scale:
        """`log` is done where every value is above 0 and the largest is far above the smallest."""
        ys = [y for _, y in points]
        log = log and min(ys) > 0 and max(ys) / min(ys) > LOG_FROM
        low_x, high_x = _range([x for x, _ in points], 0.0)
        return Scale(low_x, high_x, *_range([math.log10(y) for y in ys] if log else ys, 0.04, log), log)

    def at(self, point: Point) -> tuple[float, float]:
        x, y = point
        y = math.log10(y) if self.log else y
        across = (x - self.low_x) / (self.high_x - self.low_x)
        up = (y - self.low_y) / (self.high_y - self.low_y)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def ticks_y(self) -> list[float]:
        if not self.log:
            return ticks(self.low_y, self.high_y, 4)
        factors = (1.0,) if self.high_y - self.low_y > 2.5 else (1.0, 3.0)
        powers = range(math.floor(self.low_y), math.ceil(self.high_y) + 1)
        found = [f * 10.0**p for p in powers for f in factors]
        return [y for y in found if self.low_y <= math.log10(y) <= self.high_y]


def chart(
    title: str, lines: Sequence[Line], *, unit: str = "", form: Callable[[float], str] = number, log: bool = False
) -> str:
    """A figure; "" where no line has a point. A single point is a dot."""
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    scale = Scale.of([p for line in lines for p in line.points], log)
    drawn = [_grid(scale, form)] + [_draw(line, scale) for line in lines]
    last = form(lines[0].points[-1][1]) if len(lines) == 1 else ""
    unit = ", ".join(filter(None, (unit, "log scale" if scale.log else "")))
    data = {
        "x": [scale.low_x, scale.high_x],
        "lines": [{"name": n.name, "color": n.color % COLORS, "points": _rounded(n)} for n in lines],
    }
    return (
        f'<figure class="chart"><figcaption><b>{esc(title)}</b> <span class="unit">{esc(unit)}</span>'
        f'<span class="last">{esc(last)}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{esc(title)}">{"".join(drawn)}'
        f'<line class="cross" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>{_legend(lines)}{embed(data)}'
        '<div class="tip"></div></figure>'
    )


def embed(data: object) -> str:
    """JSON that no text in it can end, for the script of the page."""
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026")
    return f'<script type="application/json">{text}</script>'


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers between low and high."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [
        round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, math.floor(high / step + 1e-9) + 1)
    ]


def _range(values: Sequence[float], margin: float, signed: bool = False) -> tuple[float, float]:
    """Lowest and highest with some room; down to 0 where 0 is near."""
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        room = abs(high) * 0.1 or 1.0
        return low - room, high + room
    room = (high - low) * margin
    return (0.0 if 0 <= low < room and not signed else low - room), high + room


def _grid(scale: Scale, form: Callable[[float], str]) -> str:
    parts = []
    for y in scale.ticks_y():
        _, top = scale.at((scale.low_x, y))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{top:.1f}" y2="{top:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{top + 4:.1f}" text-anchor="end">{esc(form(y))}</text>')
    for x in ticks(scale.low_x, scale.high_x, 5):
        left = LEFT + (x - scale.low_x) / (scale.high_x - scale.low_x) * (WIDTH - LEFT - RIGHT)
        anchor = "end" if left > WIDTH - RIGHT - 14 else "middle"
        parts.append(f'<text x="{left:.1f}" y="{HEIGHT - 7}" text-anchor="{anchor}">{esc(number(x))}</text>')
    return "".join(parts)


def _draw(line: Line, scale: Scale) -> str:
    color = line.color % COLORS
    kind = f"line s{color}" + (" dashed" if line.dashed else "") + (" faint" if line.mean else "")
    drawn = _polyline(kind, [scale.at(p) for p in line.points])
    drawn += _polyline(f"line s{color}", [scale.at(p) for p in line.mean])
    if line.dots or len(line.points) == 1:
        places = (scale.at(p) for p in line.points)
        drawn += "".join(f'<circle class="f{color}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in places)
    return drawn


def _polyline(kind: str, places: Sequence[tuple[float, float]]) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline class="{kind}" points="{path}"/>' if len(places) > 1 else ""


def _legend(lines: Sequence[Line]) -> str:
    if len(lines) < 2 and not lines[0].name:
        return ""
    names = (f"<span>{swatch(line.color)}{esc(line.name)}{' (dashed)' if line.dashed else ''}</span>" for line in lines)
    return f'<div class="legend">{"".join(names)}</div>'


def _rounded(line: Line) -> list[list[float]]:
    return [[float(f"{x:.10g}"), float(f"{y:.5g}")] for x, y in line.points]
