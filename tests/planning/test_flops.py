"""FLOPs and parameters against numbers worked out by hand."""

from __future__ import annotations

import pytest

from coalm_nemo.planning.flops import (
    CAUSAL,
    FULL,
    attended_tokens,
    hardware_flops_per_token,
    job_flops_per_token,
    linear_parameters,
    lora_parameters,
    model_flops_per_token,
    model_flops_utilisation,
    published_lora_flops_per_token,
)
from coalm_nemo.planning.job import Job, Layout
from coalm_nemo.planning.shapes import SHAPES


@pytest.mark.parametrize(
    ("name", "parameters"), [("8b", 8_030_261_248), ("70b", 70_553_706_496), ("405b", 405_853_388_800)]
)
def test_shapes_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    assert SHAPES[name].num_parameters() == parameters


@pytest.mark.parametrize(
    ("name", "causal", "full"), [("8b", 51.5e9, 57.9e9), ("70b", 449e9, 481e9), ("405b", 2524e9, 2625e9)]
)
def test_both_countings_at_8192_tokens_are_the_published_ones(name: str, causal: float, full: float) -> None:
    assert model_flops_per_token(SHAPES[name], 8192, CAUSAL) == pytest.approx(causal, rel=2e-3)
    assert model_flops_per_token(SHAPES[name], 8192, FULL) == pytest.approx(full, rel=2e-3)


def test_without_attention_a_token_costs_six_flops_a_weight() -> None:
    """Six for each weight that a token is multiplied with: all but the embedding and the norms."""
    model = SHAPES["8b"]
    multiplied = model.num_layers * linear_parameters(model) + model.vocab_size * model.hidden_size
    assert model_flops_per_token(model, 0) == 6 * multiplied
    norms = (2 * model.num_layers + 1) * model.hidden_size
    assert multiplied == model.num_parameters() - model.vocab_size * model.hidden_size - norms


def test_one_layer_by_hand() -> None:
    """8B: q and o 4096 x 4096, k and v 4096 x 1024, three of 4096 x 14336; attention 4 x 0.5 x s x 4096."""
    assert linear_parameters(SHAPES["8b"]) == 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    more = model_flops_per_token(SHAPES["8b"], 1000) - model_flops_per_token(SHAPES["8b"], 0)
    assert more == 3 * 32 * 4 * 0.5 * 1000 * 4096


def test_packed_rows_count_their_own_squares() -> None:
    lengths = [100, 300, 600]
    attended = attended_tokens(sum(lengths), sum(n * n for n in lengths))
    model = SHAPES["8b"]
    one_by_one = sum(n * model_flops_per_token(model, n) for n in lengths)
    assert sum(lengths) * model_flops_per_token(model, attended) == pytest.approx(one_by_one)


def test_lora_has_no_weight_gradients_but_all_of_attention() -> None:
    model = SHAPES["8b"]
    adapters = lora_parameters(model, 16)
    projections = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096)]
    assert adapters == 16 * sum(i + o for i, o in projections)
    assert lora_parameters(model, 16, "q,v") == 16 * ((4096 + 4096) + (4096 + 1024))
    linear = 32 * 2 * linear_parameters(model) + 2 * 4096 * 128256
    first_qkv = 2 * 4096 * 6144
    expected = 2 * linear - first_qkv + 32 * (3 * 2 * 4096 * 4096 * 0.5 * 2 + 3 * 2 * adapters)
    assert model_flops_per_token(model, 4096, CAUSAL, "lora", adapters) == pytest.approx(expected)
    assert published_lora_flops_per_token(model, 0) == pytest.approx(2 * linear)
    assert lora_parameters(model, 16, "qkv") == 16 * (4096 + 6144)


def test_recomputation_is_hardware_work_only() -> None:
    job = Job(SHAPES["8b"], 8, 8, task="pretrain")
    none, selective, full = (hardware_flops_per_token(job, Layout(recompute=r)) for r in ("none", "selective", "full"))
    assert job_flops_per_token(job) < none < selective < full
    layers = 32 * (2 * linear_parameters(job.model) + 0.5 * 4 * 4096 * 4096)
    assert full - none == pytest.approx(layers)


def test_mfu_of_the_record_405b_run() -> None:
    """334.5 tokens/s/GPU are 841 TFLOP/s and 42.5 % of the FP8 peak, counted causal."""
    job = Job(SHAPES["405b"], 512, 1152, 8192, "pretrain")
    assert model_flops_utilisation(job, 334.5) == pytest.approx(0.425, abs=0.003)
