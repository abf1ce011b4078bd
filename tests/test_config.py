"""Recipe, YAML files and key=value words become one typed configuration."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from coalm_nemo.config import RunConfig, build_config, known_keys, to_yaml
from coalm_nemo.errors import UserError
from recipes import RECIPES, load_recipe


def yaml(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_later_ones_win(tmp_path: Path) -> None:
    first = yaml(tmp_path / "a.yaml", "train:\n  steps: 1\n  epochs: 2.5\noptimizer:\n  lr: 1e-4\n")
    second = yaml(tmp_path / "b.yaml", "train: {steps: 2}\n")
    run = build_config(RunConfig(), [first, second], ["train.steps=3", "data.packing=true"])
    assert (run.train.steps, run.train.epochs, run.optimizer.lr, run.data.packing) == (3, 2.5, 1e-4, True)
    assert run.parallel == RunConfig().parallel


def test_dotted_keys_in_yaml(tmp_path: Path) -> None:
    run = build_config(RunConfig(), [yaml(tmp_path / "a.yaml", "train.steps: 4\n")])
    assert run.train.steps == 4


def test_the_recipe_is_not_changed() -> None:
    base = RunConfig()
    build_config(base, [], ["train.steps=9"])
    assert base == RunConfig()


@pytest.mark.parametrize(
    "value", ["/data/a=b.jsonl", "[x].jsonl", "a: b", "12", "true", "{curly}", "~/x #1", "", "null"]
)
def test_text_is_taken_as_it_is(value: str) -> None:
    assert build_config(RunConfig(), [], [f"data.train={value}"]).data.train == value


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [("optimizer.lr=3e-4", "lr", 3e-4), ("optimizer.lr=1", "lr", 1.0), ("optimizer.eps=1.0e-6", "eps", 1e-6)],
)
def test_numbers(word: str, key: str, value: float) -> None:
    assert getattr(build_config(RunConfig(), [], [word]).optimizer, key) == value


@pytest.mark.parametrize("word", ["data.packing=on", "data.packing=yes", "data.packing=1", "data.packing=True"])
def test_switches(word: str) -> None:
    assert build_config(RunConfig(), [], [word]).data.packing is True


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("train.step=1", "train.steps"), ("trian.steps=1", "train.steps"), ("steps=1", "train.steps"),
        ("optimiser.lr=1", "optimizer.lr"), ("parallel.tensors=2", "parallel.tensor"), ("data.pack=1", "data.packing"),
        ("lr=1", "optimizer.lr"), ("model.path=x", "model.hf_path"),
    ],
)  # fmt: skip
def test_an_unknown_key_names_the_nearest(word: str, near: str) -> None:
    with pytest.raises(UserError, match=f"did you mean '{near}'"):
        build_config(RunConfig(), [], [word])


@pytest.mark.parametrize(
    "word",
    [
        "train.steps=1.5",
        "train.steps=x",
        "train.steps=",
        "data.packing=maybe",
        "train.steps={a: 1}",
        "optimizer.lr=[1]",
    ],
)
def test_a_wrong_type_names_the_key(word: str) -> None:
    with pytest.raises(UserError, match=word.partition("=")[0]) as caught:
        build_config(RunConfig(), [], [word])
    assert "\n" not in str(caught.value)


def test_what_is_printed_can_be_given_back(tmp_path: Path) -> None:
    run = build_config(
        RunConfig(), [], ["train.steps=7", "data.train=/a=b: [c].jsonl", "optimizer.lr=1e-7", "run.dir=007"]
    )
    assert build_config(RunConfig(), [yaml(tmp_path / "run.yaml", to_yaml(run))]) == run


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str, tmp_path: Path) -> None:
    run = load_recipe(name)
    assert run != RunConfig() and run.run.dir.endswith(name)
    assert build_config(RunConfig(), [yaml(tmp_path / "run.yaml", to_yaml(run))]) == run


def test_every_key_is_known_once() -> None:
    keys = known_keys()
    assert len(keys) == len(set(keys)) > 50
    assert {k.split(".")[0] for k in keys} == {f.name for f in fields(RunConfig)}
