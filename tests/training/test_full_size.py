"""Runs of any size, built rank by rank without memory: the parts make the model, to the parameter.

In processes of their own: the fake process group and the meta device are for a whole process.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SCRIPT = """
import dataclasses, json, sys
from coalm_nemo.config import RunConfig, build_config
from coalm_nemo.errors import UserError
from coalm_nemo.planning.shapes import SHAPES
from coalm_nemo.training.full_size import build_full_size
found = []
for shape, changes, words, world, ranks in json.loads(sys.argv[1]):
    run = build_config(RunConfig(), [], words)
    try:
        full = build_full_size(run, dataclasses.replace(SHAPES[shape], **changes), world, ranks)
        shares = [[s.parameters, s.trained, s.gradients, s.optimizer, list(s.layers)] for s in full.shares]
        found.append([full.parameters, shares])
    except UserError as e:
        found.append(str(e))
print(json.dumps(found))
"""

TP8_PP8_VP16 = [
    "parallel.tensor=8", "parallel.pipeline=8", "parallel.virtual_pipeline=16", "batch.global_size=32",
    "parallel.count_embedding_and_loss=true",
]  # fmt: skip
SMALL = {"num_layers": 4}


def build(*cases: tuple[str, dict[str, object], list[str], int, list[int] | None]) -> list[object]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(cases)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return list(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_every_rank_of_405b() -> None:
    """405,853,388,800 parameters (arXiv 2407.21783: "405B") over 128 ranks; the optimizer is shared by two replicas."""
    ((parameters, shares),) = build(("405b", {}, TP8_PP8_VP16, 128, None))  # type: ignore[misc]
    assert parameters == 405_853_388_800
    assert len(shares) == 128
    assert sum(sum(layers) for *_, layers in shares) == 126 * 16
    for held, trained, gradients, optimizer, _ in shares:
        assert trained == held
        assert held <= gradients < 1.001 * held
        assert optimizer == pytest.approx(held / 2, rel=1e-3)


def test_8b_and_70b_to_the_parameter() -> None:
    eight, seventy = build(
        ("8b", {}, ["parallel.tensor=2", "parallel.pipeline=2"], 8, None),
        ("70b", {}, ["parallel.tensor=8", "parallel.pipeline=4", "batch.global_size=16"], 32, None),
    )
    assert (eight[0], seventy[0]) == (8_030_261_248, 70_553_706_496)  # type: ignore[index]


def test_padding_ties_adapters_and_some_ranks() -> None:
    odd = {"vocab_size": 128_255, **SMALL}
    words = ["parallel.tensor=2", "parallel.pipeline=2"]
    padded, tied, adapted, some = build(
        ("8b", odd, words, 4, None),
        ("8b", {"tied_embeddings": True, **SMALL}, words, 4, None),
        ("8b", SMALL, [*words, "lora.rank=16"], 8, None),
        ("8b", SMALL, words, 8, [0, 7]),
    )
    layer = 218_112_000
    assert padded[0] == 2 * 128_256 * 4096 + 4096 + 4 * layer  # type: ignore[index]
    assert tied[0] == 2 * 128_256 * 4096 + 4096 + 4 * layer  # type: ignore[index]  # both ends hold the table
    adapters = 4 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert adapted[0] == 2 * 128_256 * 4096 + 4096 + 4 * layer + adapters  # type: ignore[index]
    for held, trained, gradients, optimizer, _ in adapted[1]:  # type: ignore[index]
        assert trained < 0.01 * held
        assert gradients < 1.1 * trained
        assert optimizer < 0.6 * trained
    assert some[0] == 0 and len(some[1]) == 2  # type: ignore[index]


def test_what_does_not_divide_is_refused() -> None:
    (refused,) = build(("405b", {}, ["parallel.pipeline=8"], 8, None))
    assert "126 layers do not divide" in str(refused)


PLANNED = """
import json, sys
from dataclasses import replace
from coalm_nemo.config import build_config
from coalm_nemo.planning.shapes import SHAPES
from coalm_nemo.training.full_size import build_full_size
from coalm_nemo.training.full_size_report import built_bytes, planned_bytes
from recipes import load_recipe
found = []
for recipe, words, gpus, ranks, changes in json.loads(sys.argv[1]):
    run = build_config(load_recipe(recipe), [], words)
    llama = replace(SHAPES[run.model.shape], **changes)
    full = build_full_size(run, llama, gpus, ranks)
    for stage in sorted({s.stage for s in full.shares}):
        built = built_bytes(run, [s for s in full.shares if s.stage == stage])
        planned = planned_bytes(run, llama, gpus, stage)
        found.append([recipe, words, stage, built.off(planned), sum(s.fp8 for s in full.shares if s.stage == stage)])
