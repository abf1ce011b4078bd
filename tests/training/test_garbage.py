"""Garbage is collected at the chosen steps and at no other time."""

from __future__ import annotations

import gc
import weakref

import pytest

from coalm_nemo.training.garbage import CollectTogether


class Ring:
    """Refers to itself, so only the collector frees it."""

    def __init__(self) -> None:
        self.me = self


def test_only_at_its_steps() -> None:
    with CollectTogether(3) as garbage:
        assert not gc.isenabled()
        ring = weakref.ref(Ring())
        many = [Ring() for _ in range(5000)]  # more than would start the collector
        del many
        for step in (7, 8):
            garbage.after_step(step)
            assert ring() is not None
        garbage.after_step(9)
        assert ring() is None
    assert gc.isenabled() and not gc.get_freeze_count()


def test_it_is_given_back_after_an_error() -> None:
    with pytest.raises(ValueError), CollectTogether(3):
        raise ValueError
    assert gc.isenabled()


def test_zero_leaves_python_alone() -> None:
    with CollectTogether(0) as garbage:
        assert gc.isenabled()
        garbage.after_step(0)
