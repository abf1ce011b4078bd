"""The schedule: order, bubble and what is in flight, against each other and against the papers' formulas."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coalm_nemo.planning.job import Layout
from coalm_nemo.planning.pipeline import (
    bubble_fraction,
    chunk_bf16_layers,
    chunk_layers,
    chunk_passes_in_flight,
    layers_in_flight,
    passes_in_flight,
    stage_order,
    timeline,
)
from coalm_nemo.planning.shapes import SHAPES

SPLITS = st.tuples(st.integers(2, 6), st.integers(1, 4), st.integers(1, 4))
"""Pipeline size, chunks a stage, rounds of micro-batches."""


def test_bubble_at_its_limits() -> None:
    assert bubble_fraction(1, 1, 7) == 0
    assert bubble_fraction(16, 1, 16) == 15 / 31
    assert bubble_fraction(16, 8, 16) == pytest.approx(0.105, abs=0.001)
    assert bubble_fraction(8, 1, 10**9) < 1e-8
    assert bubble_fraction(8, 4, 64) == bubble_fraction(8, 64, 4)


@settings(max_examples=40, deadline=None)
@given(SPLITS)
def test_the_schedule_played_through_has_the_bubble_of_the_formula(split: tuple[int, int, int]) -> None:
    p, v, rounds = split
    layout, m = Layout(pipeline=p, virtual_pipeline=v), rounds * p
    passes = timeline(layout, m, 1.0, 2.0)
    assert len(passes) == 2 * p * v * m
    step = max(one.end for one in passes)
    assert 1 - 3.0 * v * m / step == pytest.approx(bubble_fraction(p, v, m))


@settings(max_examples=40, deadline=None)
@given(SPLITS)
def test_what_is_in_flight_is_what_the_schedule_holds(split: tuple[int, int, int]) -> None:
    p, v, rounds = split
    layout, m = Layout(pipeline=p, virtual_pipeline=v), rounds * p
    for stage in range(p):
        held = most = 0
        for _, _, forward in stage_order(layout, m, stage):
            held += 1 if forward else -1
            most = max(most, held)
        assert held == 0
        assert most == passes_in_flight(layout, m, stage)


@pytest.mark.parametrize(
    ("pipeline", "virtual", "counted"), [(8, 8, True), (9, 7, False), (16, 1, True), (1, 1, False)]
)
def test_every_layer_is_in_one_chunk(pipeline: int, virtual: int, counted: bool) -> None:
    layout = Layout(pipeline=pipeline, virtual_pipeline=virtual, count_embedding_and_loss=counted)
    assert sum(sum(chunk_layers(SHAPES["405b"], layout, r)) for r in range(pipeline)) == 126


def test_layers_in_flight_of_the_record_405b_layout_by_hand() -> None:
    """Rank 0: 15 passes of its first chunk (one layer), 8 of each other (two); rank 1: 13 and 8, all of two layers."""
    layout = Layout(tensor=8, pipeline=8, virtual_pipeline=8, context=2, count_embedding_and_loss=True)
    assert held(layout, 288, 0) == 15 + 7 * 8 * 2
    assert held(layout, 288, 1) == (13 + 7 * 8) * 2
    assert held(Layout(pipeline=16, count_embedding_and_loss=True), 16, 1) == 15 * 8


def held(layout: Layout, micro_batches: int, stage: int) -> int:
    layers = chunk_layers(SHAPES["405b"], layout, stage)
    return layers_in_flight(layers, chunk_passes_in_flight(layout, micro_batches, stage))


@pytest.mark.parametrize(
    ("pipeline", "virtual", "counted"), [(1, 1, False), (9, 7, False), (8, 16, True), (16, 1, True)]
)
@pytest.mark.parametrize(("start", "end"), [(0, 0), (1, 1), (3, 2), (126, 0), (100, 100)])
def test_bf16_ends_are_found_once_each(pipeline: int, virtual: int, counted: bool, start: int, end: int) -> None:
    """Over all stages as many as were asked for, none twice where the ends meet, and the first on the first stage."""
    model = SHAPES["405b"]
    layout = Layout(
        pipeline=pipeline, virtual_pipeline=virtual, count_embedding_and_loss=counted,
        bf16_layers_at_start=start, bf16_layers_at_end=end,
    )  # fmt: skip
    found = [chunk_bf16_layers(model, layout, r) for r in range(pipeline)]
    assert sum(map(sum, found)) == min(start + end, 126)
    for stage, ends in enumerate(found):
        assert all(0 <= n <= layers for n, layers in zip(ends, chunk_layers(model, layout, stage), strict=True))
    if 0 < start <= chunk_layers(model, layout, 0)[0]:
        assert found[0][0] >= start
    if 0 < end <= chunk_layers(model, layout, pipeline - 1)[-1]:
        assert found[-1][-1] >= end
