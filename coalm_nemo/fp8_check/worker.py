"""One rank of `coalm fp8-check`: every variant trained for a few steps from the same base on the same rows."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from coalm_nemo.config import RunConfig
from coalm_nemo.data.batch import Shape
from coalm_nemo.fp8_check.probe import Probe, gather, probe
from coalm_nemo.fp8_check.variants import Variants
from coalm_nemo.fp8_check.verdict import Runs, Trained, rows_measured, write_result
from coalm_nemo.models.llama import LlamaConfig
from coalm_nemo.platform import Platform, choose_platform
from coalm_nemo.training.feed import Feed
from coalm_nemo.training.prepare import Prepared, prepare, read_llama
from coalm_nemo.training.ranks import Ranks, first_rank_does, meet, ranks_from_environment
from coalm_nemo.training.worker import one_thread_a_rank, open_rows, quiet_libraries, report_user_errors
from coalm_nemo.validate import Layout, check_run

if TYPE_CHECKING:
    from coalm_nemo.training.setup import Trainee


@dataclass(frozen=True)
class Place:
    """What all variants share."""

    llama: LlamaConfig
    layout: Layout
    platform: Platform
    ranks: Ranks
    prepared: Prepared
    device: torch.device


def check_worker(variants: Variants, out: Path, tolerance: float, seeds: int = 1) -> Callable[[RunConfig], int]:
    """What a rank runs; the argument is the FP8 run. Returns the exit code: 0 passed, 1 not.

    `seeds`: how often, each time with the next seed after the run's.
    """

    def run(fp8: RunConfig) -> int:
        ranks = ranks_from_environment()
        quiet_libraries()
        one_thread_a_rank()
        return report_user_errors(ranks, lambda: _check(variants, ranks, out, tolerance, seeds), "fp8-check")

    return run


def _check(variants: Variants, ranks: Ranks, out: Path, tolerance: float, seeds: int) -> int:
    from coalm_nemo.training.setup import start_process_groups, stop_process_groups

    fp8 = variants.fp8
    llama = read_llama(fp8)
    layouts = [check_run(run, llama, ranks.world_size) for run in variants.named().values()]
    platform = choose_platform(fp8.run.platform, fp8.run.layers)
    platform.refuse(fp8.precision.dtype, fp8.optimizer.moments)
    store = meet(ranks, fp8.data.prepare_timeout_s)
    made = first_rank_does(store, ranks, "prepare", lambda: prepare(fp8, llama).to_json())
    start_process_groups(fp8, platform, ranks, store)
    try:
        # one layout for all: FP8's sequence lengths are rounded up, and the padding must be the same
        layout = max(layouts, key=lambda a: a.sequence_multiple)
        place = Place(llama, layout, platform, ranks, Prepared.from_json(made), platform.device(ranks.local_rank))
        pairs = [_pair(variants.at_seed(fp8.run.seed + i), place) for i in range(seeds)]
        found = gather(_probe(variants, place))
        return write_result(variants, pairs, found, out, tolerance) if ranks.first else 0
    finally:
        stop_process_groups()


def _pair(variants: Variants, place: Place) -> Runs:
    seed = variants.fp8.run.seed
    if place.ranks.first:
        print(f"seed {seed}", flush=True)
    return Runs(**{name: _train(run, place, name) for name, run in variants.named().items()}, seed=seed)


def _train(run: RunConfig, place: Place, name: str) -> Trained:
    """A loss that is not finite ends the run."""
    from coalm_nemo.training.calibration import calibrate, wants_calibration
    from coalm_nemo.training.checkpointing import load_model_state
    from coalm_nemo.training.setup import build_trainee, seed_everything
    from coalm_nemo.training.step import NonFiniteError, train_step

    feed = _feed(run, place)
    trainee = build_trainee(
        place.llama, run, place.platform, run.train.steps, lambda m: load_model_state(m, place.prepared.base)
    )
    if wants_calibration(run):
        calibrate(trainee, feed, place.device)
    losses: list[float] = []
    for step in range(run.train.steps):
        seed_everything(run.run.seed, step)
        batch = feed.global_batch(step * run.batch.global_size, None)
        try:
            result = train_step(trainee, feed.micro_batches(batch, place.device), batch.length, place.device, False)
        except NonFiniteError:
            break
        losses.append(result.loss)
        if place.ranks.first and (step + 1) % max(1, run.train.steps // 10) == 0:
            print(f"{name:9} step {step + 1:>5}  loss {result.loss:.5f}", flush=True)
    after = _after(trainee, feed, place) if len(losses) == run.train.steps else None
    del trainee
    gc.collect()
    return Trained(losses, after)


def _after(trainee: Trainee, feed: Feed, place: Place) -> float | None:
    """Mean loss of the trained weights over the supervised tokens of the last steps' rows; None if it is not finite."""
    from coalm_nemo.training.step import evaluate

    total, tokens = 0.0, 0
    for step in rows_measured(feed.run.train.steps):
        batch = feed.global_batch(step * feed.run.batch.global_size, None)
        loss, count = evaluate(trainee, feed.micro_batches(batch, place.device), batch.length, place.device)
        total, tokens = total + loss, tokens + count
    return total / max(tokens, 1) if math.isfinite(total) else None


def _probe(variants: Variants, place: Place) -> Probe:
    from coalm_nemo.training.checkpointing import load_model_state

    feed = _feed(variants.fp8, place)
    batch = feed.global_batch(0, None)
    return probe(
        place.llama, variants.baseline, variants.fp8, place.platform,
        lambda chunks: load_model_state(chunks, place.prepared.base),
        feed.micro_batches(batch, place.device), batch.length,
    )  # fmt: skip


def _feed(run: RunConfig, place: Place) -> Feed:
    from megatron.core import parallel_state

    rows, _ = open_rows(run, place.prepared)
    context_rank = parallel_state.get_context_parallel_rank()
    shape = Shape(
        run.train.seq_len_tokens, run.data.packing, run.parallel.context, context_rank, place.layout.sequence_multiple
    )
    data_rank = parallel_state.get_data_parallel_rank()
    return Feed(rows, run, shape, shuffle=run.data.shuffle, data_rank=data_rank, data_size=place.layout.data_parallel)
