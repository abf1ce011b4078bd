"""`coalm fp8-check`: resolve the run, start the ranks, say the verdict."""

from __future__ import annotations

import os
from pathlib import Path

from coalm_nemo.config import build_config
from coalm_nemo.errors import UserError
from coalm_nemo.fp8_check.variants import make_variants
from coalm_nemo.training.ranks import ranks_from_environment
from recipes import load_recipe


def fp8_check_command(
    recipe: str, files: list[Path], overrides: list[str], *, precision: str, baseline: str, steps: int, seeds: int,
    nproc: int, control: bool, tolerance: float, out: Path | None,
) -> int:  # fmt: skip
    """Returns the exit code: 0 passed, 1 not passed. Raises UserError for bad input, before anything is trained."""
    words = [*overrides, *([f"precision.dtype={precision}"] if precision else [])]
    run = build_config(load_recipe(recipe), files, words)
    for name, value in run.run.environment.items():
        os.environ.setdefault(name, value)
    if not 0 < tolerance < 1:
        raise UserError(f"--tolerance {tolerance}: give a part of the loss, such as 0.01")
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: at least one is needed")
    if seeds > 1 and not run.data.shuffle and not run.lora.dropout:
        raise UserError(
            f"--seeds {seeds} with data.shuffle=false would be the same run {seeds} times; use data.shuffle=true"
        )
    variants = make_variants(run, steps, baseline, control and seeds == 1)  # several seeds show the noise themselves
    ranks = ranks_from_environment()
    if nproc and ranks.world_size > 1:
        raise UserError(
            f"--nproc {nproc} inside a {ranks.source} launch of {ranks.world_size} ranks; leave --nproc out"
        )
    from coalm_nemo.training.worker import quiet_libraries

    quiet_libraries()  # before megatron-core is imported
    from coalm_nemo.fp8_check.worker import check_worker
    from coalm_nemo.platform import choose_platform
    from coalm_nemo.training.command import check_inputs

    worker = check_worker(variants, out or Path(run.run.dir) / "fp8_check", tolerance, seeds)
    if not nproc:
        return worker(variants.fp8)
    from coalm_nemo.training.launch import launch

    for variant in variants.named().values():
        check_inputs(variant, nproc)
    platform = choose_platform(run.run.platform, run.run.layers)
    platform.refuse(run.precision.dtype, run.optimizer.moments)
    return launch(variants.fp8, nproc, platform, worker)
