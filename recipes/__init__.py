"""Recipes by name: each is a short function in a file of this folder that returns a RunConfig."""

from __future__ import annotations

import difflib
import importlib

from coalm_nemo.config import RunConfig
from coalm_nemo.errors import UserError

RECIPES = {
    "coalm_tiny": "coalm_tiny",
    "coalm_demo": "coalm_demo",
    "nano_base": "nano_base",
    "coalm_8b": "coalm_8b",
    "coalm_8b_lora": "coalm_8b",
    "paper_8b_lora": "coalm_8b",
    "released_8b_lora": "coalm_8b",
    "coalm_70b": "coalm_70b",
    "coalm_70b_lora": "coalm_70b",
    "paper_70b_lora": "coalm_70b",
    "released_70b": "coalm_70b",
    "coalm_405b": "coalm_405b",
    "coalm_405b_lora": "coalm_405b",
    "paper_405b_lora": "coalm_405b",
    "released_405b_lora": "coalm_405b",
}
"""Recipe -> the module of this folder that defines a function of that name."""


def load_recipe(name: str) -> RunConfig:
    """The recipe's configuration. Raises UserError for an unknown name."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(RECIPES)}"
        raise UserError(f"no recipe is called '{name}'; {hint}")
    module = importlib.import_module(f"recipes.{RECIPES[name]}")
    config = getattr(module, name)()
    assert isinstance(config, RunConfig)
    return config
