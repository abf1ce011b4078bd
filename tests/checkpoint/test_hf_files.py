from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import load_weights, refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_llama import make_tiny_llama

from coalm_nemo.checkpoint.convert import import_checkpoint
from coalm_nemo.checkpoint.hf_files import open_weights
from coalm_nemo.checkpoint.rows import FileReader
from coalm_nemo.checkpoint.safetensors_io import PlannedTensor, header_bytes, plan_shards, read_header
from coalm_nemo.models.llama import load_llama_config

INDEX = "model.safetensors.index.json"


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads(path.read_text())
    edit(raw)
    path.write_text(json.dumps(raw))


def edit_weights(hf: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_weights(hf)
    edit(weights)
    save_file(weights, hf / "model.safetensors")


def rewrite_header(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def import_is_refused(hf: Path, sentence: str) -> None:
    with refused(sentence, hf.parent):
        import_checkpoint(hf, hf.parent / "out")


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "hf", num_layers=1)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "hf", num_layers=1, shards=2)


def test_no_weights(single: Path) -> None:
    (single / "model.safetensors").unlink()
    import_is_refused(single, "holds no weights")


def test_pickled_weights(single: Path) -> None:
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    import_is_refused(single, "pickles only")


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_cut_off_file(single: Path, keep: int) -> None:
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    import_is_refused(single, r"model\.safetensors .*(cut off|not a safetensors file|ends at)")


def test_trailing_bytes(single: Path) -> None:
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"x")
    import_is_refused(single, "damaged")


@pytest.mark.parametrize("name", ["../model-00002-of-00002.safetensors", "/etc/passwd", "a/../../x", "..\\x", ""])
def test_index_that_points_outside(sharded: Path, name: str) -> None:
    edit_json(sharded / INDEX, lambda raw: raw["weight_map"].update({"lm_head.weight": name}))
    import_is_refused(sharded, "outside its directory")


def test_symbolic_links_to_shards_are_fine(sharded: Path) -> None:
    store = sharded.parent / "blobs"
    store.mkdir()
    for number, file in enumerate(sorted(sharded.glob("*.safetensors"))):
        file.rename(store / str(number))
        file.symlink_to(store / str(number))
    import_checkpoint(sharded, sharded.parent / "out")


def test_index_that_names_a_missing_file(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    import_is_refused(sharded, "which is missing")


def test_index_that_names_a_missing_tensor(sharded: Path) -> None:
    edit_json(
        sharded / INDEX, lambda raw: raw["weight_map"].update({"ghost.weight": "model-00001-of-00002.safetensors"})
    )
    import_is_refused(sharded, "which does not hold it")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {"a":"x","a":"y"}}'])
def test_index_that_is_not_one(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    import_is_refused(sharded, "index")


def test_tensor_in_two_shards(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))
    tensors = load_file(first)
    save_file({**load_file(second), "model.embed_tokens.weight": tensors["model.embed_tokens.weight"]}, second)
    import_is_refused(sharded, "is both in")


def test_missing_tensor(single: Path) -> None:
    edit_weights(single, lambda w: w.pop("model.layers.0.mlp.up_proj.weight"))
    import_is_refused(single, r"lacks the tensor model\.layers\.0\.mlp\.up_proj\.weight")


def test_wrong_shape(single: Path) -> None:
    edit_weights(single, lambda w: w.update({"model.norm.weight": torch.zeros(63)}))
    import_is_refused(single, r"shape \[63\], but config\.json asks for \[64\]")


def test_unexpected_tensor(single: Path) -> None:
    edit_weights(single, lambda w: w.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(2, 2)}))
    import_is_refused(single, "does not account for")


def test_rotary_buffers_are_ignored(single: Path) -> None:
    edit_weights(single, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))
    import_checkpoint(single, single.parent / "out")


def test_unsupported_dtype(single: Path) -> None:
    edit_weights(single, lambda w: w.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}))
    import_is_refused(single, "dtype I8")


def test_fused_tensors_of_two_dtypes(single: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    edit_weights(single, lambda w: w.update({name: w[name].half()}))
    import_is_refused(single, "convert them to one dtype first")


def test_head_beside_tied_embeddings(tmp_path: Path) -> None:
    hf = make_tiny_llama(tmp_path / "hf", tied=True)
    edit_weights(hf, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    import_checkpoint(hf, tmp_path / "equal")
    edit_weights(hf, lambda w: w["lm_head.weight"].add_(1))
    import_is_refused(hf, "ties the embeddings")


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda h: h["model.norm.weight"].update(data_offsets=[0, 1 << 60]), "cut off"),
        (lambda h: h["model.norm.weight"].update(data_offsets=[8, 4]), "not valid"),
        (lambda h: h["model.norm.weight"].update(data_offsets=[-4, 4]), "not valid"),
        (lambda h: h["model.norm.weight"].update(shape=[63]), "does not fit its shape"),
        (lambda h: h["model.norm.weight"].pop("dtype"), "not valid"),
        (lambda h: h.update({"model.norm.weight": 7}), "not valid"),
    ],
)
def test_bad_header_entries(single: Path, edit: Callable[[dict[str, Any]], object], sentence: str) -> None:
    rewrite_header(single / "model.safetensors", edit)
    import_is_refused(single, sentence)


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff\xfe", b'{"a":1,"a":2}'])
def test_bad_headers(single: Path, text: bytes) -> None:
    (single / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    import_is_refused(single, "header")


def test_open_weights_gives_what_the_library_gives(sharded: Path) -> None:
    cfg = load_llama_config(sharded)
    with FileReader(max_open=1) as reader:
        found = open_weights(sharded, cfg, reader)
        for name, tensor in load_weights(sharded).items():
            data = bytearray(found[name].bytes)
            found[name].open(reader).read_rows(0, memoryview(data))
            assert data == tensor.numpy().tobytes()


def test_shards_are_filled_in_order_and_headers_are_valid(tmp_path: Path) -> None:
    tensors = [
        PlannedTensor("a", "bfloat16", (3,)),
        PlannedTensor("b", "float32", (2, 2)),
        PlannedTensor("c", "float16", (50,)),
    ]
    shards = plan_shards(tensors, 30)
    assert {file: [t.name for t in part] for file, part in shards.items()} == {
        "model-00001-of-00002.safetensors": ["b", "a"],
        "model-00002-of-00002.safetensors": ["c"],
    }
    for file, part in shards.items():
        (tmp_path / file).write_bytes(header_bytes(part) + bytes(sum(t.bytes for t in part)))
        with safe_open(tmp_path / file, "pt") as opened, FileReader() as reader:
            assert set(opened.keys()) == {t.name for t in part} == set(read_header(tmp_path / file, reader))
            assert opened.metadata() == {"format": "pt"}
