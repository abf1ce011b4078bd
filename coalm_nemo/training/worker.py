"""One rank of `coalm train`, from its environment variables to its exit code."""

from __future__ import annotations

import json
import os
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from coalm_nemo.checkpoint.lora import AdapterInfo
from coalm_nemo.config import RunConfig, to_yaml
from coalm_nemo.data.batch import Shape
from coalm_nemo.data.shards import ShardSet, is_shard_set
from coalm_nemo.data.tokens import RowSet, TokenRows
from coalm_nemo.errors import EXIT_NON_FINITE, EXIT_STOPPED, EXIT_USER_ERROR, UserError
from coalm_nemo.models.llama import LlamaConfig
from coalm_nemo.platform import Platform, choose_platform
from coalm_nemo.speed import refuse_missing
from coalm_nemo.training import feed as feeding
from coalm_nemo.training.callbacks.base import Callback, RunStart, SaveNote
from coalm_nemo.training.in_training_eval import HeldOut, InTrainingEval, read_held_out
from coalm_nemo.training.prepare import Prepared, prepare, read_llama
from coalm_nemo.training.ranks import Ranks, ToldByRankZero, first_rank_does, meet, ranks_from_environment
from coalm_nemo.validate import Layout, check_run

if TYPE_CHECKING:
    from coalm_nemo.training.checkpointing import Checkpointer, Progress

EXIT_CODES = {"finished": 0, "stopped": EXIT_STOPPED, "non-finite": EXIT_NON_FINITE}


def run_worker(run: RunConfig) -> int:
    """Train on this rank; returns the exit code."""
    ranks = ranks_from_environment()
    quiet_libraries()
    one_thread_a_rank()
    return report_user_errors(ranks, lambda: train(run, ranks), "train")


def report_user_errors(ranks: Ranks, work: Callable[[], int], verb: str) -> int:
    """The exit code of `work`, 2 for a UserError.

    It is printed by rank 0, and by one rank of a node that has a trouble of its own (a path that is not there).
    """
    try:
        return work()
    except UserError as e:
        if ranks.first:
            print(f"coalm {verb}: {e}", file=sys.stderr)
        elif ranks.local_rank == 0 and not isinstance(e, ToldByRankZero):
            print(f"coalm {verb}: {e} (rank {ranks.rank} on {socket.gethostname()})", file=sys.stderr)
        return EXIT_USER_ERROR


def train(run: RunConfig, ranks: Ranks) -> int:
    """Check, prepare, build, resume, loop."""
    llama = read_llama(run)
    layout = check_run(run, llama, ranks.world_size)
    platform = choose_platform(run.run.platform, run.run.layers)
    platform.refuse(run.precision.dtype, run.optimizer.moments)
    refuse_missing(run, platform)
    store = meet(ranks, run.data.prepare_timeout_s)
    prepared = Prepared.from_json(first_rank_does(store, ranks, "prepare", lambda: prepare(run, llama).to_json()))
    held_out = HeldOut.none()
    if run.evaluation.every_steps:
        text = first_rank_does(store, ranks, "evaluation", lambda: read_held_out(run, prepared.hf_source).to_json())
        held_out = HeldOut(**json.loads(text))

    from coalm_nemo.training.setup import start_process_groups, stop_process_groups
    from coalm_nemo.training.userbuffers import userbuffers

    start_process_groups(run, platform, ranks, store)
    try:
        with userbuffers(run, llama):
            return _train(run, ranks, llama, layout, platform, prepared, held_out)
    finally:
        stop_process_groups()


def _train(
    run: RunConfig,
    ranks: Ranks,
    llama: LlamaConfig,
    layout: Layout,
    platform: Platform,
    prepared: Prepared,
    questions: HeldOut,
) -> int:
    from coalm_nemo.training.calibration import restore_or_calibrate, wants_calibration
    from coalm_nemo.training.checkpointing import Progress
    from coalm_nemo.training.loop import Loop
    from coalm_nemo.training.setup import build_trainee, warmup_steps
    from coalm_nemo.training.throughput import Meter

    device = platform.device(ranks.local_rank)
    rows, held_out = open_rows(run, prepared)
    feed = _feed(run, layout, rows, shuffle=run.data.shuffle)
    validation = _feed(run, layout, held_out, shuffle=False) if held_out is not None else None
    steps, end = feeding.total_steps(run, len(feed.items))
    callbacks = make_callbacks(run) if ranks.first else []
    checkpointer = _checkpointer(run, llama, prepared, callbacks)
    newest = checkpointer.newest_sound() if run.checkpoint.resume else None
    if not newest:
        checkpointer.refuse_unsound(prepared.base)
    trainee = build_trainee(
        llama,
        run,
        platform,
        steps,
        lambda models: _load_weights(models, run, prepared, newest),
    )
    progress = Progress(0, 0, feed.fingerprint())
    if newest:
        progress = checkpointer.restore(trainee, newest)
        _check_same_data(progress, feed, newest)
    if wants_calibration(run):
        restore_or_calibrate(trainee, feed, device, newest)
    trainee.scheduler.step(increment=progress.step)
    meter = Meter(
        run, llama, ranks.world_size, feed.positions, feed.fill(), device, lambda sentence: _warn(callbacks, sentence)
    )
    start = RunStart(
        run, layout, len(feed.rows), len(feed.items), feed.fill(), progress.step, steps, warmup_steps(run, steps),
        tuple(meter.lines()),
    )  # fmt: skip
    if ranks.first:
        (Path(run.run.dir) / "run.yaml").write_text(to_yaml(run))
    for callback in callbacks:
        callback.on_start(start)
    quiz = InTrainingEval(questions, run, prepared.hf_source, layout.sequence_multiple, device) if questions else None
    loop = Loop(run, trainee, feed, validation, checkpointer, callbacks, device, steps, end, meter, quiz)
    ended = loop.run(progress)
    for callback in callbacks:
        callback.on_end(ended)
    return EXIT_CODES[ended.status]


