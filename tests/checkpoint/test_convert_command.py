"""`coalm convert` as it is typed: inspect, a dry run, FP8 export, the model card and the checksums of an export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coalm_nemo.errors import EXIT_USER_ERROR
from tests.run_coalm import coalm


@pytest.fixture
def megatron(tiny_llama: Path, tmp_path: Path) -> Path:
    assert coalm("convert", "import", "--hf", tiny_llama, "--out", tmp_path / "ckpt") == 0
    return tmp_path / "ckpt"


def test_inspect_both_kinds(megatron: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert coalm("convert", "inspect", megatron) == 0
    assert "train as:" in capsys.readouterr().out
    for path in (megatron, tiny_llama):
        assert coalm("convert", "inspect", path, "--json") == 0
        assert "164416" in capsys.readouterr().out.replace(",", "")
    assert coalm("convert", "inspect", megatron.parent) == EXIT_USER_ERROR


def test_a_dry_run_writes_nothing(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert coalm("convert", "import", "--hf", tiny_llama, "--out", tmp_path / "out", "--dry-run") == 0
    assert "decoder.layers.self_attention.linear_qkv.weight" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_an_export_has_a_card_and_checksums(megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert coalm("convert", "export", "--ckpt", megatron, "--out", tmp_path / "hf") == 0
    assert (tmp_path / "hf" / "README.md").read_text().startswith("---\n")
    assert coalm("convert", "verify", "--hf", tmp_path / "hf") == 0
    weights = tmp_path / "hf" / "model.safetensors"
    spoiled = bytearray(weights.read_bytes())
    spoiled[-1] ^= 1
    weights.write_bytes(spoiled)
    assert coalm("convert", "verify", "--hf", tmp_path / "hf") == 1
    assert "model.safetensors" in capsys.readouterr().out


def test_fp8_export(megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert coalm("convert", "export", "--ckpt", megatron, "--out", tmp_path / "fp8", "--quantize", "fp8") == 0
    assert "q_proj" in capsys.readouterr().err
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert coalm("convert", "verify", "--hf", tmp_path / "fp8") == 0
    assert (
        coalm("convert", "export", "--ckpt", megatron, "--out", tmp_path / "no", "--quantize", "int4")
        == EXIT_USER_ERROR
    )
    assert not (tmp_path / "no").exists()
