"""Same weights, same batch: the loss and gradient norm of plain transformers on every layout, packed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coalm_nemo.config import RunConfig, build_config
from coalm_nemo.training.callbacks.metrics_file import read_steps
from recipes import load_recipe
from tests.training.hf_reference import Reference, load_prepared, train_reference

STEPS = 5
TOLERANCE = 2e-6

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "single": (1, []),
    "tp2": (2, ["parallel.tensor=2", "parallel.sequence=false"]),
    "tp2_sp": (2, ["parallel.tensor=2"]),
    "pp2": (2, ["parallel.pipeline=2"]),
    "pp2_vp2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "pp2_vp3_embedding_and_loss_counted": (
        2,
        ["parallel.pipeline=2", "parallel.virtual_pipeline=3", "parallel.count_embedding_and_loss=true"],
    ),
    "cp2": (2, ["parallel.context=2"]),
    "dp2": (2, []),
    "dp2_plain_optimizer": (2, ["parallel.distributed_optimizer=false"]),
    "dp2_overlapped": (2, ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]),
    "tp2_pp2_sp": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "tp2_cp2_sp": (4, ["parallel.tensor=2", "parallel.context=2"]),
    "tp2_pp2_sp_full_recompute": (4, ["parallel.tensor=2", "parallel.pipeline=2", "train.recompute=full"]),
    "tp2_selective_recompute": (2, ["parallel.tensor=2", "train.recompute=selective"]),
    "tp2_dp2": (4, ["parallel.tensor=2"]),
    "tp2_pp2_vp2_sp": (4, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
}


def configure(model: Path, rows: Path, run_dir: Path, *words: str) -> RunConfig:
    """coalm_tiny for STEPS steps at a constant learning rate, nothing saved."""
    base = [
        f"run.dir={run_dir}", f"model.hf_path={model}", f"data.train={rows}", f"train.steps={STEPS}",
        "batch.micro_size=2", "schedule.name=constant", "checkpoint.save_final=false",
        "checkpoint.resume=false", "logging.console_interval_steps=100",
    ]  # fmt: skip
    return build_config(load_recipe("coalm_tiny"), [], [*base, *words])


@pytest.fixture(scope="module")
def reference(
    tmp_path_factory: pytest.TempPathFactory, rows_file: Path, tiny_llama: Path, tiny_llama_tied: Path
) -> Any:
    """Reference curves of the untied and the tied model."""
    from coalm_nemo.training.prepare import prepare, read_llama

    curves: dict[bool, Reference] = {}
    for tied, model in ((False, tiny_llama), (True, tiny_llama_tied)):
        run_dir = tmp_path_factory.mktemp("reference")
        run = configure(model, rows_file, run_dir)
        prepare(run, read_llama(run))
        curves[tied] = train_reference(run, load_prepared(run_dir), STEPS)
    return curves


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_matches_transformers(
    layout: str,
    tied: bool,
    reference: Any,
    ranks_pool: Any,
    rows_file: Path,
    tiny_llama: Path,
    tiny_llama_tied: Path,
    tmp_path: Path,
) -> None:
    nproc, words = LAYOUTS[layout]
    run = configure(tiny_llama_tied if tied else tiny_llama, rows_file, tmp_path, *words)
    assert ranks_pool.train(run, nproc) == [0] * nproc
    steps = read_steps(tmp_path / "metrics.jsonl")
    assert [s["lm_loss"] for s in steps] == pytest.approx(reference[tied].losses, rel=0, abs=TOLERANCE)
    assert [s["grad_norm"] for s in steps] == pytest.approx(reference[tied].grad_norms, rel=TOLERANCE)


@pytest.mark.parametrize("split", [(1, 1), (2, 1), (8, 1), (1, 2), (4, 2)], ids=lambda s: f"micro{s[0]}_dp{s[1]}")
def test_a_token_weighs_the_same_however_the_batch_is_split(
    split: tuple[int, int], reference: Any, ranks_pool: Any, rows_file: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    micro, ranks = split
    run = configure(tiny_llama, rows_file, tmp_path, f"batch.micro_size={micro}")
    assert ranks_pool.train(run, ranks) == [0] * ranks
    steps = read_steps(tmp_path / "metrics.jsonl")
    assert [s["lm_loss"] for s in steps] == pytest.approx(reference[False].losses, rel=0, abs=TOLERANCE)
    assert [s["grad_norm"] for s in steps] == pytest.approx(reference[False].grad_norms, rel=TOLERANCE)


PACKED = {
    "single": (1, []),
    "dp2": (2, []),
    "tp2_pp2_sp": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "cp2": (2, ["parallel.context=2"]),
    "tp2_cp2_sp": (4, ["parallel.tensor=2", "parallel.context=2"]),
    "pp2_vp2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
}


@pytest.mark.parametrize("layout", PACKED)
def test_packed_rows_give_the_loss_of_the_same_rows_unpacked(
    layout: str, ranks_pool: Any, rows_file: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """One batch that holds the whole set: packing cannot change which rows it has, only where they lie."""
    nproc, words = PACKED[layout]
    unpacked = configure(tiny_llama, rows_file, tmp_path / "unpacked", "batch.global_size=48", "train.steps=1")
    assert ranks_pool.train(unpacked, 1) == [0]
    # Fewer packs than places in the batch: the rest is filled with nothing, as at the end of the last epoch.
    words = [
        *words,
        "data.packing=true",
        "batch.micro_size=1",
        "batch.global_size=32",
        "train.steps=0",
        "train.epochs=1",
    ]
    run = configure(tiny_llama, rows_file, tmp_path / "packed", *words)
    assert ranks_pool.train(run, nproc) == [0] * nproc
    (ours,), (theirs,) = (read_steps(tmp_path / name / "metrics.jsonl") for name in ("packed", "unpacked"))
    assert ours["supervised_tokens"] == theirs["supervised_tokens"]
    assert ours["lm_loss"] == pytest.approx(theirs["lm_loss"], rel=0, abs=1e-6)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=TOLERANCE)


def test_a_padded_vocabulary_takes_no_part_in_the_loss(ranks_pool: Any, rows_file: Path, tmp_path: Path) -> None:
    """321 entries do not divide by TP2: one is added, and must not compete for probability."""
    from tests.tiny_llama import make_tiny_llama

    model = make_tiny_llama(tmp_path / "model", vocab_size=321, num_layers=4)
    curves = []
    for name, nproc, words in (("whole", 1, []), ("padded", 2, ["parallel.tensor=2"])):
        assert ranks_pool.train(configure(model, rows_file, tmp_path / name, *words), nproc) == [0] * nproc
        curves.append([(s["lm_loss"], s["grad_norm"]) for s in read_steps(tmp_path / name / "metrics.jsonl")])
    for (loss, norm), (other_loss, other_norm) in zip(*curves, strict=True):
        assert loss == pytest.approx(other_loss, abs=TOLERANCE)
        assert norm == pytest.approx(other_norm, rel=TOLERANCE)


def test_bf16_stays_close_to_fp32(
    reference: Any, ranks_pool: Any, rows_file: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    words = ["precision.dtype=bf16", "parallel.tensor=2", "parallel.pipeline=2"]
    assert ranks_pool.train(configure(tiny_llama, rows_file, tmp_path, *words), 4) == [0] * 4
    losses = [s["lm_loss"] for s in read_steps(tmp_path / "metrics.jsonl")]
    assert losses == pytest.approx(reference[False].losses, rel=5e-3)
    assert losses != pytest.approx(reference[False].losses, rel=1e-7), "bf16 was asked for and fp32 ran"