def _checkpointer(run: RunConfig, llama: LlamaConfig, prepared: Prepared, callbacks: list[Callback]) -> Checkpointer:
    from coalm_nemo.models.lora import num_parameters
    from coalm_nemo.training.calibration import wants_calibration
    from coalm_nemo.training.checkpointing import Checkpointer

    return Checkpointer(
        Path(run.run.dir) / "checkpoints",
        prepared.hf_source,
        dtype=run.precision.weights,
        parameters=num_parameters(llama, run.lora) if run.lora.rank else llama.num_parameters(),
        keep_last=run.checkpoint.keep_last,
        milestone_steps=run.checkpoint.milestone_interval_steps,
        asynchronous=run.checkpoint.async_save,
        adapter=_adapter_info(run, prepared),
        delayed_scaling=wants_calibration(run),
        on_saved=lambda note: _tell_saved(callbacks, note),
        warn=lambda sentence: _warn(callbacks, sentence),
    )


def _load_weights(models: Any, run: RunConfig, prepared: Prepared, newest: Path | None) -> None:
    """The base; where a checkpoint holds all weights there is nothing to load before it."""
    from coalm_nemo.training.checkpointing import load_model_state
    from coalm_nemo.training.start_adapters import start_adapters

    if not newest or run.lora.rank:
        load_model_state(models, prepared.base)
    if run.lora.start_from and not newest:
        start_adapters(models, Path(run.lora.start_from))


def _adapter_info(run: RunConfig, prepared: Prepared) -> AdapterInfo | None:
    lora = run.lora
    return AdapterInfo(lora.rank, lora.alpha, list(lora.targets), str(prepared.base.absolute())) if lora.rank else None


def open_rows(run: RunConfig, prepared: Prepared) -> tuple[RowSet, RowSet | None]:
    """(train, validation) as `prepare` left them."""
    train: RowSet = ShardSet.load(prepared.train) if is_shard_set(prepared.train) else TokenRows.load(prepared.train)
    if prepared.validation:
        path = prepared.validation
        return train, ShardSet.load(path) if is_shard_set(path) else TokenRows.load(path)
    if isinstance(train, ShardSet):
        return train.split(run.data.validation_fraction)
    return train, None


def _feed(run: RunConfig, layout: Layout, rows: RowSet, *, shuffle: bool) -> feeding.Feed:
    from megatron.core import parallel_state

    shape = Shape(
        run.train.seq_len_tokens,
        run.data.packing,
        run.parallel.context,
        parallel_state.get_context_parallel_rank(),
        layout.sequence_multiple,
    )
    return feeding.Feed(
        rows,
        run,
        shape,
        shuffle=shuffle,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=layout.data_parallel,
    )


def make_callbacks(run: RunConfig) -> list[Callback]:
    """Those who watch this run."""
    from coalm_nemo.training.callbacks.console import Console
    from coalm_nemo.training.callbacks.events_file import EventsFile
    from coalm_nemo.training.callbacks.metrics_file import MetricsFile
    from coalm_nemo.training.callbacks.weights_and_biases import WeightsAndBiases

    run_dir = Path(run.run.dir)
    console = Console(run.logging.console_interval_steps)
    warn = console.on_warning
    callbacks: list[Callback] = [console, MetricsFile(run_dir / "metrics.jsonl", warn), EventsFile(run_dir, warn)]
    if run.logging.wandb != "disabled":  # after the events, which count the starts
        callbacks.append(WeightsAndBiases(run_dir, warn, finish_s=run.logging.wandb_finish_s))
    return callbacks


def _tell_saved(callbacks: list[Callback], note: SaveNote) -> None:
    for callback in callbacks:
        callback.on_save(note)


def _warn(callbacks: list[Callback], sentence: str) -> None:
    for callback in callbacks:
        callback.on_warning(sentence)


def _check_same_data(progress: Progress, feed: feeding.Feed, checkpoint: Path) -> None:
    if progress.data_fingerprint != feed.fingerprint():
        raise UserError(
            f"{checkpoint} was trained on other rows than data.train gives now (or in another order: tokenizer, run.seed, "
            "data.packing, data.pack_multiple and train.seq_len_tokens decide it); use another run.dir, or start from it "
            "with model.checkpoint"
        )


def quiet_libraries() -> None:
    """megatron-core and torch warn about each missing accelerator and each deprecation, once a rank."""
    for module in ("megatron", "torch", "transformer_engine"):
        warnings.filterwarnings("ignore", module=module)


def one_thread_a_rank() -> None:
    """Where several ranks share a CPU, unless the user said otherwise."""
    slurm = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0]  # "8", "8(x16)", "8,4"
    if "OMP_NUM_THREADS" not in os.environ and int(os.environ.get("LOCAL_WORLD_SIZE") or slurm) > 1:
        torch.set_num_threads(1)
