"""Rows whose loss has a floor, on which `coalm fp8-check` can tell a tenth of a percent.

    python -m benchmarks.fp8_rows --shards runs/fp8_emulation/shards --out runs/fp8_rows

Writes dialogues.jsonl, rows of the demo's shards (benchmarks/fp8_emulation.py makes them) with every token supervised, and
text.jsonl, more of the text that the demo's base was made with.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

from coalm_nemo.data.shards import ShardSet
from coalm_nemo.demo.pretraining_text import STAGES, write_stage
from coalm_nemo.demo.tokenizer import build_tokenizer

DIALOGUES, TEXT = 16_000, 3_200
"""Rows: 200 steps of `coalm_demo` and of `nano_base` at batch 16."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_stage(args.out / "text.jsonl", build_tokenizer(), replace(STAGES[-1], rows=TEXT), seed=5)
    write_dialogues(ShardSet.load(args.shards), args.out / "dialogues.jsonl")


def write_dialogues(rows: ShardSet, path: Path) -> None:
    """Some of the rows, in an order of their own, as {"token_ids": [...]}, which supervises all of them."""
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    with path.open("w", encoding="utf-8") as out:
        for row in order[:DIALOGUES]:
            tokens, _ = rows.row(row)
            out.write(json.dumps({"token_ids": tokens.tolist()}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
