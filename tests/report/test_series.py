"""Few points that look like many."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from coalm_nemo.report.chart import ticks
from coalm_nemo.report.html import duration, number, size
from coalm_nemo.report.series import Series, thin

FINITE = st.floats(-1e6, 1e6, allow_nan=False)


@given(st.lists(FINITE, min_size=1, max_size=400), st.integers(1, 20))
def test_the_extremes_and_the_ends_stay(values: list[float], buckets: int) -> None:
    steps = list(range(len(values)))
    points = thin(steps, values, buckets)
    assert len(points) <= 2 * buckets + 2
    assert [p[0] for p in points] == sorted({p[0] for p in points})
    assert all(values[int(x)] == y for x, y in points)
    ys = [y for _, y in points]
    assert (min(ys), max(ys)) == (min(values), max(values))
    assert (points[0][0], points[-1][0]) == (0, len(values) - 1)


@given(st.lists(st.sampled_from([1.0, math.nan, math.inf, -math.inf]), max_size=50))
def test_what_is_not_finite_is_not_drawn(values: list[float]) -> None:
    points = thin(list(range(len(values))), values, 3)
    assert all(y == 1.0 for _, y in points)
    assert bool(points) == (1.0 in values)


@given(st.lists(st.integers(1, 30), max_size=60))
def test_a_step_written_again_replaces_what_came_after(steps: list[int]) -> None:
    series = Series()
    for i, step in enumerate(steps):
        series.add(step, i)
    assert list(series.steps) == sorted(set(series.steps))
    if steps:
        assert (series.steps[-1], series.last) == (steps[-1], len(steps) - 1)


def test_the_mean_lies_within_the_noise() -> None:
    series = Series()
    for step in range(1000):
        series.add(step, 5.0 + (-1) ** step)
    assert all(abs(y - 5.0) < 0.2 for _, y in series.mean())
    assert len(series.mean()) == 60
    assert {y for _, y in series.points()} == {4.0, 6.0}


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_few_and_inside(low: float, span: float) -> None:
    high = low + max(span, abs(low) * 1e-6)
    found = ticks(low, high, 4)
    slack = (high - low) * 1e-6
    assert all(low - slack <= t <= high + slack for t in found)
    assert found == sorted(found)
    assert 1 <= len(found) <= 9


@given(st.one_of(st.floats(), st.none()))
def test_numbers_stay_short(value: float | None) -> None:
    assert len(number(value)) <= 10 or (value is not None and abs(value) >= 1e15)


def test_words_for_amounts() -> None:
    assert [number(x) for x in (0.0, 12345.0, 2.5e6, 0.000012, 0.5, 950.0, None)] == [
        "0", "12.35k", "2.5M", "1.2e-5", "0.5", "950", "-",
    ]  # fmt: skip
    assert [duration(s) for s in (45, 720, 12_000, 190_000)] == ["45 s", "12 min", "3 h 20 min", "2 d 4 h"]
    assert [size(n) for n in (1024, 3 << 20, 60 << 30, None)] == ["1 KiB", "3 MiB", "60 GiB", "-"]
