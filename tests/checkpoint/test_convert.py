from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SHAPES, assert_same_weights, load_weights, refused
from tiny_llama import SPECIAL_TOKENS, make_tiny_llama

from coalm_nemo.checkpoint import layout
from coalm_nemo.checkpoint.convert import export_checkpoint, import_checkpoint
from coalm_nemo.checkpoint.verify import verify_checkpoint


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_round_trip_is_bit_equal(tmp_path: Path, shape: dict[str, Any]) -> None:
    hf = make_tiny_llama(tmp_path / "hf", **shape)
    report = import_checkpoint(hf, tmp_path / "ckpt")
    back = export_checkpoint(tmp_path / "ckpt", tmp_path / "back")
    assert_same_weights(hf, tmp_path / "back")
    weights = load_weights(hf)
    assert report.tensors == back.tensors == len(weights)
    assert report.weight_bytes == back.weight_bytes == sum(t.numel() * t.element_size() for t in weights.values())
    assert report.dtype == back.dtype == shape.get("dtype", "float32")
    assert verify_checkpoint(tmp_path / "back", tmp_path / "ckpt").ok
    layout.check_manifest(tmp_path / "ckpt", full=True)
    assert layout.read_info(tmp_path / "ckpt").dtype == report.dtype


def test_small_buffers_chunks_and_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors larger than every limit are cut into pieces; the result does not change."""
    monkeypatch.setattr("coalm_nemo.checkpoint.import_hf.MAX_CHUNK_BYTES", 5000)
    monkeypatch.setattr("coalm_nemo.checkpoint.rows._SMALLEST_BUFFER_BYTES", 100)
    monkeypatch.setattr(
        "coalm_nemo.checkpoint.torch_dist.TorchDistPlan.__init__.__kwdefaults__", {"max_file_bytes": 60_000}
    )
    hf = make_tiny_llama(tmp_path / "hf", dtype="bfloat16", num_heads=9, num_kv_heads=3, hidden_size=72)
    import_checkpoint(hf, tmp_path / "ckpt", max_memory_bytes=4000)
    assert len(list((tmp_path / "ckpt").glob("*.distcp"))) > 3
    export_checkpoint(tmp_path / "ckpt", tmp_path / "back", max_memory_bytes=4000, max_shard_bytes=50_000)
    assert_same_weights(hf, tmp_path / "back")
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    weights = load_weights(hf)
    assert set(index["weight_map"]) == set(weights)
    assert set(index["weight_map"].values()) == {p.name for p in (tmp_path / "back").glob("*.safetensors")}
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in weights.values())


@pytest.mark.parametrize("option", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_export_in_another_dtype_rounds_as_torch_does(tmp_path: Path, stored: str, option: str) -> None:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[option]
    hf = make_tiny_llama(tmp_path / "hf", dtype=stored, num_layers=1)
    import_checkpoint(hf, tmp_path / "ckpt")
    report = export_checkpoint(tmp_path / "ckpt", tmp_path / "back", dtype=option, max_memory_bytes=1 << 20)
    exported = load_weights(tmp_path / "back")
    for name, tensor in load_weights(hf).items():
        assert torch.equal(exported[name], tensor.to(dtype)), name
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == report.dtype == str(dtype).removeprefix("torch.")


def test_a_weight_too_large_for_the_dtype_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    hf = make_tiny_llama(tmp_path / "hf", dtype="bfloat16")
    weights = load_weights(hf)
    weights["model.norm.weight"][0] = 1e5
    save_file(weights, hf / "model.safetensors")
    import_checkpoint(hf, tmp_path / "ckpt")
    with refused("too large for float16", tmp_path):
        export_checkpoint(tmp_path / "ckpt", tmp_path / "back", dtype="fp16")


def test_norms_of_their_own_dtype_keep_it(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    hf = make_tiny_llama(tmp_path / "hf", dtype="bfloat16")
    weights = {n: t.float() if t.ndim == 1 else t for n, t in load_weights(hf).items()}
    save_file(weights, hf / "model.safetensors")
    assert import_checkpoint(hf, tmp_path / "ckpt").dtype == "mixed"
    export_checkpoint(tmp_path / "ckpt", tmp_path / "back")
    assert_same_weights(hf, tmp_path / "back")


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the weather in Paris?"},
    {"role": "assistant", "content": "Rain."},
]


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_the_export(tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = make_tiny_llama(tmp_path / "hf", tied=tied, dtype="bfloat16", vocab_size=500)
    import_checkpoint(hf, tmp_path / "ckpt")
    export_checkpoint(tmp_path / "ckpt", tmp_path / "back", max_shard_bytes=100_000)
    ours, theirs = (AutoTokenizer.from_pretrained(d) for d in (tmp_path / "back", hf))
    rendered = [t.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True) for t in (ours, theirs)]
    assert rendered[0] == rendered[1]
    assert rendered[0].startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>")
    ids = ours(rendered[0], add_special_tokens=False, return_tensors="pt").input_ids
    models = [AutoModelForCausalLM.from_pretrained(d, dtype="auto") for d in (tmp_path / "back", hf)]
    assert models[0].dtype == torch.bfloat16
    assert models[0].config.tie_word_embeddings is tied
    assert torch.equal(models[0](ids).logits, models[1](ids).logits)
    names = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    assert models[0].generation_config.eos_token_id == sorted(ours.convert_tokens_to_ids(list(names)))


def test_all_end_ids_are_written_and_earlier_ones_kept(tmp_path: Path) -> None:
    hf = make_tiny_llama(tmp_path / "hf")
    (hf / "generation_config.json").write_text(json.dumps({"eos_token_id": [7], "temperature": 0.6}))
    (hf / "LICENSE").write_text("licence")
    import_checkpoint(hf, tmp_path / "ckpt")
    export_checkpoint(tmp_path / "ckpt", tmp_path / "back")
    written = json.loads((tmp_path / "back/generation_config.json").read_text())
    first = 320 - len(SPECIAL_TOKENS)
    by_name = [first + SPECIAL_TOKENS.index(n) for n in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    assert set(written["eos_token_id"]) == {7, *by_name}
    assert written["temperature"] == 0.6
    assert (tmp_path / "back/LICENSE").read_text() == "licence"


def test_a_tokenizer_without_such_tokens_adds_none(tmp_path: Path) -> None:
    hf = make_tiny_llama(tmp_path / "hf")
    tokenizer = json.loads((hf / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = []
    (hf / "tokenizer.json").write_text(json.dumps(tokenizer))
    (hf / "generation_config.json").unlink()
    import_checkpoint(hf, tmp_path / "ckpt")
    export_checkpoint(tmp_path / "ckpt", tmp_path / "back")
    config = json.loads((hf / "config.json").read_text())
    written = json.loads((tmp_path / "back/generation_config.json").read_text())
    assert written["eos_token_id"] == config["eos_token_id"]


def test_without_side_files_a_base_is_asked_for(tmp_path: Path) -> None:
    import shutil

    hf = make_tiny_llama(tmp_path / "hf")
    import_checkpoint(hf, tmp_path / "ckpt")
    shutil.rmtree(tmp_path / "ckpt/hf")
    (tmp_path / "ckpt/manifest.json").unlink()
    with refused("--hf-base", tmp_path):
        export_checkpoint(tmp_path / "ckpt", tmp_path / "back")
    export_checkpoint(tmp_path / "ckpt", tmp_path / "back", hf_base=hf)
    assert_same_weights(hf, tmp_path / "back")


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"num_layers": 1}, "shape"),
        ({"num_layers": 3}, "shape"),
        ({"tied": True}, "output_layer.weight, which its config.json does not account for"),
        ({"hidden_size": 32}, "shape"),
        ({"vocab_size": 400}, "shape"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path: Path, other: dict[str, Any], sentence: str) -> None:
    import_checkpoint(make_tiny_llama(tmp_path / "hf"), tmp_path / "ckpt")
    wrong = make_tiny_llama(tmp_path / "wrong", **other)
    with refused(sentence, tmp_path):
        export_checkpoint(tmp_path / "ckpt", tmp_path / "back", hf_base=wrong)


def test_a_checkpoint_without_output_layer_is_refused_for_an_untied_model(tmp_path: Path) -> None:
    import_checkpoint(make_tiny_llama(tmp_path / "hf", tied=True), tmp_path / "ckpt")
    with refused("lacks output_layer.weight", tmp_path):
        export_checkpoint(tmp_path / "ckpt", tmp_path / "b", hf_base=make_tiny_llama(tmp_path / "hf", tied=False))


def test_bad_arguments(tmp_path: Path) -> None:
    hf = make_tiny_llama(tmp_path / "hf")
    import_checkpoint(hf, tmp_path / "ckpt")
    with refused("'int3' is not known", tmp_path):
        export_checkpoint(tmp_path / "ckpt", tmp_path / "back", dtype="int3")
    with refused("memory ceiling", tmp_path):
        import_checkpoint(hf, tmp_path / "out", max_memory_bytes=10)
    with refused("not empty", tmp_path):
        import_checkpoint(hf, tmp_path / "ckpt")
    with refused("not a directory", tmp_path):
        import_checkpoint(tmp_path / "nothing", tmp_path / "out")
    with refused("not a directory", tmp_path):
        export_checkpoint(tmp_path / "nothing", tmp_path / "out", hf_base=hf)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    from coalm_nemo.checkpoint.streams import HashingFile

    hf = make_tiny_llama(tmp_path / "hf")
    import_checkpoint(hf, tmp_path / "ckpt")
    write = HashingFile.write

    def failing(self: HashingFile, data: bytes | memoryview) -> None:
        if self.position > 50_000:
            raise OSError(code, os.strerror(code))
        write(self, data)

    monkeypatch.setattr(HashingFile, "write", failing)
    with refused("could not be written", tmp_path):
        import_checkpoint(hf, tmp_path / "out")
    with refused("could not be written", tmp_path):
        export_checkpoint(tmp_path / "ckpt", tmp_path / "back")


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = make_tiny_llama(tmp_path / "hf")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("coalm_nemo.checkpoint.layout.shutil.disk_usage", lambda _: usage)
    with refused("1 kB free", tmp_path):
        import_checkpoint(hf, tmp_path / "out")


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    hf = make_tiny_llama(tmp_path / "hf")
    calls: list[tuple[int, int]] = []
    report = import_checkpoint(hf, tmp_path / "ckpt", progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (report.weight_bytes, report.weight_bytes)
    assert calls == sorted(calls)
