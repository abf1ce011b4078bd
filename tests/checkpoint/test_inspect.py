from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import refused
from tiny_llama import make_tiny_llama

from coalm_nemo.checkpoint.convert import export_checkpoint, import_checkpoint
from coalm_nemo.checkpoint.inspect import inspect_directory, layouts
from coalm_nemo.checkpoint.inspect_command import group_tensors, inspect_command
from coalm_nemo.checkpoint.quantize import quantize_directory
from coalm_nemo.checkpoint.saved_layout import OptimizerState, SavedLayout, read_common, saved_layout
from coalm_nemo.checkpoint.torch_dist import Chunk, StoredKey
from coalm_nemo.checkpoint.torch_zip import object_bytes
from coalm_nemo.models.llama import load_llama_config

HEADS, LAYERS, HIDDEN = 4, 4, 64


def stored(tensor: int, ranks: list[int], columns: int = HIDDEN) -> dict[str, StoredKey]:
    """One weight that tensor parallelism cuts by columns, as the ranks `ranks[layer]` and those beside them save it."""
    width = columns // tensor
    chunks = tuple(
        Chunk((layer, 0, part * width), (1, HIDDEN, width), Path(f"__{rank + part}_{layer % 2}.distcp"), 0, 0)
        for layer, rank in enumerate(ranks)
        for part in range(tensor)
    )
    key = "decoder.layers.self_attention.linear_proj.weight"
    return {key: StoredKey("float32", (len(ranks), HIDDEN, columns), chunks)}


