"""The H100 recipes in NeMo's form: `nemo_run.Partial`s of `llm.finetune`, made from the same RunConfig.

Python:  from recipes.nemo import coalm_8b; recipe = coalm_8b(hf="Llama-3.1-8B-Instruct", data="sets/coalm_it")
Shell:   nemo llm finetune --factory "recipes.nemo.coalm_8b(hf='Llama-3.1-8B-Instruct', data='sets/coalm_it')"

docs/nemo.md tells how; nothing here imports NeMo before a recipe is asked for.
"""

# No `from __future__ import annotations` here: nemo_run's command reads the arguments' types, not their names.

from collections.abc import Callable
from typing import Any

from recipes import RECIPES, load_recipe


def _named(name: str) -> Callable[..., Any]:
    def recipe(
        hf: str = "",
        data: str = "",
        base: str = "",
        dir: str = "",
        steps: int = 0,
        nodes: int = 0,
        gpus_per_node: int = 8,
    ) -> Any:
        from recipes.nemo.recipe import nemo_recipe

        run = load_recipe(name)
        run.model.hf_path, run.data.train, run.model.checkpoint = hf, data, base
        run.train.steps = steps
        run.run.dir = dir or run.run.dir
        gpus = RECIPES[name].gpus[-1]
        return nemo_recipe(run, nodes or -(-gpus // gpus_per_node), gpus_per_node)

    recipe.__name__ = recipe.__qualname__ = name
    recipe.__doc__ = f"""`{name}` as a Partial of `llm.finetune`.

    hf: Hugging Face directory of the model. data: a set of `coalm data build`, or rows. base: NeMo checkpoint of the
    model; where it is not given, the one that `nemo_import` makes. dir: the run's directory. steps: 0 counts the set's
    packs. nodes: 0 takes the recipe's own number. Raises UserError for what cannot be had.
    """
    return recipe


coalm_8b = _named("coalm_8b")
coalm_8b_lora = _named("coalm_8b_lora")
paper_8b_lora = _named("paper_8b_lora")
released_8b_lora = _named("released_8b_lora")
coalm_70b = _named("coalm_70b")
coalm_70b_lora = _named("coalm_70b_lora")
paper_70b_lora = _named("paper_70b_lora")
released_70b = _named("released_70b")
coalm_405b = _named("coalm_405b")
coalm_405b_lora = _named("coalm_405b_lora")
paper_405b_lora = _named("paper_405b_lora")
released_405b_lora = _named("released_405b_lora")
