"""What `coalm train` does before there are ranks: resolve, check, explain, start."""

from __future__ import annotations

import os
from pathlib import Path

from coalm_nemo.config import RunConfig, build_config, to_yaml
from coalm_nemo.errors import UserError
from coalm_nemo.training.dry_run import explain_full_size, usual_gpus
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
    if gpus and not dry_run:
        raise UserError("--gpus goes with --dry-run; a run has as many GPUs as srun or torchrun start ranks")
    if gpus < 0:
        raise UserError(f"--gpus is {gpus}; it must be at least 1, or 0 for the recipe's own")
    ranks = ranks_from_environment()
    if dry_run and ranks.world_size == 1 and not nproc and (gpus := gpus or usual_gpus(run, recipe)):
        return explain_full_size(run, recipe, gpus)
    if nproc and ranks.world_size > 1:
        raise UserError(
            f"--nproc {nproc} inside a {ranks.source} launch of {ranks.world_size} ranks; leave --nproc out"
        )
    if dry_run:
        return explain(run, nproc or ranks.world_size)
    if nproc:
        from coalm_nemo.platform import choose_platform
        from coalm_nemo.speed import refuse_missing
        from coalm_nemo.training.launch import launch

        check_inputs(run, nproc)
        platform = choose_platform(run.run.platform, run.run.layers)
        platform.refuse(run.precision.dtype, run.optimizer.moments)
        refuse_missing(run, platform)
        return launch(run, nproc, platform)
    from coalm_nemo.training.worker import run_worker

    return run_worker(run)


def check_inputs(run: RunConfig, world_size: int) -> None:
    """Whatever can be refused without tokenising or loading weights."""
    from coalm_nemo.training.prepare import read_llama

    check_run(run, read_llama(run), world_size)
    for path in (run.data.train, run.data.validation):
        if path and not Path(path).exists():
            raise UserError(f"data file {path} does not exist")
    if not run.data.train:
        raise UserError("give data.train=ROWS.jsonl")
    if run.lora.start_from:
        from coalm_nemo.checkpoint.peft_files import check_start

        check_start(Path(run.lora.start_from), run.lora)


def explain(run: RunConfig, world_size: int) -> int:
    """Print the resolved run with what was derived and why."""
    from coalm_nemo.training.prepare import read_llama

    check_inputs(run, world_size)
    print(to_yaml(run))
    print(f"# derived, for {world_size} rank{'s' if world_size > 1 else ''}")
    for note in check_run(run, read_llama(run), world_size).derived:
        print(f"# {note.name}: {note.value}  ({note.why})")
    return 0
