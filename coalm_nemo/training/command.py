"""What `coalm train` does before there are ranks: resolve, check, explain, start."""

from __future__ import annotations

import os
from pathlib import Path

from coalm_nemo.config import RunConfig, build_config, to_yaml
from coalm_nemo.errors import UserError
from coalm_nemo.models.llama import LlamaConfig
from coalm_nemo.training.ranks import ranks_from_environment
from coalm_nemo.validate import check_run
from recipes import load_recipe


def train_command(
    recipe: str, files: list[Path], overrides: list[str], nproc: int, dry_run: bool, gpus: int = 0
) -> int:
    """Returns the exit code. Raises UserError for bad input, before anything is written."""
    run = build_config(load_recipe(recipe), files, overrides)
    for name, value in run.run.environment.items():
        os.environ.setdefault(name, value)
    if gpus:
        if not dry_run:
            raise UserError("--gpus goes with --dry-run; a run has as many GPUs as srun or torchrun start ranks")
        return explain_full_size(run, gpus)
    ranks = ranks_from_environment()
    if nproc and ranks.world_size > 1:
        raise UserError(
            f"--nproc {nproc} inside a {ranks.source} launch of {ranks.world_size} ranks; leave --nproc out"
        )
    if dry_run:
        return explain(run, nproc or ranks.world_size)
    if nproc:
        from coalm_nemo.platform import choose_platform
        from coalm_nemo.training.launch import launch

        check_inputs(run, nproc)
        platform = choose_platform(run.run.platform)
        platform.refuse(run.precision.dtype, run.optimizer.moments)
        return launch(run, nproc, platform)
    from coalm_nemo.training.worker import run_worker

    return run_worker(run)


def explain_full_size(run: RunConfig, gpus: int) -> int:
    """The resolved run, and every one of its ranks built without memory."""
    from coalm_nemo.training.full_size import build_full_size, report
    from coalm_nemo.training.worker import quiet_libraries

    quiet_libraries()
    llama = shape_of(run)
    print(to_yaml(run))
    print(f"# derived, for {gpus} ranks")
    for note in check_run(run, llama, gpus).derived:
        print(f"# {note.name}: {note.value}  ({note.why})")
    report(run, build_full_size(run, llama, gpus))
    return 0


def shape_of(run: RunConfig) -> LlamaConfig:
    """The model's shape from its directory, or by the name in `model.shape` where no model is at hand."""
    from coalm_nemo.planning.shapes import find_shape
    from coalm_nemo.training.prepare import read_llama

    if run.model.shape and not run.model.hf_path and not run.model.checkpoint:
        return find_shape(run.model.shape)[1]
    return read_llama(run)


def check_inputs(run: RunConfig, world_size: int) -> None:
    """Whatever can be refused without tokenising or loading weights."""
    from coalm_nemo.training.prepare import read_llama

    check_run(run, read_llama(run), world_size)
    for path in (run.data.train, run.data.validation):
        if path and not Path(path).exists():
            raise UserError(f"data file {path} does not exist")
    if not run.data.train:
        raise UserError("give data.train=ROWS.jsonl")


def explain(run: RunConfig, world_size: int) -> int:
    """Print the resolved run with what was derived and why."""
    from coalm_nemo.training.prepare import read_llama

    check_inputs(run, world_size)
    print(to_yaml(run))
    print(f"# derived, for {world_size} rank{'s' if world_size > 1 else ''}")
    for note in check_run(run, read_llama(run), world_size).derived:
        print(f"# {note.name}: {note.value}  ({note.why})")
    return 0
