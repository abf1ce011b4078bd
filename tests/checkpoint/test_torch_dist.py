from __future__ import annotations

import io
import json
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import megatron_worker
import pytest
import torch
from helpers import assert_same_weights, refused
from tiny_llama import make_tiny_llama
from torch.distributed.checkpoint import FileSystemReader

from coalm_nemo.checkpoint import torch_pickle, torch_zip
from coalm_nemo.checkpoint.convert import export_checkpoint, import_checkpoint
from coalm_nemo.checkpoint.rows import FileReader, FileRows, RowBlock
from coalm_nemo.checkpoint.torch_dist import TorchDistPlan, read_metadata

MODELS: dict[str, dict[str, Any]] = {
    "tied": {"tied": True, "dtype": "bfloat16", "vocab_size": 335},
    "untied": {"dtype": "float32", "num_heads": 6, "num_kv_heads": 2, "head_dim": 24, "vocab_size": 333},
}


def round_trip_through_megatron(
    tmp_path: Path, patch: pytest.MonkeyPatch, world_size: int, layouts: list[tuple[int, int]], option: dict[str, Any]
) -> None:
    """Import, let megatron-core load and save at every layout, export what it saved: bit-equal."""
    jobs: list[megatron_worker.Job] = []
    for name, shape in MODELS.items():
        hf = make_tiny_llama(tmp_path / name / "hf", **shape)
        with patch.context() as small:
            small.setattr("coalm_nemo.checkpoint.import_hf.MAX_CHUNK_BYTES", 10_000)
            import_checkpoint(hf, tmp_path / name / "ckpt")
        for tensor, pipeline in layouts:
            target = tmp_path / name / f"saved_tp{tensor}_pp{pipeline}"
            jobs.append((tensor, pipeline, hf, tmp_path / name / "ckpt", target, option))
    megatron_worker.spawn(world_size, jobs, tmp_path / "rendezvous")
    for *_, hf, _, target, _ in jobs:
        keys = read_metadata(target)
        assert any(key.startswith("optimizer.") for key in keys)
        assert ("decoder.layers.0.mlp.linear_fc1.weight_w" in keys) is bool(option.get("singleton_local_shards"))
        export_checkpoint(target, target.with_suffix(".hf"), hf_base=hf, max_memory_bytes=1 << 20)
        assert_same_weights(hf, target.with_suffix(".hf"))


@pytest.mark.slow
@pytest.mark.parametrize("option", [{}, {"singleton_local_shards": True}], ids=["layer_axis", "numbered_layers"])
def test_megatron_loads_and_saves_in_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: dict[str, Any]
) -> None:
    round_trip_through_megatron(tmp_path, monkeypatch, 1, [(1, 1)], option)


@pytest.mark.slow
def test_megatron_loads_and_saves_cut_by_tensor_and_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TP2 pads the odd vocabularies; the padding is not exported."""
    round_trip_through_megatron(tmp_path, monkeypatch, 2, [(2, 1), (1, 2)], {})


@pytest.mark.slow
def test_numbered_layers_cut_by_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    round_trip_through_megatron(tmp_path, monkeypatch, 2, [(2, 1)], {"singleton_local_shards": True})


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    import_checkpoint(make_tiny_llama(tmp_path / "hf", num_layers=1), tmp_path / "ckpt")
    (tmp_path / "ckpt/manifest.json").unlink()  # else it finds every fault first
    return tmp_path / "ckpt"


def export_is_refused(ckpt: Path, sentence: str) -> None:
    with refused(sentence, ckpt.parent):
        export_checkpoint(ckpt, ckpt.parent / "back")


def test_torch_reads_the_metadata_and_every_item(ckpt: Path) -> None:
    """torch.distributed.checkpoint's own classes come out, and torch.load takes each item with weights_only."""
    metadata = FileSystemReader(ckpt).read_metadata()
    assert type(metadata).__module__ == "torch.distributed.checkpoint.metadata"
    shape = metadata.state_dict_metadata["decoder.layers.mlp.linear_fc1.weight"].size
    assert isinstance(shape, torch.Size)
    assert tuple(shape) == (1, 192, 64)
    for index, info in metadata.storage_data.items():
        item = (ckpt / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        value = torch.load(io.BytesIO(item), weights_only=True)
        assert value == [None] if index.offset is None else value.is_contiguous()
    assert torch.load(ckpt / "common.pt", weights_only=True) == {}


def test_megatron_and_we_describe_the_same_keys(ckpt: Path) -> None:
    backend = json.loads((ckpt / "metadata.json").read_text())
    assert backend == {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    assert len(read_metadata(ckpt)) == 9


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("this must never be printed",))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_runs_code_is_refused(ckpt: Path, capsys: pytest.CaptureFixture[str], protocol: int) -> None:
    (ckpt / ".metadata").write_bytes(pickle.dumps(Evil(), protocol))
    export_is_refused(ckpt, r"asks for \S+\.print, which no checkpoint needs")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["torch\nload", "os\nsystem", "torch.distributed.checkpoint.metadata\nos.system"])
def test_only_inert_names_are_known(name: str) -> None:
    with refused("asks for"):
        torch_pickle.loads(f"c{name}\n(S'x'\ntR.".encode(), "x")


