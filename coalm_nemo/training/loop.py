"""The training loop: batch, step, report, validate, save; until the last step or a signal."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from coalm_nemo.config import RunConfig
from coalm_nemo.training.callbacks.base import Callback, EvalReport, RunEnd, StepReport
from coalm_nemo.training.checkpointing import Checkpointer, Progress
from coalm_nemo.training.feed import Feed, GlobalBatch
from coalm_nemo.training.garbage import CollectTogether
from coalm_nemo.training.in_training_eval import InTrainingEval
from coalm_nemo.training.prefetch import Prefetcher, Prepared
from coalm_nemo.training.setup import Trainee, seed_everything
from coalm_nemo.training.step import NonFiniteError, StepResult, evaluate, train_step
from coalm_nemo.training.stop import StopFlag, write_stop_seconds
from coalm_nemo.training.stragglers import Stragglers
from coalm_nemo.training.throughput import Meter
from coalm_nemo.training.watchdog import Watchdog


class Loop:
    """One run on one rank. `callbacks` is empty except on rank 0."""

    def __init__(
        self,
        run: RunConfig,
        trainee: Trainee,
        feed: Feed,
        validation: Feed | None,
        checkpointer: Checkpointer,
        callbacks: Sequence[Callback],
        device: torch.device,
        total_steps: int,
        end_position: int | None,
        meter: Meter,
        quiz: InTrainingEval | None = None,
    ) -> None:
        self.run_config = run
        self.trainee = trainee
        self.feed = feed
        self.validation = validation
        self.checkpointer = checkpointer
        self.callbacks = callbacks
        self.device = device
        self.total_steps = total_steps
        self.end_position = end_position
        self.meter = meter
        self.quiz = quiz
        health = run.health
        self.watchdog = Watchdog(
            torch.distributed.get_rank(),
            factor=health.hang_factor,
            floor_s=health.hang_floor_s,
            slow_s=health.hang_slow_s,
        )
        self.stragglers = Stragglers(device, health.straggler_interval_steps, health.straggler_ratio)
        self.prepare_s = 0.0
        """What the making of this step's micro-batches took on this rank."""

    def run(self, progress: Progress) -> RunEnd:
        """Train from `progress` on. The status says why it ended; "non-finite" has saved the batch's row ids."""
        started = time.monotonic()
        status, step = "finished", progress.step
        saved = progress.step
        batches = Prefetcher(
            self.feed, self.device, progress.consumed_items, self.end_position, self.total_steps - step
        )
        garbage = CollectTogether(self.run_config.speed.collect_interval_steps)
        with StopFlag() as stop, self.watchdog, garbage, batches:
            while step < self.total_steps:
                prepared = batches.next()
                batch = prepared.batch
                try:
                    result = self._step(step, prepared, stop.asked)
                except NonFiniteError as e:
                    self._save_row_ids(step + 1, batch, str(e))
                    status = "non-finite"
                    break
                step += 1
                progress = Progress(step, progress.consumed_items + len(batch.items), progress.data_fingerprint)
                garbage.after_step(step)
                self._look_for_stragglers(step)
                if self._more_than_a_step(step):
                    with self.watchdog.slowly():
                        self.checkpointer.poll()
                        self._maybe_evaluate(step)
                        self._maybe_ask(step)
                if self._save_due(step) or result.stop_asked:
                    self._save(progress, required=result.stop_asked or step == self.total_steps)
                    saved = step
                if result.stop_asked and step < self.total_steps:
                    status = "stopped"
                    break
            if status == "finished" and self.run_config.checkpoint.save_final and saved != step:
                self._save(progress, required=True)
            with self.watchdog.slowly():
                self.checkpointer.wait()
            self._remember_save_time()
        return RunEnd(status, step, time.monotonic() - started)

    def _step(self, step: int, prepared: Prepared, stop: bool) -> StepResult:
        started, batch = time.monotonic() - prepared.waited_s, prepared.batch
        seed_everything(self.run_config.run.seed, step, graphs=self.run_config.speed.cuda_graphs)
        self.prepare_s = prepared.made_s
        result = train_step(self.trainee, prepared.micro_batches, batch.length, self.device, stop)
        seconds = time.monotonic() - started
        self._report(step + 1, batch, result, seconds)
        self.meter.after_step()
        self.watchdog.beat(step + 1, seconds)
        return result

    def _save(self, progress: Progress, *, required: bool) -> None:
        with self.watchdog.slowly():
            self.checkpointer.save(self.trainee, progress, required=required)
        self._remember_save_time()

    def _remember_save_time(self) -> None:
        if torch.distributed.get_rank() == 0:
            steps, saves = self.watchdog.step_seconds(), self.checkpointer.save_seconds
            write_stop_seconds(Path(self.run_config.run.dir), steps, saves)

    def _look_for_stragglers(self, step: int) -> None:
        for sentence in self.stragglers.after_step(step, self.prepare_s):
            for callback in self.callbacks:
                callback.on_warning(sentence)

    def _report(self, step: int, batch: GlobalBatch, result: StepResult, seconds: float) -> None:
        if not self.callbacks:
            return
        report = StepReport(
            step=step,
            lm_loss=result.loss,
            grad_norm=result.grad_norm,
            learning_rate=result.learning_rate,
            tokens=batch.tokens,
            supervised_tokens=result.supervised_tokens,
            tokens_per_s=batch.tokens / seconds,
            supervised_tokens_per_s=result.supervised_tokens / seconds,
            step_time_s=seconds,
            epoch=step * self.run_config.batch.global_size / len(self.feed.items),
            time=time.time(),
            fill=batch.tokens / (batch.length * self.run_config.batch.global_size),
            loss_by_source=self._by_source(result),
            **asdict(self.meter.measure(batch.rows, batch.tokens, seconds)),
        )
        for callback in self.callbacks:
            callback.on_step(report)

    def _by_source(self, result: StepResult) -> dict[str, float] | None:
        if self.feed.sources is None:
            return None
        named = zip(self.feed.sources.names, result.source_losses, strict=True)
        return {name: loss for name, loss in named if loss is not None}

    def _save_due(self, step: int) -> bool:
        interval = self.run_config.checkpoint.save_interval_steps
        return bool(interval) and step % interval == 0

    def _more_than_a_step(self, step: int) -> bool:
        asks = self.quiz is not None and self.quiz.due(step, self.total_steps)
        return asks or self.checkpointer.queue is not None or self._evaluation_due(step)

    def _evaluation_due(self, step: int) -> bool:
        interval = self.run_config.train.eval_interval_steps
        return self.validation is not None and (step == self.total_steps or bool(interval and step % interval == 0))

    def _maybe_evaluate(self, step: int) -> None:
        if self.validation is None or not self._evaluation_due(step):
            return
        loss, tokens = self.validation_loss(self.validation)
        for callback in self.callbacks:
            callback.on_eval(EvalReport(step, loss, tokens))

    def _maybe_ask(self, step: int) -> None:
        """Held-out calls and states: all ranks answer, the first one judges."""
        if self.quiz is None or not self.quiz.due(step, self.total_steps):
            return
        answers = self.quiz.answer(self.trainee)
        if self.callbacks:
            scores, samples = self.quiz.report(step, answers)
            for callback in self.callbacks:
                callback.on_scores(scores)
                callback.on_samples(samples)

    def validation_loss(self, feed: Feed) -> tuple[float, int]:
        """Mean loss over the supervised tokens of a whole set, each row once."""
        total, tokens = 0.0, 0
        for start in range(0, len(feed.items), self.run_config.batch.global_size):
            batch = feed.global_batch(start, end=len(feed.items))
            loss, count = evaluate(self.trainee, feed.micro_batches(batch, self.device), batch.length, self.device)
            total, tokens = total + loss, tokens + count
        return total / max(tokens, 1), tokens

    def _save_row_ids(self, step: int, batch: GlobalBatch, reason: str) -> None:
        if torch.distributed.get_rank() != 0:
            return
        path = Path(self.run_config.run.dir) / f"non_finite_step_{step:08d}.json"
        row_ids = [self.feed.rows.row_id(r) for r in batch.rows]
        path.write_text(json.dumps({"step": step, "reason": reason, "row_ids": row_ids}, indent=1) + "\n")
        for callback in self.callbacks:
            callback.on_warning(f"{reason} at step {step}; the batch's row ids are in {path}")
