from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import load_weights, refused
from safetensors.torch import save_file
from tiny_llama import make_tiny_llama

from coalm_nemo.checkpoint.command import verify_command
from coalm_nemo.checkpoint.convert import export_checkpoint, import_checkpoint
from coalm_nemo.checkpoint.verify import verify_checkpoint


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """An HF directory and the checkpoint made of it."""
    hf = make_tiny_llama(tmp_path / "hf", dtype="bfloat16")
    import_checkpoint(hf, tmp_path / "ckpt")
    return hf, tmp_path / "ckpt"


def test_equal_weights_are_equal(pair: tuple[Path, Path]) -> None:
    report = verify_checkpoint(*pair, max_memory_bytes=1 << 20)
    assert report.ok
    assert set(report.equal) == set(load_weights(pair[0]))


def test_one_changed_element_is_found(pair: tuple[Path, Path]) -> None:
    weights = load_weights(pair[0])
    name = "model.layers.1.self_attn.k_proj.weight"
    weights[name][3, 5] += 0.5
    save_file(weights, pair[0] / "model.safetensors")
    report = verify_checkpoint(*pair)
    assert [d.name for d in report.different] == [name]
    assert report.different[0].max_abs_difference == pytest.approx(0.5, abs=1e-2)
    assert len(report.equal) == len(weights) - 1


def test_not_a_number_and_negative_zero_count(pair: tuple[Path, Path]) -> None:
    weights = load_weights(pair[0])
    weights["model.norm.weight"][0] = float("nan")
    weights["lm_head.weight"][0, 0] = 0.0
    save_file(weights, pair[0] / "model.safetensors")
    found = {d.name: d.max_abs_difference for d in verify_checkpoint(*pair).different}
    assert found["model.norm.weight"] != found["model.norm.weight"]
    assert "lm_head.weight" in found


def test_another_dtype_is_a_difference(pair: tuple[Path, Path], tmp_path: Path) -> None:
    export_checkpoint(pair[1], tmp_path / "fp32", dtype="fp32")
    report = verify_checkpoint(tmp_path / "fp32", pair[1])
    assert len(report.different) == len(load_weights(pair[0]))
    assert all(d.max_abs_difference == 0.0 and "float32" in d.reason for d in report.different)


def test_a_missing_tensor_is_listed(pair: tuple[Path, Path], tmp_path: Path) -> None:
    deeper = make_tiny_llama(tmp_path / "deeper", dtype="bfloat16", num_layers=3)
    report = verify_checkpoint(deeper, pair[1])
    assert not report.ok
    assert "model.layers.2.mlp.up_proj.weight" in report.missing


def test_a_torn_checkpoint_is_refused(pair: tuple[Path, Path]) -> None:
    file = pair[1] / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])
    with refused("torn"):
        verify_checkpoint(*pair)


def test_a_corrupt_item_is_refused_even_without_a_manifest(pair: tuple[Path, Path]) -> None:
    (pair[1] / "manifest.json").unlink()
    file = pair[1] / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])
    with refused("ends at byte"):
        verify_checkpoint(*pair)


def test_the_wrong_directory_is_refused(pair: tuple[Path, Path]) -> None:
    with refused("not a Megatron distributed checkpoint"):
        verify_checkpoint(pair[0], pair[0])
    (pair[0] / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with refused("only Llama"):
        verify_checkpoint(*pair)


# Each directory alone, against the checksums that were taken when it was written.


@pytest.fixture
def exported(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    export_checkpoint(pair[1], tmp_path / "exported")
    return tmp_path / "exported"


def test_a_checkpoint_and_an_export_can_be_checked_alone(
    pair: tuple[Path, Path], exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify_command(None, pair[1], False, False) == 0
    assert verify_command(exported, None, False, True) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "files" in lines[0] and "have the SHA-256 that manifest.json lists" in lines[0]
    assert json.loads("".join(lines[1:]))["ok"] is True


def test_every_damaged_file_is_listed(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray((exported / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (exported / "model.safetensors").write_bytes(content)
    (exported / "config.json").unlink()
    (exported / "tokenizer.json").write_text("{}")
    assert verify_command(exported, None, False, True) == 1
    report = json.loads(capsys.readouterr().out)
    assert sorted(p.rsplit("/", 1)[-1].split()[0] for p in report["problems"]) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert verify_command(exported, None, False, False) == 1
    assert "model.safetensors is corrupt" in capsys.readouterr().out


def test_without_checksums_or_directories_it_says_what_to_give(pair: tuple[Path, Path]) -> None:
    with refused("has no coalm_manifest.json"):
        verify_command(pair[0], None, True, False)
    with refused("give --hf and --ckpt"):
        verify_command(None, None, True, False)
