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
