"""Recipes by name: each is a short function in a file of this folder that returns a RunConfig."""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass

from coalm_nemo.config import RunConfig
from coalm_nemo.errors import UserError

OURS = (
    "layout: this project's planner; AdamW, decay, warm-up, schedule: the released 70B's (public Oumi recipe, Feb 2025)"
)
OURS_LORA = "LoRA rank, alpha, layers, learning rate and warm-up: arXiv 2502.08820; layout: this project's planner"
PAPER = "arXiv 2502.08820, v3: LoRA r16 a32 on all linear layers, lr 1e-4, warm-up 0.1, batch 8"
RELEASED = "the public Oumi recipe of February 2025"
LAPTOP = "chosen on two CPU cores"


@dataclass(frozen=True)
class Recipe:
    """Where a recipe is, what it runs on, and where its settings come from."""

    module: str
    """Of this folder; it defines a function of the recipe's name."""
    gpus: tuple[int, ...]
    """Numbers of H100 it is laid out for, the usual one last; none for CPU recipes. Others: coalm_nemo/planning/adapt.py"""
    source: str


RECIPES = {
    "coalm_tiny": Recipe("coalm_tiny", (), LAPTOP),
    "coalm_demo": Recipe("coalm_demo", (), LAPTOP),
    "nano_base": Recipe("nano_base", (), LAPTOP),
    "coalm_8b": Recipe("coalm_8b", (8,), OURS),
    "coalm_8b_lora": Recipe("coalm_8b", (1, 2, 4, 8), OURS_LORA),
    "paper_8b_lora": Recipe("coalm_8b", (8,), f"{PAPER}, 3 epochs"),
    "released_8b_lora": Recipe("coalm_8b", (8,), f"{RELEASED}: LoRA r8 a8 on q and v, lr 4e-5, batch 128"),
    "coalm_70b": Recipe("coalm_70b", (32,), OURS),
    "coalm_70b_lora": Recipe("coalm_70b", (8,), OURS_LORA),
    "paper_70b_lora": Recipe("coalm_70b", (8,), f"{PAPER}, 3 epochs"),
    "released_70b": Recipe(
        "coalm_70b", (32,), f"{RELEASED}: full fine-tuning, lr 4e-5, batch 56 (theirs ran on 8 GPUs)"
    ),
    "coalm_405b": Recipe("coalm_405b", (128,), f"{OURS}, half its learning rate"),
    "coalm_405b_lora": Recipe("coalm_405b", (32,), OURS_LORA),
    "coalm_405b_qlora": Recipe("coalm_405b", (8,), OURS_LORA),
    "paper_405b_lora": Recipe("coalm_405b", (32,), f"{PAPER}, 1 epoch; its base was NF4, this one's is BF16"),
    "released_405b_lora": Recipe(
        "coalm_405b", (32,), f"{RELEASED}: LoRA r16 a32, lr 1e-4, batch 16; BF16 base for its NF4"
    ),
}


def find_recipe(name: str) -> Recipe:
    """What is known of a recipe. Raises UserError for an unknown name."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(RECIPES)}"
        raise UserError(f"no recipe is called '{name}'; {hint}")
    return RECIPES[name]


def load_recipe(name: str) -> RunConfig:
    """The recipe's configuration. Raises UserError for an unknown name."""
    module = importlib.import_module(f"recipes.{find_recipe(name).module}")
    config = getattr(module, name)()
    assert isinstance(config, RunConfig)
    return config
