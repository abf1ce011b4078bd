from __future__ import annotations

import errno
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import load_weights, refused
from safetensors.torch import save_file
from tiny_llama import make_tiny_llama

from coalm_nemo.checkpoint.convert import import_checkpoint
from coalm_nemo.checkpoint.float8 import LARGEST, e4m3_values, to_e4m3
from coalm_nemo.checkpoint.fp8_weight import as_float32, row_scales
from coalm_nemo.checkpoint.mapping import hf_sources, hf_tensors, megatron_slices
from coalm_nemo.checkpoint.quantize import (
    QUANTIZED_KINDS,
    error_table,
    kind_of,
    quantize_directory,
    write_quantized,
)
from coalm_nemo.checkpoint.quantized_files import quantization_config
from coalm_nemo.checkpoint.rows import FileReader, RowBlock
from coalm_nemo.checkpoint.safetensors_io import PlannedTensor
from coalm_nemo.checkpoint.stored_slices import open_slice
from coalm_nemo.checkpoint.streams import ProgressMeter
from coalm_nemo.checkpoint.torch_dist import read_metadata
from coalm_nemo.models.llama import load_llama_config

E4M3 = torch.float8_e4m3fn
SHAPES: dict[str, dict[str, Any]] = {
    "tied_bf16": {"tied": True, "dtype": "bfloat16"},
    "untied_fp32_sharded": {"dtype": "float32", "shards": 3},
    "untied_fp16": {"dtype": "float16", "num_layers": 1},
}


def torch_codes(values: np.ndarray) -> np.ndarray:
    clamped = torch.from_numpy(values.copy()).clamp(-LARGEST, LARGEST)
    return clamped.to(E4M3).view(torch.uint8).numpy()


def test_every_bf16_value_is_rounded_as_torch_rounds_it() -> None:
    values = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    real = ~np.isnan(values)
    assert np.array_equal(to_e4m3(values)[real], torch_codes(values)[real])
    assert set((to_e4m3(values)[~real] & 0x7F).tolist()) == {0x7F}


def test_random_fp32_values_are_rounded_as_torch_rounds_them() -> None:
    rng = np.random.default_rng(0)
    values = (rng.uniform(-500, 500, 200_000) * 2.0 ** rng.integers(-18, 1, 200_000)).astype(np.float32)
    assert np.array_equal(to_e4m3(values), torch_codes(values))


def test_ties_go_to_even_and_what_is_too_large_saturates() -> None:
    given = np.array([1.0625, 1.1875, 2.0**-10, 3 * 2.0**-10, 464, 1e9, -np.inf, -0.0], dtype=np.float32)
    wanted = [1.0, 1.25, 0, 2 * 2.0**-9, 448, 448, -448, -0.0]
    assert e4m3_values()[to_e4m3(given)].tolist() == wanted