print(json.dumps(found))
"""
ENDS = ["precision.bf16_layers_at_start=1", "precision.bf16_layers_at_end=2"]


def test_the_planner_has_the_bytes_that_are_built() -> None:
    """Weights with their FP8 forms, gradients, optimizer, of whole-size stages: within 0.1 %."""
    every = [
        "parallel.distributed_optimizer=false",
        "parallel.overlap_param_gather=false",
        "precision.fp8_params=false",
    ]
    cases = [
        ("coalm_8b", [], 8, [0], {}),
        ("coalm_8b", ENDS, 8, [0], {}),
        ("coalm_8b", [*ENDS, "precision.fp8_params=false"], 8, [0, 7], {}),
        ("coalm_8b", every, 8, [3], {}),
        ("coalm_70b", ["optimizer.moments=bf16"], 32, [0, 8, 31], {}),
        ("coalm_405b", [], 128, [0, 8, 127], {}),
        ("coalm_405b", ENDS, 128, [0, 8, 127], {}),
        ("coalm_8b_lora", [], 4, [0], {}),
        ("released_8b_lora", ["parallel.tensor=2"], 8, [0], {}),
        ("coalm_70b_lora", ["lora.rank=8", "lora.targets=[o,down]"], 8, [0, 7], {}),
        ("coalm_405b_lora", [], 32, [0, 31], {}),
        ("coalm_8b", ["parallel.pipeline=2"], 8, [0, 7], {"tied_embeddings": True, "vocab_size": 128_255}),
    ]
    done = subprocess.run(
        [sys.executable, "-c", PLANNED, json.dumps(cases)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 20
    for recipe, words, stage, off, fp8 in found:
        assert off < 1e-3, (recipe, words, stage, off)
        assert bool(fp8) == ("lora" not in recipe)


GROUPS = """
import json, sys
import torch
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore
from coalm_nemo.config import RunConfig
from coalm_nemo.training.fake_groups import fake_world
from coalm_nemo.training.setup import initialize_parallel_state
run = RunConfig()
run.parallel.tensor, run.parallel.pipeline, run.parallel.context, run.parallel.virtual_pipeline = 2, 4, 2, 2
GETTERS = ("tensor_model_parallel", "pipeline_model_parallel", "data_parallel", "context_parallel", "model_parallel",
           "embedding", "position_embedding", "tensor_and_data_parallel", "tensor_and_context_parallel")
def seen():
    groups = {}
    for name in GETTERS:
        try:
            group = getattr(parallel_state, f"get_{name}_group")()
        except AssertionError:
            group = None
        member = group is not None and group is not torch.distributed.GroupMember.NON_GROUP_MEMBER
        groups[name] = torch.distributed.get_process_group_ranks(group) if member else None
    both = parallel_state.get_data_parallel_group(with_context_parallel=True)
    groups["both"] = torch.distributed.get_process_group_ranks(both)
    return groups
result = []
for rank in (0, 1, 21, 37, 63):
    with fake_world(run, 64, rank):
        quick = seen()
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=64)
    initialize_parallel_state(run)
    result.append([quick, seen()])
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
print(json.dumps(result))
"""


def test_the_quick_groups_are_those_that_megatron_makes() -> None:
    done = subprocess.run([sys.executable, "-c", GROUPS], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for quick, real in json.loads(done.stdout.splitlines()[-1]):
        assert quick == real
        assert len(real["data_parallel"]) == 4 and len(real["both"]) == 8
