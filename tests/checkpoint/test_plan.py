from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import refused
from llama_405b import BYTES, PARAMETERS, SHAPES, SHARDS, TENSORS, write_llama_405b
from tiny_llama import make_tiny_llama

from coalm_nemo.checkpoint.convert import import_checkpoint
from coalm_nemo.checkpoint.plan import plan_import, read_plan
from coalm_nemo.checkpoint.plan_command import duration, measured_gb_per_second, plan_command
from coalm_nemo.checkpoint.torch_dist import read_metadata
from coalm_nemo.models.llama import load_llama_config


def test_405b_without_a_weight_on_disk(tmp_path: Path) -> None:
    plan = read_plan(write_llama_405b(tmp_path / "hf"))
    assert len(plan.copies) == TENSORS == 1137
    assert {copy.name: copy.shape for copy in plan.copies} == SHAPES
    assert plan.parameters == plan.model.num_parameters() == PARAMETERS
    assert plan.weight_bytes == sum(key.bytes for key in plan.keys) == BYTES
    assert plan.files == SHARDS
    assert not plan.notes
    keys = {key.key: (key.shape, key.sources) for key in plan.keys}
    assert keys["decoder.layers.self_attention.linear_qkv.weight"] == ((126, 18432, 16384), 378)
    assert keys["decoder.layers.mlp.linear_fc1.weight"] == ((126, 106496, 16384), 252)
    assert keys["output_layer.weight"] == ((128256, 16384), 1)
    assert plan.seconds(2.0) == pytest.approx(BYTES / 2e9)


def test_every_row_of_every_tensor_goes_somewhere_once(tmp_path: Path) -> None:
    plan = read_plan(write_llama_405b(tmp_path / "hf"))
    taken: dict[tuple[str, int | None], list[tuple[int, int]]] = {}
    for copy in plan.copies:
        rows = copy.shape[0] if len(copy.shape) == 2 else 1
        assert sum(block.rows for block in copy.blocks) == rows, copy.name
        for block in copy.blocks:
            taken.setdefault((block.key, block.layer), []).append((block.row, block.row + block.rows))
    shapes = {key.key: key.shape for key in plan.keys}
    for (key, layer), spans in taken.items():
        shape = shapes[key] if layer is None else shapes[key][1:]
        ends = [0, *(end for _, end in sorted(spans))]
        assert [start for start, _ in sorted(spans)] == ends[:-1]
        assert ends[-1] == (shape[0] if len(shape) == 2 else 1)


@pytest.mark.parametrize("shape", [{"tied": True, "dtype": "bfloat16"}, {"shards": 3, "num_layers": 3}])
def test_the_plan_is_what_an_import_then_does(tmp_path: Path, shape: dict[str, Any]) -> None:
    hf = make_tiny_llama(tmp_path / "hf", **shape)
    plan = read_plan(hf)
    report = import_checkpoint(hf, tmp_path / "ckpt")
    assert (report.tensors, report.weight_bytes) == (len(plan.copies), plan.weight_bytes)
    assert {k: s.shape for k, s in read_metadata(tmp_path / "ckpt").items()} == {k.key: k.shape for k in plan.keys}


def edited(directory: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    write_llama_405b(directory)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))
    return directory


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing": (lambda i: i["weight_map"].pop("model.layers.7.mlp.up_proj.weight"), r"lacks model\.layers\.7\.mlp\.up"),
    "extra": (lambda i: i["weight_map"].update({"model.layers.126.x": "a"}), r"holds model\.layers\.126\.x"),
    "outside": (lambda i: i["weight_map"].update({"lm_head.weight": "../a"}), "outside its directory"),
    "absolute": (lambda i: i["weight_map"].update({"lm_head.weight": "/a"}), "outside its directory"),
    "no map": (lambda i: i.pop("weight_map"), "no valid 'weight_map'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_index_that_does_not_fit_is_refused(tmp_path: Path, fault: str) -> None:
    edit, sentence = FAULTS[fault]
    with refused(sentence):
        read_plan(edited(tmp_path / "hf", edit))


def test_an_index_with_a_name_twice_is_refused(tmp_path: Path) -> None:
    hf = write_llama_405b(tmp_path / "hf")
    (hf / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x", "a": "y"}}')
    with refused("'a' occurs twice"):
        read_plan(hf)


def test_a_total_that_does_not_fit_is_noted(tmp_path: Path) -> None:
    plan = read_plan(edited(tmp_path / "hf", lambda i: i["metadata"].update(total_size=2 * BYTES)))
    assert "may be of another dtype" in plan.notes[0]


def test_config_alone_is_enough(tmp_path: Path) -> None:
    hf = write_llama_405b(tmp_path / "hf")
    plan = plan_import(load_llama_config(hf))
    assert (len(plan.copies), plan.weight_bytes, plan.files) == (TENSORS, BYTES, 0)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = write_llama_405b(tmp_path / "hf")
    plan_command(hf, tmp_path / "not" / "there", 2.0, as_json=False)
    page = capsys.readouterr().out
    for text in ("1,137 tensors, 191 files", "405,853,388,800 of bfloat16", "811,706,777,600", "7 min at 2.00 GB/s"):
        assert text in page
    plan_command(hf, tmp_path / "out", 2.0, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["weight_bytes"], len(found["copies"])) == (BYTES, TENSORS)
    assert not (tmp_path / "out").exists()
    with refused("not possible"):
        plan_command(hf, tmp_path / "out", 0.0, as_json=False)


def test_room_decides_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = write_llama_405b(tmp_path / "hf")
    for free, code in ((10**13, 0), (10**9, 1)):
        monkeypatch.setattr("coalm_nemo.checkpoint.plan_command.free_bytes", lambda out, free=free: free)
        assert plan_command(hf, tmp_path / "out", 2.0, as_json=False) == code


def test_the_speed_is_measured_and_nothing_is_left(tmp_path: Path) -> None:
    assert measured_gb_per_second(tmp_path / "a" / "b", 1 << 20) > 0
    assert not list(tmp_path.iterdir())


def test_durations() -> None:
    assert [duration(s) for s in (3.21, 90, 3725, 7199)] == ["3.2 s", "2 min", "1 h 02 min", "2 h 00 min"]
