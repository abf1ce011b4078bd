"""Every recipe loads, divides on the GPUs it is for, fits by the planner, and its ranks can be built."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from coalm_nemo.config import RunConfig, build_config
from coalm_nemo.errors import UserError
from coalm_nemo.planning.adapt import expected
from coalm_nemo.planning.command import PlanRequest, layout_of, make_job, plan_command
from coalm_nemo.planning.estimate import SPARE_GB, estimate
from coalm_nemo.planning.hardware import GIB
from coalm_nemo.planning.shapes import SHAPES
from coalm_nemo.validate import check_run
from recipes import RECIPES, load_recipe
from recipes.cluster import ENVIRONMENT
from recipes.table import PAGE, table, with_table

GPUS = {name: recipe.gpus[-1] for name, recipe in RECIPES.items() if recipe.gpus}
LAPTOP = {"coalm_tiny": 1, "coalm_demo": 4, "nano_base": 1}
NANO = Path("coalm_nemo/demo/nano_base").absolute()


def test_every_recipe_is_named() -> None:
    assert set(RECIPES) == set(GPUS) | set(LAPTOP)
    wanted = {
        "coalm_8b": 8,
        "coalm_8b_lora": 8,
        "coalm_70b": 32,
        "coalm_70b_lora": 8,
        "coalm_405b": 128,
        "coalm_405b_lora": 32,
    }
    assert {name: GPUS[name] for name in wanted} == wanted
    for shape in ("8b", "70b", "405b"):
        assert any(name.startswith(f"paper_{shape}") for name in RECIPES)
        assert any(name.startswith(f"released_{shape}") for name in RECIPES)


def test_the_table_in_the_docs_is_todays() -> None:
    """After a change: python -m recipes.table --write"""
    assert with_table(PAGE.read_text(encoding="utf-8")) == PAGE.read_text(encoding="utf-8")


def test_other_docs_speak_of_the_same_recipes() -> None:
    """Names in backquotes that look like a recipe's are recipes; all are in the table."""
    root = PAGE.parent.parent
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md")), root / "slurm" / "README.md"]
    for page in pages:
        named = set(re.findall(r"`((?:coalm|paper|released)_\d+b(?:_lora)?)`", page.read_text(encoding="utf-8")))
        assert named <= set(RECIPES), page
    assert all(f"| `{name}` |" in table() for name in RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_its_source_and_what_it_is_are_told(name: str) -> None:
    recipe = RECIPES[name]
    function = getattr(importlib.import_module(f"recipes.{recipe.module}"), name)
    assert function.__doc__
    assert recipe.source


def test_eight_billion_adapters_on_one_to_eight_gpus() -> None:
    run = load_recipe("coalm_8b_lora")
    for gpus in RECIPES["coalm_8b_lora"].gpus:
        assert check_run(run, SHAPES["8b"], gpus).world_size == gpus
        e = expected(run, SHAPES["8b"], gpus)
        assert e and e.fits
    with pytest.raises(UserError, match="does not divide"):
        check_run(run, SHAPES["8b"], 3)


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
    found = expected(run, SHAPES[run.model.shape], gpus)
    assert found and found.spare >= SPARE_GB * GIB, found and f"{found.spare / GIB:.1f} GB to spare"
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


def dry_run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "coalm_nemo.cli", "train", *words, "--dry-run"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("name", LAPTOP)
def test_cpu_recipes_dry_run(name: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "one row"}\n')
    words = [f"model.hf_path={NANO}", f"data.train={tmp_path / 'rows.jsonl'}", "train.seq_len_tokens=512"]
    done = dry_run("--recipe", name, "--nproc", str(LAPTOP[name]), *words)
    assert done.returncode == 0, done.stderr
    assert f"# derived, for {LAPTOP[name]} rank" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in GPUS if not name.startswith(("paper", "released"))])
def test_gpu_recipes_dry_run_at_full_size(name: str) -> None:
    """On its own GPUs without further words: source, expectation, every rank, and the planner's bytes on each stage."""
    done = dry_run("--recipe", name)
    assert done.returncode == 0, done.stderr[-2000:]
    out = done.stdout
    assert f"# derived, for {GPUS[name]} ranks" in out
    assert f"# settings: {RECIPES[name].source}" in out
    assert "# expected speed:" in out
    assert "# expected memory, GiB, on the fullest stage" in out
    assert f"{GPUS[name]} of {GPUS[name]} ranks built" in out
    offs = [float(line.split()[-1].rstrip("%")) for line in out.splitlines() if re.fullmatch(r" +\d+ .*%", line)]
    assert len(offs) == load_recipe(name).parallel.pipeline
    assert max(offs) < 0.5
    kept = out[: out.index("# derived")]
    (again,) = [yaml_of(load_recipe(name))]
    assert kept.strip() == again.strip()


def yaml_of(run: RunConfig) -> str:
    from coalm_nemo.config import to_yaml

    return to_yaml(run)


def test_a_dry_run_on_other_gpus_finds_its_layout_and_says_so() -> None:
    """16 GPUs for a recipe of 8; a layout that the caller names is left alone."""
    done = dry_run("--recipe", "coalm_8b", "--gpus", "16")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "found by the planner: the recipe's own is for 8 GPUs" in done.stdout
    named = dry_run("--recipe", "coalm_8b", "--gpus", "16", "parallel.tensor=4")
    assert named.returncode == 0, named.stderr[-2000:]
    assert "layout: as given; the recipe's own is for 8 GPUs" in named.stdout
    assert "tensor: 4" in named.stdout
    small = dry_run("--recipe", "coalm_405b", "--gpus", "16")
    assert small.returncode == 2
    assert small.stderr.startswith("coalm: no layout of 405b fits on 16 h100-80gb")
    assert len(small.stderr.splitlines()) == 1
