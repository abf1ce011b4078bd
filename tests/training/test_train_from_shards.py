"""A built set from `data build` through training to the exported model's chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coalm_nemo.checkpoint.convert import export_checkpoint
from coalm_nemo.config import RunConfig, build_config
from coalm_nemo.data.build import build
from coalm_nemo.data.build_config import load_build_config
from coalm_nemo.data.chat import load_tokenizer
from coalm_nemo.data.rows import parse_row
from coalm_nemo.data.shards import ShardSet
from coalm_nemo.errors import EXIT_USER_ERROR
from coalm_nemo.training.callbacks.metrics_file import read_steps
from recipes import load_recipe
from tests.tiny_llama import make_tiny_llama
from tests.training.ranks_pool import output


@pytest.fixture(scope="module")
def untemplated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model without a chat template, as base (not instruct) checkpoints are."""
    directory = make_tiny_llama(tmp_path_factory.mktemp("base") / "llama", num_layers=4)
    (directory / "chat_template.jinja").unlink()
    return directory


def build_set(rows: Path, model: Path, out: Path, length: int = 256) -> Path:
    config = load_build_config(None, [f"chat={rows}"], [], tokenizer=str(model), seq_len_tokens=length)
    return build(config, out, workers=1).directory


def configure(model: Path, shards: Path, run_dir: Path, *words: str) -> RunConfig:
    common = [f"run.dir={run_dir}", f"model.hf_path={model}", f"data.train={shards}", "train.seq_len_tokens=256"]
    steps = ["train.steps=4", "batch.global_size=4", "data.packing=true"]
    return build_config(load_recipe("coalm_tiny"), [], [*common, *steps, *words])


def test_every_layout_trains_on_the_same_packs(
    ranks_pool: Any, untemplated: Path, rows_file: Path, tmp_path: Path
) -> None:
    shards = build_set(rows_file, untemplated, tmp_path / "set")
    layouts = {
        "one": (1, []),
        "tp2pp2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
        "dp2": (2, []),
        "cp2": (2, ["parallel.context=2"]),
    }
    curves = {}
    for name, (ranks, words) in layouts.items():
        run = configure(untemplated, shards, tmp_path / name, "data.validation_fraction=0.2", *words)
        assert ranks_pool.train(run, ranks) == [0] * ranks
        curves[name] = [(s["lm_loss"], s["supervised_tokens"]) for s in read_steps(tmp_path / name / "metrics.jsonl")]
    for name in layouts:
        assert [n for _, n in curves[name]] == [n for _, n in curves["one"]]
        assert [x for x, _ in curves[name]] == pytest.approx([x for x, _ in curves["one"]], abs=1e-6)
    _the_export_carries_the_template_of_training(shards, rows_file, tmp_path)


def _the_export_carries_the_template_of_training(shards: Path, rows_file: Path, tmp_path: Path) -> None:
    (newest,) = (tmp_path / "one" / "checkpoints").glob("step_*")
    export_checkpoint(newest, tmp_path / "exported")
    tokenizer, rows = load_tokenizer(tmp_path / "exported"), ShardSet.load(shards)
    sources = {raw["id"]: raw for raw in map(json.loads, rows_file.read_text().splitlines())}
    for index in range(len(rows)):
        (row,) = [parse_row(sources[rows.row_id(index)], "row")]
        assert (
            tokenizer.apply_chat_template(row.messages, tokenize=True, return_dict=False) == rows.row(index)[0].tolist()
        )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train.seq_len_tokens=512"], "built for sequences of 256 tokens and train.seq_len_tokens is 512"),
        (["data.validation=ROWS"], "is not a set of `coalm data build`, as data.train is"),
        (["data.train=DIR"], "is not a set of `coalm data build`"),
    ],
    ids=["length", "validation file", "a directory"],
)
def test_a_set_that_does_not_fit_is_refused(
    ranks_pool: Any, untemplated: Path, rows_file: Path, tmp_path: Path, words: list[str], sentence: str
) -> None:
    shards = build_set(rows_file, untemplated, tmp_path / "set")
    words = [w.replace("ROWS", str(rows_file)).replace("DIR", str(tmp_path)) for w in words]
    run = configure(untemplated, shards, tmp_path / "run", *words)
    assert ranks_pool.train(run, 1) == [EXIT_USER_ERROR]
    assert sentence in output(run)
    assert json.loads((shards / "manifest.json").read_text())["rows"] == 48
