"""One measurement: a slice built as `coalm train` builds it, a few steps on packed rows, measured by the run's meter."""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.h100_cases import ENGINE_FP8, WARM_UP_STEPS, Case, make_run, make_slice
from coalm_nemo.config import RunConfig
from coalm_nemo.models.llama import LlamaConfig
from coalm_nemo.platform import Platform

MEAN_ROW, SPREAD = 678.0, 0.9
"""CoALM-IT's mean row (arXiv 2502.08820) and the spread of a log-normal that benchmarks/packing.py assumes."""
DEFAULT_GPU = "h100-80gb"


def measure(case: Case, platform: Platform, out: Path) -> dict[str, Any]:
    """Runs the case on `case.tensor` ranks and returns its row; `not_measured` holds the reason where there is none."""
    import torch

    from coalm_nemo.planning.hardware import gpu_of_device
    from coalm_nemo.training.launch import launch

    if (case.precision in ENGINE_FP8 or case.overlap) and not platform.transformer_engine:
        return _row(case, not_measured="needs Transformer Engine")
    run = make_run(case, platform)
    known = gpu_of_device(torch.cuda.get_device_name(0)) if platform.is_cuda else None
    llama = make_slice(case, run, known.name if known else DEFAULT_GPU)
    if llama is None:
        return _row(case, not_measured="not one layer fits, by the planner")
    run.run.dir = str(out)
    result = out / "measured.json"
    code = launch(run, case.tensor, platform, partial(rank, case=case, llama=llama, platform=platform, out=result))
    if code or not result.is_file():
        return _row(case, layers=llama.num_layers, not_measured=f"a rank ended with exit code {code}")
    return json.loads(result.read_text(encoding="utf-8"))


def _row(case: Case, **values: Any) -> dict[str, Any]:
    return {"case": case.name, **asdict(case), **values}


def rank(run: RunConfig, *, case: Case, llama: LlamaConfig, platform: Platform, out: Path) -> int:
    """One rank's part; the first one writes the row."""
    from coalm_nemo.training.ranks import meet, ranks_from_environment
    from coalm_nemo.training.setup import start_process_groups, stop_process_groups
    from coalm_nemo.training.userbuffers import userbuffers
    from coalm_nemo.training.worker import one_thread_a_rank, quiet_libraries
    from coalm_nemo.validate import check_run

    quiet_libraries()
    ranks = ranks_from_environment()
    one_thread_a_rank()
    layout = check_run(run, llama, ranks.world_size)
    start_process_groups(run, platform, ranks, meet(ranks, 300))
    try:
        with userbuffers(run, llama):
            device = platform.device(ranks.local_rank)
            row = _train(case, run, llama, platform, device, layout.sequence_multiple, ranks.world_size)
    finally:
        stop_process_groups()
    if ranks.first:
        out.write_text(json.dumps(row), encoding="utf-8")
    return 0


def _train(
    case: Case, run: RunConfig, llama: LlamaConfig, platform: Platform, device: Any, multiple: int, world: int
) -> dict[str, Any]:
    from coalm_nemo.data.batch import Shape
    from coalm_nemo.training.calibration import calibrate, wants_calibration
    from coalm_nemo.training.feed import Feed
    from coalm_nemo.training.prefetch import Prefetcher
    from coalm_nemo.training.setup import build_trainee
    from coalm_nemo.training.step import train_step
    from coalm_nemo.training.throughput import Meter

    shape = Shape(run.train.seq_len_tokens, run.data.packing, 1, 0, multiple)
    feed = Feed(token_rows(llama, run), run, shape, shuffle=True, data_rank=0, data_size=1)
    # megatron-core's own random weights: nothing is loaded
    trainee = build_trainee(llama, run, platform, run.train.steps, lambda models: None)
    if wants_calibration(run):
        calibrate(trainee, feed, device)
    meter = Meter(run, llama, world, feed.positions, feed.fill(), device, lambda sentence: None)
    steps: list[tuple[float, int, float, Any]] = []
    with Prefetcher(feed, device, 0, None, run.train.steps) as batches:
        for _ in range(run.train.steps):
            data = batches.next()
            batch = data.batch
            started = time.perf_counter()  # a step ends in reading its loss and norm, so the device is done
            result = train_step(trainee, data.micro_batches, batch.length, device, False)
            took = time.perf_counter() - started
            steps.append((took, batch.tokens, result.loss, meter.measure(batch.rows, batch.tokens, took)))
            meter.after_step()
    return _row(case, layers=llama.num_layers, **_figures(steps, meter, world, run))


def _figures(steps: list[tuple[float, int, float, Any]], meter: Any, world: int, run: RunConfig) -> dict[str, Any]:
    """`steps`: (seconds, tokens, loss, what the meter says) of each; medians without the first ones."""
    kept, losses = [measured for *_, measured in steps[WARM_UP_STEPS:]], [loss for _, _, loss, _ in steps]
    planned = meter.plan.memory.first.allocated if meter.plan is not None and meter.gpu is not None else None
    peak = kept[-1].memory_allocated_bytes

    def middle(name: str) -> float | None:
        values = [getattr(m, name) for m in kept]
        return None if values[0] is None else statistics.median(values)

    return {
        "step_s": statistics.median(s for s, *_ in steps[WARM_UP_STEPS:]),
        "tokens_per_s_per_gpu": statistics.median(tokens / s for s, tokens, *_ in steps[WARM_UP_STEPS:]) / world,
        "tflops_causal": middle("tflops_per_device"),
        "tflops_full": middle("tflops_per_device_full"),
        "mfu_causal": middle("mfu_causal"),
        "memory_bytes": peak,
        "planned_memory_bytes": planned,
        "memory_over_plan": peak / planned if peak and planned else None,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "finite": all(map(math.isfinite, losses)),
        "layers_from": run.run.layers,
        "gradient_fusion": run.speed.gradient_fusion,
    }


def token_rows(llama: LlamaConfig, run: RunConfig) -> Any:
    """Random tokens in rows of CoALM-IT's lengths, a dozen steps' worth."""
    from coalm_nemo.data.tokens import TokenRows

    draw, longest = np.random.default_rng(0), run.train.seq_len_tokens
    count = max(8, round(12 * run.batch.global_size * longest / min(MEAN_ROW, longest / 2)))
    median = min(MEAN_ROW, longest / 2) / math.exp(SPREAD**2 / 2)
    lengths = np.clip(np.exp(draw.normal(math.log(median), SPREAD, count)), 8, longest).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = draw.integers(0, llama.vocab_size, int(offsets[-1]), dtype=np.int32)
    return TokenRows(tokens, np.ones_like(tokens, dtype=np.uint8), offsets, [str(i) for i in range(count)], "random")
