"""What a run tells those who watch it. Callbacks run on rank 0 only and never touch the training state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coalm_nemo.config import RunConfig
from coalm_nemo.validate import Layout


@dataclass(frozen=True)
class RunStart:
    """Before the first step."""

    config: RunConfig
    layout: Layout
    rows: int
    items: int
    """Rows, or packs with packing."""
    fill: float
    """Real tokens a position of an average sequence; 1 is no padding."""
    first_step: int
    total_steps: int
    warmup_steps: int
    plan: Sequence[str] = ()
    """What the planner expects of this run, a sentence each."""


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. Its fields are the keys of a line of metrics.jsonl."""

    step: int
    """Counted from 1."""
    lm_loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    """Real tokens (positions that are not padding) of the global batch."""
    supervised_tokens: int
    tokens_per_s: float
    supervised_tokens_per_s: float
    step_time_s: float
    epoch: float
    time: float = 0.0
    """Seconds since 1970, at the step's end."""
    fill: float = 1.0
    """Real tokens a position of this batch's sequences; 1 is no padding."""
    loss_by_source: Mapping[str, float] | None = None
    """Mean loss over the supervised tokens of each source that has some in this batch; None with a single source."""
    tflops_per_device: float | None = None
    """These and what follows: training/throughput.py. None is left out of metrics.jsonl."""
    tflops_per_device_full: float | None = None
    mfu_causal: float | None = None
    mfu_full: float | None = None
    memory_allocated_bytes: int | None = None
    memory_reserved_bytes: int | None = None
    predicted_tokens_per_s: float | None = None
    predicted_memory_bytes: int | None = None


@dataclass(frozen=True)
class EvalReport:
    """Validation loss after a step."""

    step: int
    validation_loss: float
    supervised_tokens: int


@dataclass(frozen=True)
class ScoresReport:
    """What the model, in training, scores on held-out items after a step: in percent, by short names."""

    step: int
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Sample:
    """One of a few fixed prompts, and what the model in training answers."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class SamplesReport:
    """Answers after a step."""

    step: int
    samples: Sequence[Sample]


@dataclass(frozen=True)
class SaveNote:
    """A checkpoint is on disk."""

    step: int
    path: str
    size_bytes: int
    seconds: float


@dataclass(frozen=True)
class RunEnd:
    """Why the run ended: "finished", "stopped" (a signal) or "non-finite"."""

    status: str
    step: int
    seconds: float


class Callback:
    """Override what is of interest."""

    def on_start(self, start: RunStart) -> None: ...

    def on_step(self, report: StepReport) -> None: ...

    def on_eval(self, report: EvalReport) -> None: ...

    def on_scores(self, report: ScoresReport) -> None: ...

    def on_samples(self, report: SamplesReport) -> None: ...

    def on_save(self, note: SaveNote) -> None: ...

    def on_warning(self, sentence: str) -> None: ...

    def on_end(self, end: RunEnd) -> None: ...
