"""The table of recipes in docs/recipes.md, from the recipes and the planner.

python -m recipes.table --write   # after a change to either; a test holds the file against them
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from coalm_nemo.config import RunConfig
from coalm_nemo.planning.adapt import expected
from coalm_nemo.planning.estimate import Estimate
from coalm_nemo.planning.hardware import GIB
from coalm_nemo.planning.shapes import SHAPES
from recipes import RECIPES, Recipe, load_recipe

PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
BEGIN, END = "<!-- recipes: begin -->\n", "<!-- recipes: end -->\n"
HEADINGS = (
    "recipe", "H100", "layout", "precision", "trains", "batch", "tokens", "GiB of 79.1", "tokens/s/GPU", "GPU-hours an epoch",
    "settings from",
)  # fmt: skip
LEFT = ("recipe", "layout", "precision", "trains", "settings from")


def main(words: list[str]) -> None:
    """Print the table, or with --write put it into the page."""
    if "--write" not in words:
        print(table())
        return
    aside = PAGE.with_name(PAGE.name + ".partial")
    aside.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    os.replace(aside, PAGE)


def with_table(page: str) -> str:
    """The page with today's table between its markers."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


def table() -> str:
    """Markdown."""
    rule = "|".join("---" if name in LEFT else "---:" for name in HEADINGS)
    rows = [" | ".join(cells(name, recipe, load_recipe(name))) for name, recipe in RECIPES.items()]
    return (
        "\n".join(f"| {row} |" if row is not rule else f"|{row}|" for row in [" | ".join(HEADINGS), rule, *rows]) + "\n"
    )


def cells(name: str, recipe: Recipe, run: RunConfig) -> Iterator[str]:
    """A recipe's cells. What the planner cannot say (CPU recipes) stays empty."""
    e = expected(run, SHAPES[run.model.shape], recipe.gpus[-1]) if recipe.gpus else None
    yield f"`{name}`"
    yield _numbers(recipe.gpus) or "CPU"
    yield layout(run)
    yield precision(run)
    yield f"LoRA r{run.lora.rank} a{run.lora.alpha:g} on {_targets(run)}" if run.lora.rank else "all"
    yield f"{run.batch.global_size} {'packs' if run.data.packing else 'rows'}"
    yield f"{run.train.seq_len_tokens}"
    yield f"{e.memory.worst.total / GIB:.1f}" if e else ""
    yield f"{e.tokens_per_s_per_gpu:,.0f}" if e else ""
    yield _hours(e) if e else ""
    yield recipe.source


def _numbers(gpus: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, gpus[:-1]))} or {gpus[-1]}" if len(gpus) > 1 else "".join(map(str, gpus))


def layout(run: RunConfig) -> str:
    """`TP8 PP16 VP4` and what else differs from a single GPU."""
    parallel = run.parallel
    sizes = {"TP": parallel.tensor, "PP": parallel.pipeline, "VP": parallel.virtual_pipeline, "CP": parallel.context}
    words = [f"{name}{size}" for name, size in sizes.items() if size > 1] or ["whole"]
    return " ".join(words) + (", ends counted" if parallel.count_embedding_and_loss else "")


def precision(run: RunConfig) -> str:
    """Arithmetic, and what weights, gradients and moments are kept in where it is not the default."""
    kept = [name for name, on in (("parameters", run.precision.fp8_params),) if on]
    words = [run.precision.dtype.replace("fp8_", "FP8 ").replace("bf16", "BF16"), *(f"FP8 {k}" for k in kept)]
    words += ["NF4 base"] if run.lora.base == "nf4" else []
    words += ["BF16 gradients"] if run.precision.gradients == "bf16" else []
    words += ["BF16 moments"] if run.optimizer.moments == "bf16" else []
    return ", ".join(words)


def _targets(run: RunConfig) -> str:
    return "all linear layers" if len(run.lora.targets) == 7 else ", ".join(run.lora.targets)


def _hours(e: Estimate) -> str:
    return f"{e.epoch_gpu_hours:,.0f}" if e.job.packed else f"at most {e.epoch_gpu_hours:,.0f}"


if __name__ == "__main__":
    main(sys.argv[1:])