def test_a_pickle_inside_an_item_is_not_trusted_either(ckpt: Path) -> None:
    chunk = read_metadata(ckpt)["embedding.word_embeddings.weight"].chunks[0]
    content = chunk.path.read_bytes()
    item = content[chunk.item_offset : chunk.item_offset + chunk.item_bytes]
    with zipfile.ZipFile(io.BytesIO(item)) as archive:
        good = archive.read("archive/data.pkl")
    evil = good.replace(b"ctorch._utils", b"ctorch._evils")
    checksums = [zlib.crc32(pickled).to_bytes(4, "little") for pickled in (good, evil)]
    item = item.replace(good, evil).replace(*checksums)
    chunk.path.write_bytes(content[: chunk.item_offset] + item + content[chunk.item_offset + chunk.item_bytes :])
    export_is_refused(ckpt, "asks for torch._evils")


@pytest.mark.parametrize("keep", [0, 1, 100, -2])
def test_damaged_metadata(ckpt: Path, keep: int) -> None:
    (ckpt / ".metadata").write_bytes((ckpt / ".metadata").read_bytes()[:keep])
    export_is_refused(ckpt, r"\.metadata is damaged")


@pytest.mark.parametrize("value", [None, 3, {}, [1]])
def test_metadata_that_is_something_else(ckpt: Path, value: object) -> None:
    (ckpt / ".metadata").write_bytes(pickle.dumps(value))
    export_is_refused(ckpt, r"\.metadata is damaged")


@pytest.mark.parametrize("missing", [".metadata", "metadata.json", "__0_0.distcp"])
def test_missing_files(ckpt: Path, missing: str) -> None:
    (ckpt / missing).unlink()
    export_is_refused(ckpt, "cannot be read")


def test_another_backend(ckpt: Path) -> None:
    (ckpt / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    export_is_refused(ckpt, "'zarr'; only 'torch_dist'")


def test_cut_off_data(ckpt: Path) -> None:
    file = ckpt / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-200])
    export_is_refused(ckpt, "ends at byte")


def test_overwritten_item(ckpt: Path) -> None:
    file = ckpt / "__0_0.distcp"
    file.write_bytes(bytes(file.stat().st_size))
    export_is_refused(ckpt, "is damaged")


def edit_metadata(ckpt: Path, old: bytes, new: bytes) -> None:
    content = (ckpt / ".metadata").read_bytes()
    assert old in content and len(old) == len(new)
    (ckpt / ".metadata").write_bytes(content.replace(old, new))


def test_files_outside_the_checkpoint(ckpt: Path) -> None:
    edit_metadata(ckpt, b"__0_0.distcp", b"../../distcp")
    export_is_refused(ckpt, "outside the checkpoint")


def test_the_dtype_of_the_metadata_must_be_true(ckpt: Path) -> None:
    edit_metadata(ckpt, b"ctorch\nfloat32\n", b"ctorch\nfloat16\n")
    export_is_refused(ckpt, "the metadata says float16")


def write_chunks(directory: Path, boxes: list[tuple[tuple[int, int], tuple[int, int]]]) -> None:
    (directory / "zeros").write_bytes(bytes(4096))
    plan = TorchDistPlan()
    with FileReader() as reader:
        for offsets, sizes in boxes:
            rows = FileRows(reader, directory / "zeros", 0, "float32", sizes[1] * 4)
            block = RowBlock(rows, 0, sizes[0])
            plan.add_chunk("embedding.word_embeddings.weight", "float32", (4, 8), offsets, sizes, (block,))
        for file in plan.files():
            content = b"".join(item.head + bytes(item.data_bytes) + item.tail for item in file.items)
            (directory / file.name).write_bytes(content)
    plan.write_metadata(directory)


@pytest.mark.parametrize(
    "boxes",
    [
        [((0, 0), (3, 8))],
        [((0, 0), (2, 8)), ((1, 0), (2, 8))],
        [((0, 0), (2, 8)), ((2, 4), (2, 8))],
        [((0, 0), (4, 4)), ((0, 4), (4, 3))],
    ],
    ids=["short", "overlapping", "outside", "narrow"],
)
def test_chunks_must_tile_the_tensor(tmp_path: Path, boxes: list[Any]) -> None:
    from coalm_nemo.checkpoint.chunked_rows import ChunkedRows

    write_chunks(tmp_path, boxes)
    stored = read_metadata(tmp_path)["embedding.word_embeddings.weight"]
    with FileReader() as reader, refused("exactly once"):
        ChunkedRows(reader, "x", stored, (4, 8), None)


def test_a_chunk_of_too_few_rows_is_a_bug() -> None:
    with FileReader() as reader, pytest.raises(ValueError, match="32 bytes for a chunk of 64"):
        block = RowBlock(FileRows(reader, Path("x"), 0, "float32", 32), 0, 1)
        TorchDistPlan().add_chunk("key", "float32", (2, 8), (0, 0), (2, 8), (block,))


def test_torch_reads_a_frame() -> None:
    frame = torch_zip.tensor_frame("float32", (2, 2), 16)
    assert len(frame.head) % 64 == 0
    value = torch.load(io.BytesIO(frame.head + bytes(16) + frame.tail), weights_only=True)
    assert torch.equal(value, torch.zeros(2, 2))


@pytest.mark.parametrize("value", [None, True, 0, -1, 2**31, 2**40, -(2**70), "é", (1, (2,)), [], {"a": [1]}])
def test_pickles_that_we_write_are_pickles(value: object) -> None:
    assert pickle.loads(torch_pickle.dumps(value)) == value
    assert torch_pickle.loads(pickle.dumps(value), "x") == value
