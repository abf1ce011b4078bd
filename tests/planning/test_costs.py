"""Time: what must make a step longer does, and by how much where that can be said."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coalm_nemo.planning.constants import PRIOR, RANGES, Constants, fitted
from coalm_nemo.planning.costs import LAUNCH_FLOOR_S, layer_time, step_time
from coalm_nemo.planning.estimate import estimate
from coalm_nemo.planning.hardware import GPUS
from coalm_nemo.planning.job import COALM_IT_TOKENS, Job, Layout
from coalm_nemo.planning.shapes import SHAPES

JOB = Job(SHAPES["70b"], 64, 128, 8192, "pretrain")
LAYOUT = Layout(tensor=4, pipeline=8, virtual_pipeline=5)


def test_matrix_products_by_hand() -> None:
    """8192 tokens, forward and twice that backward, over 4 ranks, at the fitted share of the peak."""
    weights = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672
    expected = 3 * 2 * weights * 8192 / 4 / (1978.9e12 * PRIOR.gemm_fp8)
    assert layer_time(JOB, LAYOUT, PRIOR).linear == pytest.approx(expected)


def test_fp8_speeds_up_matrix_products_only() -> None:
    eight, sixteen = (layer_time(replace(JOB, precision=p), LAYOUT, PRIOR) for p in ("fp8", "bf16"))
    assert eight.linear < sixteen.linear
    assert eight.attention == sixteen.attention
    assert eight.elementwise > sixteen.elementwise


def test_recomputation_adds_a_forward_pass() -> None:
    plain, full = (step_time(JOB, replace(LAYOUT, recompute=r), PRIOR) for r in ("none", "full"))
    assert full.linear == pytest.approx(plain.linear * 4 / 3)
    assert full.total > plain.total


def test_lora_is_faster_than_full_training_and_slower_on_every_layer_than_on_qkv() -> None:
    job = Job(SHAPES["8b"], 8, 32)
    full, qkv, every = (
        estimate(replace(job, task=task, lora_targets=targets), Layout()).tokens_per_s_per_gpu
        for task, targets in (("sft", "all"), ("lora", "qkv"), ("lora", "all"))
    )
    assert full < every < qkv < 1.5 * full


def test_more_chunks_trade_the_bubble_for_passes() -> None:
    one, five = (step_time(JOB, replace(LAYOUT, virtual_pipeline=v), PRIOR) for v in (1, 5))
    assert five.bubble < one.bubble
    assert five.pass_overhead == pytest.approx(5 * one.pass_overhead)


def test_infiniband_is_slower_than_nvlink_for_hand_overs() -> None:
    """TP2 PP4: on 8 GPUs the stages sit in one node, on 16 they do not."""
    layout = Layout(tensor=2, pipeline=4)
    one, two = (step_time(Job(SHAPES["8b"], n, 32), layout, PRIOR) for n in (8, 16))
    a_micro_batch = one.pipeline_comm / 32, two.pipeline_comm / 16
    assert a_micro_batch[1] == pytest.approx(9 * a_micro_batch[0])


def test_a_tiny_layer_costs_its_launches() -> None:
    tiny = Job(SHAPES["8b"], 8, 8, 128)
    assert layer_time(tiny, Layout(tensor=8), PRIOR).total == pytest.approx(3 * LAUNCH_FLOOR_S)


def test_faster_memory_helps() -> None:
    h100, h200 = (estimate(replace(JOB, gpu=g), LAYOUT) for g in GPUS.values())
    assert h200.tokens_per_s_per_gpu > h100.tokens_per_s_per_gpu
    assert h200.spare > h100.spare


def test_rates_and_hours_agree() -> None:
    e = estimate(JOB, LAYOUT)
    assert e.tokens_per_s_per_gpu * e.time.total * 64 == pytest.approx(128 * 8192)
    assert e.epoch_gpu_hours * 3600 * e.tokens_per_s_per_gpu == pytest.approx(COALM_IT_TOKENS)
    assert e.mfu() < e.both_mfu[1] < 1


def test_the_kept_constants_are_believable() -> None:
    for name, (low, high) in RANGES.items():
        assert low < getattr(fitted(), name) < high
    assert set(RANGES) == set(Constants.__dataclass_fields__)


def test_bf16_ends_cost_what_their_layers_cost() -> None:
    """All layers in BF16 is a BF16 run but for what is gathered; two ends lie between, nearer to FP8."""
    eight = step_time(JOB, LAYOUT, PRIOR)
    ends = step_time(JOB, replace(LAYOUT, bf16_layers_at_start=1, bf16_layers_at_end=1), PRIOR)
    every = step_time(JOB, replace(LAYOUT, bf16_layers_at_start=80), PRIOR)
    bf16 = step_time(replace(JOB, precision="bf16"), LAYOUT, PRIOR)
    assert eight.total < ends.total < every.total
    assert every.total == pytest.approx(bf16.total, rel=1e-9)
    micro_batches = LAYOUT.micro_batches(JOB)
    fast, slow = (layer_time(replace(JOB, precision=p), LAYOUT, PRIOR) for p in ("fp8", "bf16"))
    assert ends.linear - eight.linear == pytest.approx(micro_batches * (slow.linear - fast.linear))


def test_weight_gradients_in_bf16_take_a_third_of_the_products_at_its_rate() -> None:
    eight = layer_time(JOB, LAYOUT, PRIOR).linear
    mixed = layer_time(JOB, replace(LAYOUT, fp8_weight_gradients=False), PRIOR).linear
    sixteen = layer_time(replace(JOB, precision="bf16"), LAYOUT, PRIOR).linear
    assert mixed == pytest.approx((2 * eight + sixteen) / 3)


def test_what_does_not_overlap_is_exposed_in_full() -> None:
    def exposed(**changes: bool) -> float:
        return step_time(JOB, replace(LAYOUT, fp8_params=False, **changes), PRIOR).data_comm

    both, neither = exposed(), exposed(overlap_grad_reduce=False, overlap_param_gather=False)
    assert neither == pytest.approx(both / PRIOR.data_exposed)
    assert both < exposed(overlap_grad_reduce=False) < neither
    assert exposed(distributed_optimizer=False) == pytest.approx(both)  # BF16 both ways, or reduced twice


def test_unpacked_rows_are_counted_as_full_sequences() -> None:
    packed = Job(SHAPES["8b"], 8, 32, task="lora", precision="bf16")
    padded = replace(packed, packed=False)
    assert padded.attended == padded.seq_len_tokens > packed.attended
    assert estimate(padded, Layout()).epoch_gpu_hours > 5 * estimate(packed, Layout()).epoch_gpu_hours
