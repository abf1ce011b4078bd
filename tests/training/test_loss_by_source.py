"""The loss of each source: on every layout the same, and together the loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coalm_nemo.config import RunConfig, build_config
from coalm_nemo.data.batch import Shape, Sources, build_micro_batch
from coalm_nemo.data.build import build
from coalm_nemo.data.build_config import load_build_config
from coalm_nemo.data.shards import ShardSet
from coalm_nemo.report.command import page, read_all
from coalm_nemo.training.callbacks.line_file import read_lines
from coalm_nemo.training.callbacks.metrics_file import read_steps
from coalm_nemo.training.step import supervised_loss
from recipes import load_recipe
from tests.conftest import write_rows


@pytest.fixture(scope="module")
def shards(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of different rows."""
    place = tmp_path_factory.mktemp("sources")
    write_rows(place / "a.jsonl", 40, seed=1)
    write_rows(place / "b.jsonl", 24, seed=2)
    sources = {name: {"kind": "chat", "path": str(place / f"{name}.jsonl")} for name in ("a", "b")}
    (place / "set.yaml").write_text(json.dumps({"sources": sources}))  # JSON is YAML
    config = load_build_config(place / "set.yaml", [], [], tokenizer=str(tiny_llama), seq_len_tokens=256)
    return build(config, place / "set", workers=1).directory


def configure(model: Path, shards: Path, run_dir: Path, *words: str) -> RunConfig:
    common = [f"run.dir={run_dir}", f"model.hf_path={model}", f"data.train={shards}", "train.seq_len_tokens=256"]
    steps = ["train.steps=3", "batch.global_size=4", "data.packing=true", "data.pack_multiple=4"]
    return build_config(load_recipe("coalm_tiny"), [], [*common, *steps, *words])


def test_every_layout_gives_the_same_and_they_make_up_the_loss(
    ranks_pool: Any, tiny_llama: Path, shards: Path, tmp_path: Path
) -> None:
    layouts = {
        "one": (1, []),
        "dp2": (2, []),
        "cp2": (2, ["parallel.context=2"]),
        "tp2pp2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    }
    losses = {}
    for name, (ranks, words) in layouts.items():
        assert ranks_pool.train(configure(tiny_llama, shards, tmp_path / name, *words), ranks) == [0] * ranks
        steps = read_steps(tmp_path / name / "metrics.jsonl")
        losses[name] = [[s["lm_loss"], s["loss_by_source"]["a"], s["loss_by_source"]["b"]] for s in steps]
        np.testing.assert_allclose(losses[name], losses["one"], atol=1e-6)
    # Every token is of one source, so the loss lies between theirs.
    assert all(min(a, b) < loss < max(a, b) for loss, a, b in losses["one"])
    text = page(*read_all([tmp_path / "one"]))
    assert "Loss by source" in text
    (start,) = (e for e in read_lines(tmp_path / "one" / "events.jsonl") if e["event"] == "start")
    assert set(start["data"]["blend"]) == {"a", "b"}


def test_switched_off_or_one_source(
    ranks_pool: Any, tiny_llama: Path, shards: Path, rows_file: Path, tmp_path: Path
) -> None:
    off = configure(tiny_llama, shards, tmp_path / "off", "logging.loss_by_source=false")
    rows = configure(tiny_llama, rows_file, tmp_path / "rows")
    for run in (off, rows):
        assert ranks_pool.train(run, 1) == [0]
        assert all("loss_by_source" not in s for s in read_steps(Path(run.run.dir) / "metrics.jsonl"))


def test_sums_are_exact(shards: Path) -> None:
    """The report of one micro-batch against sums over each row by itself."""
    rows = ShardSet.load(shards)
    sources = Sources(tuple(rows.source_names()), rows.sources())
    group = [int(i) for source in (0, 1) for i in np.flatnonzero(sources.of_row == source)[:3]]
    length = sum(len(rows.row(i)[0]) for i in group) + 8
    batch = build_micro_batch(rows, [group], length, Shape(length, packed=True), torch.device("cpu"), sources)
    losses = torch.rand(1, length, generator=torch.Generator().manual_seed(0))
    _, _, report = supervised_loss(batch, losses)
    sums, counts, at = np.zeros(2), np.zeros(2), 0
    for index in group:
        ids, mask = rows.row(index)
        n = len(ids) - 1
        own = losses[0, at : at + n].double().numpy() * mask[1:]
        sums[sources.of_row[index]] += own.sum()
        counts[sources.of_row[index]] += mask[1:].sum()
        at += n
    np.testing.assert_allclose(report.numpy(), [sums.sum(), counts.sum(), *sums, *counts], rtol=1e-6)
    assert counts.all()
