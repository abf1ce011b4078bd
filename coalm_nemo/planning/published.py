"""The published figures the planner is held against: `published.csv`, a row a figure, with its source in `note`."""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path

from coalm_nemo.errors import UserError
from coalm_nemo.planning.hardware import find_gpu
from coalm_nemo.planning.job import Job, Layout
from coalm_nemo.planning.legality import check_legal, counts_ends
from coalm_nemo.planning.shapes import SHAPES

PUBLISHED_FILE = Path(__file__).with_name("published.csv")
SMALL_VOCABULARY = 32000
"""Of the MLPerf rows, which say so in their note."""


@dataclass(frozen=True)
class Published:
    """One published run."""

    model: str
    job: Job
    layout: Layout
    tokens_per_s_per_gpu: float
    peak_memory_gb: float | None
    note: str

    def label(self) -> str:
        """Model, task, precision, GPUs, layout."""
        return f"{self.model} {self.job.task} {self.job.precision} {self.job.gpus} {self.layout.short()}"


def read_published(path: Path = PUBLISHED_FILE) -> list[Published]:
    """The rows of a CSV in the form of `published.csv`. Raises UserError if it cannot be read."""
    try:
        with path.open(encoding="utf-8", newline="") as f:
            return [_row(row) for row in csv.DictReader(f)]
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror})") from e
    except (KeyError, ValueError) as e:
        raise UserError(f"{path} is not in the form of {PUBLISHED_FILE.name} ({e!r})") from e


def _row(row: dict[str, str]) -> Published:
    model = SHAPES[row["model"].split("-")[-1]]
    if "vocabulary 32k" in row["note"]:
        model = replace(model, vocab_size=SMALL_VOCABULARY)
    job = Job(
        model=model,
        gpus=int(row["gpus"]),
        global_batch=int(row["global_batch"]),
        seq_len_tokens=int(row["seq_len"]),
        task=row["task"],
        precision=row["precision"],
        gpu=find_gpu(row["gpu"]),
        lora_targets="qkv",
    )
    layout = Layout(
        tensor=int(row["tp"]),
        pipeline=int(row["pp"]),
        virtual_pipeline=int(row["vp"]),
        context=int(row["cp"]),
        micro_batch=int(row["micro_batch"]),
    )
    layout = replace(layout, count_embedding_and_loss=counts_ends(model, layout))
    check_legal(job, layout)
    memory = float(row["peak_memory_gb"]) if row["peak_memory_gb"] else None
    return Published(row["model"], job, layout, float(row["tokens_per_s_per_gpu"]), memory, row["note"])
