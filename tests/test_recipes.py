"""Every recipe loads, divides on the GPUs it is for, fits by the planner, and its ranks can be built."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from coalm_nemo.config import RunConfig, build_config
from coalm_nemo.planning.command import PlanRequest, layout_of, make_job, plan_command
from coalm_nemo.planning.estimate import SPARE_GB, estimate
from coalm_nemo.planning.hardware import GIB
from coalm_nemo.planning.shapes import SHAPES
from coalm_nemo.validate import check_run
from recipes import RECIPES, load_recipe
from recipes.cluster import ENVIRONMENT

GPUS = {
    "coalm_8b": 8, "coalm_8b_lora": 8, "paper_8b_lora": 8, "released_8b_lora": 8,
    "coalm_70b": 32, "coalm_70b_lora": 8, "paper_70b_lora": 8, "released_70b": 32,
    "coalm_405b": 128, "coalm_405b_lora": 32, "paper_405b_lora": 32, "released_405b_lora": 32,
}  # fmt: skip
LAPTOP = {"coalm_tiny", "coalm_demo", "nano_base"}


def test_every_recipe_is_named() -> None:
    assert set(RECIPES) == set(GPUS) | LAPTOP


@pytest.mark.parametrize("name", RECIPES)
def test_loads(name: str) -> None:
    run = load_recipe(name)
    assert isinstance(run, RunConfig)
    assert load_recipe(name) is not run


@pytest.mark.parametrize("name", GPUS)
def test_divides_and_fits(name: str) -> None:
    run, gpus = load_recipe(name), GPUS[name]
    layout = check_run(run, SHAPES[run.model.shape], gpus)
    assert run.run.environment == ENVIRONMENT
    if not run.data.packing:
        return  # a row a sequence: the planner speaks of full sequences
    found = estimate(make_job(PlanRequest(gpus), run), layout_of(run))
    assert found.spare >= SPARE_GB * GIB, f"{found.spare / GIB:.1f} GB to spare"
    assert layout.data_parallel * run.parallel.tensor * run.parallel.pipeline == gpus


def test_405b_is_worth_its_gpus() -> None:
    """Bubble under 3 %, and at least 2.5 times the best-known recipe's layout under the same model."""
    run = load_recipe("coalm_405b")
    ours = estimate(make_job(PlanRequest(128), run), layout_of(run))
    theirs = RunConfig()
    theirs.model.shape, theirs.train.seq_len_tokens, theirs.batch.global_size = "405b", 2048, 16
    theirs.parallel.tensor, theirs.parallel.pipeline, theirs.parallel.count_embedding_and_loss = 8, 16, True
    theirs.precision.gradients, theirs.optimizer.moments = "bf16", "bf16"
    other = estimate(make_job(PlanRequest(128), theirs), layout_of(theirs))
    assert ours.bubble_fraction <= 0.03
    assert ours.tokens_per_s_per_gpu >= 2.5 * other.tokens_per_s_per_gpu


def test_published_settings() -> None:
    """Tables of arXiv 2502.08820 and of the public recipes."""
    paper, released = load_recipe("paper_8b_lora"), load_recipe("released_8b_lora")
    assert (paper.lora.rank, paper.lora.alpha, len(paper.lora.targets)) == (16, 32.0, 7)
    assert (paper.optimizer.lr, paper.batch.global_size, paper.train.epochs) == (1e-4, 8, 3)
    assert (released.lora.rank, released.lora.alpha, released.lora.targets) == (8, 8.0, ["q", "v"])
    assert (released.optimizer.lr, released.schedule.warmup_steps, released.batch.global_size) == (4e-5, 24, 128)
    full = load_recipe("released_70b")
    assert (full.lora.rank, full.optimizer.lr, full.batch.global_size, full.optimizer.clip_grad) == (0, 4e-5, 56, 10.0)


def test_first_and_last_rank_of_every_recipe_can_be_built() -> None:
    script = (
        "import json, sys\n"
        "from coalm_nemo.planning.shapes import SHAPES\n"
        "from coalm_nemo.training.full_size import build_full_size\n"
        "from recipes import load_recipe\n"
        "for name, gpus in json.loads(sys.argv[1]).items():\n"
        "    run = load_recipe(name)\n"
        "    full = build_full_size(run, SHAPES[run.model.shape], gpus, [0, gpus - 1])\n"
        "    print(name, [s.parameters for s in full.shares])\n"
    )
    done = subprocess.run([sys.executable, "-c", script, json.dumps(GPUS)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == len(GPUS)


@pytest.mark.parametrize("gpus", [256, 512, 1024])
def test_a_larger_cluster_gets_its_layout_from_the_planner(gpus: int, tmp_path: Path) -> None:
    """`coalm plan --recipe coalm_405b --gpus N --write FILE`, then `coalm train --recipe coalm_405b --config FILE`."""
    run = load_recipe("coalm_405b")
    run.batch.global_size = gpus
    plan_command(PlanRequest(gpus), run, 1, True, None, layout_of(run), tmp_path / "layout.yaml")
    larger = build_config(load_recipe("coalm_405b"), [tmp_path / "layout.yaml"], [])
    layout = check_run(larger, SHAPES["405b"], gpus)
    assert layout.world_size == gpus
    assert estimate(make_job(PlanRequest(gpus), larger), layout_of(larger)).spare >= SPARE_GB * GIB