LAYOUTS: dict[str, tuple[int, list[int], SavedLayout | None]] = {
    "single": (1, [0, 0, 0, 0], SavedLayout(1, 1, 1)),
    "tp2": (2, [0, 0, 0, 0], SavedLayout(2, 1, 1)),
    "pp2": (1, [0, 0, 1, 1], SavedLayout(1, 2, 1)),
    "tp2_pp2": (2, [0, 0, 2, 2], SavedLayout(2, 2, 1)),
    "tp2_pp2_dp2": (2, [0, 0, 4, 4], SavedLayout(2, 2, 1)),
    "pp2_vp2": (1, [0, 1, 0, 1], SavedLayout(1, 2, 2)),
    "pp4": (1, [0, 1, 2, 3], SavedLayout(1, 4, 1)),
    "in no order of a pipeline": (1, [0, 1, 1, 0], None),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_shows_in_the_chunks(name: str) -> None:
    tensor, ranks, wanted = LAYOUTS[name]
    assert saved_layout(stored(tensor, ranks)) == wanted


def test_layers_by_number_and_optimizer_keys() -> None:
    """With singleton_local_shards the layer stands in the key; an optimizer's keys end like the model's."""
    (whole,) = stored(2, [0, 0, 2, 2]).values()
    keys = {
        f"decoder.layers.{layer}.self_attention.linear_proj.weight": StoredKey(
            "float32",
            (HIDDEN, HIDDEN),
            tuple(replace(c, offsets=c.offsets[1:], sizes=c.sizes[1:]) for c in whole.chunks if c.offsets[0] == layer),
        )
        for layer in range(LAYERS)
    }
    other = {f"optimizer.state.exp_avg.{key}": value for key, value in stored(1, [0, 0, 0, 0]).items()}
    assert saved_layout(keys | other) == SavedLayout(2, 2, 1)


def test_nothing_is_claimed_where_files_are_named_otherwise() -> None:
    (only,) = stored(1, [0, 0]).values()
    renamed = replace(only, chunks=tuple(replace(c, path=Path("x.distcp")) for c in only.chunks))
    assert saved_layout({"decoder.layers.mlp.linear_fc2.weight": renamed}) is None
    assert saved_layout({}) is None


def test_what_a_model_can_be_trained_on(tmp_path: Path) -> None:
    cfg = load_llama_config(make_tiny_llama(tmp_path / "hf"))
    big = replace(cfg, num_layers=126, num_heads=128, num_kv_heads=8, ffn_size=53248)
    state = OptimizerState("plain", "", 2, 8, ("exp_avg",))
    assert layouts(big, None).tensor == (1, 2, 4, 8)
    assert layouts(big, None).pipeline_times_virtual == (1, 2, 3, 6, 7, 9, 14, 18, 21, 42, 63, 126)
    assert layouts(big, None).distributed_optimizer is None
    assert layouts(big, state).distributed_optimizer is False
    assert layouts(replace(cfg, num_heads=9, num_kv_heads=3), None).tensor == (1, 3)


@pytest.mark.parametrize("shape", [{"tied": True, "dtype": "bfloat16"}, {"shards": 3}])
def test_a_hugging_face_directory(tmp_path: Path, shape: dict[str, Any]) -> None:
    hf = make_tiny_llama(tmp_path / "hf", **shape)
    found = inspect_directory(hf)
    assert (found.format, found.kind, found.step) == ("hugging face", "weights", None)
    assert found.model == load_llama_config(hf)
    assert found.parameters == load_llama_config(hf).num_parameters()
    assert found.weight_bytes == found.total_bytes == found.parameters * (2 if "dtype" in shape else 4)
    groups = {g.name: g for g in group_tensors(found.tensors)}
    assert groups["model.layers.*.mlp.up_proj.weight"].count == 2
    assert groups["model.layers.*.mlp.up_proj.weight"].shape == (96, 64)
    assert sum(g.bytes for g in groups.values()) == found.total_bytes


def test_an_fp8_directory(tmp_path: Path) -> None:
    hf = make_tiny_llama(tmp_path / "hf", dtype="bfloat16")
    quantize_directory(hf, tmp_path / "fp8")
    found = inspect_directory(tmp_path / "fp8")
    assert found.quantization == "float-quantized"
    assert found.dtypes == ("bfloat16", "float8_e4m3fn")
    assert found.parameters == load_llama_config(hf).num_parameters()
    assert found.resume is None


def test_an_imported_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = make_tiny_llama(tmp_path / "hf")
    import_checkpoint(hf, tmp_path / "ckpt")
    found = inspect_directory(tmp_path / "ckpt")
    assert (found.format, found.kind, found.optimizer, found.saved_from) == ("megatron", "base", None, None)
    assert found.parameters == load_llama_config(hf).num_parameters()
    inspect_command(tmp_path / "ckpt", as_json=False)
    page = capsys.readouterr().out
    assert "train as:" in page
    assert "consumed" not in page
    inspect_command(tmp_path / "ckpt", as_json=True)
    fields = json.loads(capsys.readouterr().out)
    assert fields["resume"]["tensor"] == [1, 2]
    assert {t["name"] for t in fields["tensors"]} >= {"embedding.word_embeddings.weight"}


def test_without_coalm_json_and_config(tmp_path: Path) -> None:
    """What another Megatron program wrote: the tensors alone tell."""
    import_checkpoint(make_tiny_llama(tmp_path / "hf"), tmp_path / "ckpt")
    for name in ("coalm.json", "hf/config.json"):
        (tmp_path / "ckpt" / name).unlink()
    (tmp_path / "ckpt/common.pt").write_bytes(object_bytes({"iteration": 70, "optimizer": {}}))
    found = inspect_directory(tmp_path / "ckpt")
    assert (found.kind, found.step, found.model, found.resume) == ("weights", 70, None, None)
    assert found.saved_from == SavedLayout(1, 1, 1)


def test_an_export_of_it(tmp_path: Path) -> None:
    hf = make_tiny_llama(tmp_path / "hf")
    import_checkpoint(hf, tmp_path / "ckpt")
    export_checkpoint(tmp_path / "ckpt", tmp_path / "back")
    assert {t.name: t.shape for t in inspect_directory(tmp_path / "back").tensors} == {
        t.name: t.shape for t in inspect_directory(hf).tensors
    }


NEITHER: dict[str, Callable[[Path], object]] = {
    "empty": lambda p: p.mkdir(),
    "missing": lambda p: None,
    "a file": lambda p: p.write_text("x"),
    "config alone": lambda p: (p.mkdir(), (p / "config.json").write_text("{}")),
}


@pytest.mark.parametrize("what", NEITHER)
def test_what_is_neither_is_refused(tmp_path: Path, what: str) -> None:
    NEITHER[what](tmp_path / "x")
    with refused("neither a Hugging Face model .* nor a Megatron checkpoint"):
        inspect_directory(tmp_path / "x")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    hf = make_tiny_llama(tmp_path / "hf", shards=3)
    (hf / "model-00002-of-00003.safetensors").unlink()
    with refused("names model-00002-of-00003.safetensors, which is missing"):
        inspect_directory(hf)


def test_damaged_metadata_is_refused(tmp_path: Path) -> None:
    import_checkpoint(make_tiny_llama(tmp_path / "hf"), tmp_path / "ckpt")
    (tmp_path / "ckpt/.metadata").write_bytes(b"\x80\x04cos\nsystem\n.")
    with refused("not trusted"):
        inspect_directory(tmp_path / "ckpt")


@pytest.mark.parametrize("content", [b"", b"not a zip", object_bytes([1, 2])[:-9]])
def test_common_that_cannot_be_read_is_left_out(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "common.pt").write_bytes(content)
    assert read_common(tmp_path) is None


def test_common_that_asks_for_a_foreign_class_is_left_out(tmp_path: Path) -> None:
    import argparse

    import torch

    torch.save({"args": argparse.Namespace(lr=1.0)}, tmp_path / "common.pt")
    assert read_common(tmp_path) is None


@pytest.mark.slow
def test_a_checkpoint_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """megatron-core's own files, at TP2, with and without the distributed optimizer."""
    import subprocess
    import sys

    from tests.conftest import write_rows

    hf, rows = make_tiny_llama(tmp_path / "hf"), write_rows(tmp_path / "rows.jsonl", 16)
    for distributed in (True, False):
        run = tmp_path / str(distributed)
        words = [f"run.dir={run}", f"model.hf_path={hf}", f"data.train={rows}", "train.steps=1", "precision.dtype=fp32"]
        words += ["parallel.tensor=2", f"parallel.distributed_optimizer={str(distributed).lower()}"]
        subprocess.run([sys.executable, "-m", "coalm_nemo.cli", "train", "--nproc", "2", *words], check=True)
        found = inspect_directory(run / "checkpoints" / "step_00000001")
        assert (found.kind, found.step, found.consumed_items) == ("training", 1, 8)
        assert found.saved_from == SavedLayout(2, 1, 1)
        assert found.optimizer is not None
        assert found.optimizer.form == ("distributed" if distributed else "plain")
        assert found.optimizer.sharding == ("fully_reshardable" if distributed else "")
        assert found.optimizer.states == ("exp_avg", "exp_avg_sq", *(["param"] if distributed else []))
        assert found.parameters == load_llama_config(hf).num_parameters()
        inspect_command(found.path, as_json=False)
        assert f"parallel.distributed_optimizer={str(distributed).lower()}" in capsys.readouterr().out
