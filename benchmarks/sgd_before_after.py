"""The demo's nano base before and after training on SGD's calls: rows -> train -> export -> `coalm eval sgd`, twice.

Every twentieth dialogue is held out. Training and evaluation have the same prompts: action rows whose tool list has the
functions of the dialogue's own services. The base ships with 512 positions and SGD's rows need up to 3,700, so a copy
of it with more positions is trained, in stages of growing length as the base itself was.

    python -m benchmarks.sgd_before_after --sgd DIR/train [--out runs/sgd] [--nproc 2]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from rich.console import Console

from coalm_nemo.data.rows import Row
from coalm_nemo.data.sources.sgd import SgdSource
from coalm_nemo.demo.pipeline import NANO_BASE, command, prepare_directory
from coalm_nemo.errors import EXIT_USER_ERROR, UserError

HELD_OUT_EVERY = 20
MAX_POSITIONS = 4096


@dataclass(frozen=True)
class Stage:
    """Rows and packs of at most `length` tokens: a row that is longer loses the oldest turns of its history."""

    length: int
    steps: int
    packs_a_step: int
    schedule: str
    lr: float


STAGES = (Stage(1024, 400, 8, "constant", 3e-3), Stage(4096, 300, 2, "linear", 2e-3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sgd", type=Path, required=True, help="schema.json and dialogues_*.json")
    parser.add_argument("--out", type=Path, default=Path("runs/sgd_before_after"))
    parser.add_argument("--nproc", type=int, default=2)
    asked = parser.parse_args()
    try:
        run(asked.sgd, asked.out, asked.nproc)
    except UserError as e:
        print(f"sgd_before_after: {e}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def run(sgd: Path, out: Path, nproc: int) -> None:
    """All of it, below `out`; every command is printed as it runs."""
    out, console = prepare_directory(out).out, Console(highlight=False)
    training, held_out = split(sgd, out)
    base = longer_base(out / "base")
    evaluate(console, base, held_out, out / "before")
    started = time.monotonic()
    tuned = train(console, base, training, out, nproc)
    console.print(f"trained in {time.monotonic() - started:.0f} s")
    evaluate(console, tuned, held_out, out / "after")
    command(console, ["eval", "compare", out / "before", out / "after"])
    for name, (calls, right, named) in by_group(training, out / "after" / "items.jsonl").items():
        console.print(f"{name}: {right} of {calls} calls right, {named} names")


def split(sgd: Path, out: Path) -> tuple[Path, Path]:
    """Two SGD directories, (training, held out): every `HELD_OUT_EVERY`-th dialogue of each file is held out."""
    schema, *files = SgdSource(str(sgd)).files()
    training, held_out = out / "training", out / "held_out"
    for folder in (training, held_out):
        folder.mkdir()
        shutil.copyfile(schema, folder / "schema.json")
    for file in files:
        dialogues: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
        for folder, chosen in ((training, False), (held_out, True)):
            kept = [d for n, d in enumerate(dialogues) if (n % HELD_OUT_EVERY == 0) == chosen]
            (folder / file.name).write_text(json.dumps(kept), encoding="utf-8")
    return training, held_out


def longer_base(directory: Path) -> Path:
    """The nano base as it is, with `MAX_POSITIONS` positions (rotary: no weight depends on their number)."""
    shutil.copytree(NANO_BASE, directory)
    for name, key in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        values = json.loads((directory / name).read_text(encoding="utf-8"))
        (directory / name).write_text(json.dumps(values | {key: MAX_POSITIONS}, indent=1) + "\n", encoding="utf-8")
    return directory


def train(console: Console, base: Path, training: Path, out: Path, nproc: int) -> Path:
    """The stages one after the other; returns the exported model."""
    checkpoint = out / "megatron_base"
    command(console, ["convert", "import", "--hf", base, "--out", checkpoint])
    for stage in STAGES:
        rows, place = out / f"set_{stage.length}", out / f"run_{stage.length}"
        options = ["sources.sgd.tools=dialogue", "sources.sgd.response_rows=false", "pack_multiple=1"]
        length = ["--seq-len-tokens", str(stage.length)]
        command(
            console,
            ["data", "build", "--source", f"sgd={training}", "--tokenizer", base, *length, *options, "--out", rows],
        )
        words = [
            f"model.checkpoint={checkpoint}", f"run.dir={place}", f"data.train={rows}", f"train.steps={stage.steps}",
            f"train.seq_len_tokens={stage.length}", f"batch.global_size={stage.packs_a_step}",
            f"schedule.name={stage.schedule}", f"optimizer.lr={stage.lr}", "parallel.tensor=1", "parallel.pipeline=1",
        ]  # fmt: skip
        command(console, ["train", "--recipe", "coalm_demo", "--nproc", str(nproc), *words])
        checkpoint = sorted((place / "checkpoints").glob("step_*"))[-1]
    command(console, ["convert", "export", "--ckpt", checkpoint, "--out", out / "tuned"])
    return out / "tuned"


def by_group(training: Path, items: Path) -> dict[str, tuple[int, int, int]]:
    """Group -> (calls, right ones, right names): is it only what was seen in training, and does a long history hurt?"""
    source = SgdSource(str(training), tools="dialogue", response_rows=False)
    rows = [row for block in source.blocks() for row in source.rows(block, 0) if isinstance(row, Row)]
    seen = {row.messages[1]["content"] for row in rows}
    sums: dict[str, tuple[int, int, int]] = {}
    for line in items.read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        turns = item["steps"][0]["messages"][0]["content"].count("\nUser: ")
        right, named = (int(item["counts"][metric][0]) for metric in ("call", "call_name"))
        for group in (
            f"call {'is' if item['gold'] in seen else 'is not'} one of the training rows'",
            "up to 5 user turns" if turns <= 5 else "more than 5 user turns",
        ):
            calls, so_far, names = sums.get(group, (0, 0, 0))
            sums[group] = calls + 1, so_far + right, names + named
    return sums


def evaluate(console: Console, model: Path, held_out: Path, out: Path) -> None:
    form = ["--option", "form=rows", "--option", "tools=dialogue"]
    command(console, ["eval", "sgd", "--model", model, "--data", held_out, *form, "--out", out])


if __name__ == "__main__":
    main()
