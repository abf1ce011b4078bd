"""How much faster batches answer than one prompt at a time: the same model, prompts and code, on this machine.

The prompts are the demo's held-out ones, in shuffled order; both ways give the same answers, which is checked.

    python -m benchmarks.eval_speed [--model HF_DIR] [--prompts 96] [--batch-size 32] [--rounds 3]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path

from coalm_nemo.demo.pipeline import HELD_OUT_SEED, NANO_BASE
from coalm_nemo.demo.rows import to_messages
from coalm_nemo.demo.score import held_out_items
from coalm_nemo.evaluation.base import Prompt
from coalm_nemo.evaluation.local_model import LocalModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=NANO_BASE)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    rows = held_out_items(HELD_OUT_SEED, 40)
    random.Random(0).shuffle(rows)
    prompts = [Prompt(to_messages(r.row)[:1], "", max_new_tokens=asked.max_new_tokens) for r in rows[: asked.prompts]]
    model = LocalModel(asked.model, dtype="fp32", device=asked.device)
    model.answer(prompts[:2])
    ratios = []
    print("| round | one at a time, s | batched, s | times as fast |\n|---|---:|---:|---:|")
    for number in range(1, asked.rounds + 1):
        seconds, answers = {}, {}
        for size in (1, asked.batch_size):
            model.batch_size, start = size, time.perf_counter()
            answers[size] = model.answer(prompts)
            seconds[size] = time.perf_counter() - start
        ratios.append(seconds[1] / seconds[asked.batch_size])
        print(f"| {number} | {seconds[1]:.1f} | {seconds[asked.batch_size]:.1f} | {ratios[-1]:.1f} |", flush=True)
    equal = sum(a == b for a, b in zip(answers[1], answers[asked.batch_size], strict=True))
    lengths = [len(model.prompt_ids(p)) for p in prompts]
    print(f"\nmedian {statistics.median(ratios):.1f} times; {equal} of {len(prompts)} answers are equal")
    spans = f"prompts of {min(lengths)} to {max(lengths)} tokens, {asked.max_new_tokens} new tokens"
    print(f"{spans}, batches of {asked.batch_size}")


if __name__ == "__main__":
    main()
