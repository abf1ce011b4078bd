"""What the tests that need NeMo share."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from coalm_nemo.config import RunConfig
from recipes import RECIPES, load_recipe

HAVE_NEMO = importlib.util.find_spec("nemo") is not None and importlib.util.find_spec("nemo_run") is not None
NEEDS_NEMO = [
    pytest.mark.nemo,
    pytest.mark.skipif(not HAVE_NEMO, reason="needs nemo-toolkit 2.7, in an environment of its own: make test-nemo"),
]
CLUSTER_RECIPES = [n for n, recipe in RECIPES.items() if recipe.gpus and load_recipe(n).lora.base == "as_trained"]


def ready(name: str, steps: int = 120) -> RunConfig:
    """A recipe with everything that a NeMo recipe has to be told."""
    run = load_recipe(name)
    run.model.hf_path, run.data.train, run.train.steps = "/models/Llama", "/sets/coalm_it", steps
    return run


def make(run: RunConfig, gpus: int) -> Any:
    """The Partial on nodes of 8."""
    from recipes.nemo.recipe import nemo_recipe

    return nemo_recipe(run, -(-gpus // 8), min(gpus, 8))
