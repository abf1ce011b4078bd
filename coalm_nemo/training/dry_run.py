"""`coalm train --dry-run` at full size: the recipe's layout or the planner's, what to expect of it, and every rank built."""

from __future__ import annotations

from coalm_nemo.config import RunConfig, to_yaml
from coalm_nemo.models.llama import LlamaConfig
from coalm_nemo.planning.adapt import adapt, expected, expected_lines
from coalm_nemo.training.full_size import build_full_size
from coalm_nemo.training.full_size_report import report
from coalm_nemo.validate import check_run
from recipes import find_recipe, load_recipe


def usual_gpus(run: RunConfig, recipe: str) -> int:
    """GPUs to dry-run on where none are named: the recipe's, if only the model's shape is at hand; else 0."""
    only_shape = run.model.shape and not run.model.hf_path and not run.model.checkpoint
    return find_recipe(recipe).gpus[-1] if only_shape and find_recipe(recipe).gpus else 0


def explain_full_size(run: RunConfig, recipe: str, gpus: int) -> int:
    """The resolved run, where it comes from, what to expect, and every one of its ranks built without memory."""
    from coalm_nemo.training.worker import quiet_libraries

    quiet_libraries()
    llama, known = shape_of(run), find_recipe(recipe)
    run, notes = adapt(run, load_recipe(recipe), known.gpus, gpus)
    derived = check_run(run, llama, gpus).derived
    print(to_yaml(run))
    print(f"# derived, for {gpus} ranks")
    print("\n".join(f"# {note}" for note in notes + [f"{d.name}: {d.value}  ({d.why})" for d in derived]))
    print(f"# settings: {known.source}")
    if plan := expected(run, llama, gpus):
        print("\n".join(f"# {line}" for line in expected_lines(plan)))
    report(run, llama, build_full_size(run, llama, gpus))
    return 0


def shape_of(run: RunConfig) -> LlamaConfig:
    """The model's shape from its directory, or by the name in `model.shape` where no model is at hand."""
    from coalm_nemo.planning.shapes import find_shape
    from coalm_nemo.training.prepare import read_llama

    if run.model.shape and not run.model.hf_path and not run.model.checkpoint:
        return find_shape(run.model.shape)[1]
    return read_llama(run)