def test_the_values_of_all_codes_are_torchs() -> None:
    theirs = torch.arange(256, dtype=torch.uint8).view(E4M3).float().numpy()
    assert np.array_equal(e4m3_values(), theirs, equal_nan=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_elements_are_read_as_torch_reads_them(dtype: str) -> None:
    values = torch.randn(100).to(getattr(torch, dtype))
    data = memoryview(bytearray(values.view(torch.uint8).numpy().tobytes()))
    assert np.array_equal(as_float32(data, dtype), values.float().numpy())


def test_scales_are_what_bf16_holds_and_never_zero() -> None:
    largest = np.array([[0.0], [1e-40], [0.3], [7.0]], dtype=np.float32)
    scales = torch.from_numpy(row_scales(largest))
    assert torch.equal(scales.bfloat16().float(), scales)
    assert bool((scales > 0).all())
    assert torch.allclose(scales[2:], torch.from_numpy(largest[2:] / 448), rtol=2**-8)


@pytest.fixture(params=SHAPES)
def quantized(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    hf = make_tiny_llama(tmp_path / "hf", **SHAPES[request.param])
    quantize_directory(hf, tmp_path / "fp8", max_shard_bytes=60_000)
    return hf, tmp_path / "fp8"


def test_linear_weights_are_within_half_a_step_and_the_rest_is_untouched(quantized: tuple[Path, Path]) -> None:
    before, after = (load_weights(directory) for directory in quantized)
    assert after.keys() == before.keys() | {f"{name}_scale" for name in before if kind_of(name)}
    for name, weight in before.items():
        if kind_of(name) is None:
            assert torch.equal(weight.view(torch.uint8), after[name].view(torch.uint8)), name
            continue
        scale = after[f"{name}_scale"]
        assert after[name].dtype == E4M3
        assert scale.shape == (weight.shape[0], 1)
        assert scale.dtype == (torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32)
        # Half of the last of three bits of mantissa; a row's largest value saturates where its scale was rounded down.
        error = (after[name].float() * scale.float() - weight.float()).abs()
        assert bool((error <= weight.float().abs() / 16 + scale.float() * 2.0**-10).all()), name
        assert float(after[name].float().abs().amax(1).min()) >= 448 * (1 - 2**-4)


def test_shards_index_and_config_are_true(quantized: tuple[Path, Path]) -> None:
    hf, fp8 = quantized
    index = json.loads((fp8 / "model.safetensors.index.json").read_text())
    weights = load_weights(fp8)
    assert index["weight_map"].keys() == weights.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in weights.values())
    assert sorted(set(index["weight_map"].values())) == sorted(p.name for p in fp8.glob("*.safetensors"))
    for name in weights:
        if name.endswith("_scale"):
            assert index["weight_map"][name] == index["weight_map"][name.removesuffix("_scale")]
    config = json.loads((fp8 / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert config == json.loads((hf / "config.json").read_text())
    assert (fp8 / "tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()


def test_straight_from_a_megatron_checkpoint(tmp_path: Path) -> None:
    """An export quantises without a bf16 directory in between: the same bytes, from rows that lie in another order."""
    hf = make_tiny_llama(tmp_path / "hf", dtype="bfloat16", num_heads=8, num_kv_heads=4)
    import_checkpoint(hf, tmp_path / "ckpt")
    quantize_directory(hf, tmp_path / "through_hf")
    cfg, keys = load_llama_config(hf), read_metadata(tmp_path / "ckpt")
    shapes = {t.name: t.shape for t in hf_tensors(cfg)}
    with FileReader() as reader:
        slices = {(p.key, p.layer): open_slice(reader, tmp_path / "ckpt", keys, p) for p in megatron_slices(cfg)}
        tensors = {
            name: (
                PlannedTensor(name, "bfloat16", shapes[name]),
                [RowBlock(slices[b.key, b.layer], b.row, b.rows) for b in blocks],
            )
            for name, blocks in hf_sources(cfg).items()
        }
        (tmp_path / "straight").mkdir()
        write_quantized(tmp_path / "straight", tensors, ProgressMeter(0, None), buffer_size=1 << 16)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("through_hf", "straight")]
    assert files[0] == files[1]


def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path) -> None:
    hf = make_tiny_llama(tmp_path / "hf", dtype="bfloat16", num_layers=4)
    reports = [quantize_directory(hf, tmp_path / str(n), max_shard_bytes=40_000, workers=n) for n in (1, 3)]
    one, other = ({p.name: p.read_bytes() for p in (tmp_path / str(n)).iterdir()} for n in (1, 3))
    assert one == other
    assert reports[0].errors == reports[1].errors


def test_the_report_says_what_was_lost(tmp_path: Path) -> None:
    hf = make_tiny_llama(tmp_path / "hf", dtype="bfloat16")
    report = quantize_directory(hf, tmp_path / "fp8")
    before, after = load_weights(hf), load_weights(tmp_path / "fp8")
    assert len(report.errors) == 2 * len(QUANTIZED_KINDS)
    for error in report.errors:
        weight = before[error.name].double()
        difference = after[error.name].double() * after[f"{error.name}_scale"].double() - weight
        assert error.relative_frobenius == pytest.approx(float(difference.norm() / weight.norm()), rel=1e-4)
        assert error.max_abs == pytest.approx(float(difference.abs().max()), rel=1e-4)
        assert 0.015 < error.relative_frobenius < 0.035
    assert len(list(error_table(report.errors))) == 2 + len(QUANTIZED_KINDS)
    assert report.bytes_after == sum(t.numel() * t.element_size() for t in after.values())


def test_zero_rows_stay_zero(tmp_path: Path) -> None:
    hf = make_tiny_llama(tmp_path / "hf", num_layers=1)
    weights = load_weights(hf)
    weights["model.layers.0.mlp.up_proj.weight"][3] = 0
    save_file(weights, hf / "model.safetensors")
    quantize_directory(hf, tmp_path / "fp8")
    assert not load_weights(tmp_path / "fp8")["model.layers.0.mlp.up_proj.weight"].float()[3].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    hf = make_tiny_llama(tmp_path / "hf", num_layers=1)
    weights = load_weights(hf)
    weights["model.layers.0.self_attn.k_proj.weight"][1, 2] = value
    save_file(weights, hf / "model.safetensors")
    with refused(r"k_proj\.weight holds a value that is not finite", tmp_path):
        quantize_directory(hf, tmp_path / "fp8")


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = make_tiny_llama(tmp_path / "hf")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("coalm_nemo.checkpoint.quantize.write_index", full)
    with refused("the disk is full", tmp_path):
        quantize_directory(hf, tmp_path / "fp8")


def test_widths_that_no_kernel_takes_are_refused(tmp_path: Path) -> None:
    hf = make_tiny_llama(tmp_path / "hf", ffn_size=100, num_layers=1)
    with refused("multiples of 16; keep this model in bf16", tmp_path):
        quantize_directory(hf, tmp_path / "fp8")


def test_a_quantised_model_is_not_quantised_again(tmp_path: Path) -> None:
    hf = make_tiny_llama(tmp_path / "hf", num_layers=1)
    quantize_directory(hf, tmp_path / "fp8")
    with refused("describes a quantised checkpoint", tmp_path):
        quantize_directory(tmp_path / "fp8", tmp_path / "again")


def test_the_table_has_a_line_a_kind_of_weight(tmp_path: Path) -> None:
    hf = make_tiny_llama(tmp_path / "hf", num_layers=1)
    report = quantize_directory(hf, tmp_path / "one")
    assert "| down_proj | 1 |" in "\n".join(error_table(report.errors))
    assert len(report.errors) == len(QUANTIZED_KINDS)


needs_compressed_tensors = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="needs the package compressed-tensors"
)


@needs_compressed_tensors
def test_compressed_tensors_takes_the_config_as_its_own() -> None:
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

    read = QuantizationConfig.model_validate(quantization_config())
    group, preset = read.config_groups["group_0"], preset_name_to_scheme("FP8_DYNAMIC", ["Linear"])
    assert (group.weights, group.input_activations) == (preset.weights, preset.input_activations)
    assert read.format == "float-quantized"


@needs_compressed_tensors
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_what_was_written(tmp_path: Path, dtype: str) -> None:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    hf = make_tiny_llama(tmp_path / "hf", dtype=dtype)
    quantize_directory(hf, tmp_path / "fp8")
    ids = torch.arange(8, 40).reshape(2, 16)
    plain = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    expected = load_weights(tmp_path / "fp8")
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if kind_of(name):
                scale = expected[f"{name}_scale"]  # compressed-tensors multiplies in the scale's dtype
                parameter.copy_(expected[name].to(scale.dtype) * scale)
        wanted = plain(ids).logits
        dense = AutoModelForCausalLM.from_pretrained(
            tmp_path / "fp8", dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
        )
        assert torch.equal(dense(ids).logits, wanted)
        simulated = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.float32)
        assert simulated.model.layers[0].mlp.up_proj.weight.dtype == E4M3
        difference = (simulated(ids).logits - wanted).abs().max()
        assert 0 < difference < 0.1 * wanted.abs().max()  # activations are rounded too
