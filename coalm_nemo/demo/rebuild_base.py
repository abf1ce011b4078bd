"""Rebuild the demo's base from nothing: random weights, three stages of text made to be copied, exported.

    python -m coalm_nemo.demo.rebuild_base --out runs/nano_base

The result, `OUT/nano_base`, is what stands in `coalm_nemo/demo/nano_base`. Each stage is a run of the recipe
`nano_base` through the same commands as any other training.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from coalm_nemo.demo.nano_init import write_initial_model
from coalm_nemo.demo.pipeline import command, prepare_directory
from coalm_nemo.demo.pretraining_text import STAGES, Stage, write_stage
from coalm_nemo.demo.tokenizer import build_tokenizer
from coalm_nemo.errors import EXIT_USER_ERROR, UserError


@dataclass(frozen=True)
class StagePlan:
    """How a stage of the curriculum is trained: tokens a step, and the end of the learning rate."""

    tokens_a_step: int
    schedule: str


PLANS = {
    "short": StagePlan(1024, "constant"),
    "middle": StagePlan(1024, "constant"),
    "long": StagePlan(2048, "linear"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        rebuild(args.out, args.seed)
    except UserError as e:
        print(f"rebuild_base: {e}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def rebuild(out: Path, seed: int) -> Path:
    """Train and export; returns the Hugging Face directory."""
    out, console = prepare_directory(out).out, Console(highlight=False)
    parameters = write_initial_model(out / "random", seed)
    console.print(f"random weights: {parameters:,} parameters")
    checkpoint = out / "checkpoint"
    command(console, ["convert", "import", "--hf", out / "random", "--out", checkpoint])
    for stage in STAGES:
        checkpoint = train_stage(console, out, checkpoint, stage, seed)
    command(console, ["convert", "export", "--ckpt", checkpoint, "--out", out / "nano_base"])
    return out / "nano_base"


def train_stage(console: Console, out: Path, start: Path, stage: Stage, seed: int) -> Path:
    """One stage on two data-parallel ranks; returns its checkpoint."""
    rows, run, plan = out / f"{stage.name}.jsonl", out / stage.name, PLANS[stage.name]
    write_stage(rows, build_tokenizer(), stage, seed)
    batch = plan.tokens_a_step // stage.seq_len_tokens
    words = [
        f"model.checkpoint={start}", f"run.dir={run}", f"data.train={rows}", f"run.seed={seed}", "data.shuffle=false",
        f"train.seq_len_tokens={stage.seq_len_tokens}", f"batch.global_size={batch}", f"batch.micro_size={batch // 2}",
        f"schedule.name={plan.schedule}",
    ]  # fmt: skip
    command(console, ["train", "--recipe", "nano_base", "--nproc", "2", *words])
    return sorted((run / "checkpoints").glob("step_*"))[-1]


if __name__ == "__main__":
    main()
