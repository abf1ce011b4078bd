"""What an FP8 export costs: perplexity on held-out rows and right answers against bf16, the error of every weight,
memory and speed. Needs the package compressed-tensors.

    python -m benchmarks.fp8_export                              # the shipped nano base, on rows of its own kind
    python -m benchmarks.fp8_export --tuned runs/demo-*/coalm    # what `coalm demo` made, on held-out dialogues
    python -m benchmarks.fp8_export --speed                      # a synthetic model of 1.4 GB, 8B layer shapes
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from math import exp
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from coalm_nemo.checkpoint.fp8_weight import TensorError
from coalm_nemo.checkpoint.quantize import QUANTIZED_KINDS, error_table, kind_of, quantize_directory
from coalm_nemo.demo.pretraining_text import STAGES, stage_rows
from coalm_nemo.demo.rows import TaggedRow, to_messages
from coalm_nemo.demo.score import held_out_items, score_directory

NANO_BASE = Path(__file__).parents[1] / "coalm_nemo" / "demo" / "nano_base"
SEED = 20_000
ROWS = 300
BATCH = 16
Rows = list[tuple[list[int], int]]
"""Token ids of a row, and how many of them are the prompt's."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuned", type=Path, help="a Hugging Face directory that `coalm demo` wrote")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--quantize-only", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quantize_only:
        quantize_and_measure(*args.quantize_only)
        return
    with tempfile.TemporaryDirectory() as scratch:
        if args.speed:
            speed(Path(scratch))
        else:
            quality(args.tuned or NANO_BASE, Path(scratch), tuned=args.tuned is not None)


def quality(model: Path, scratch: Path, tuned: bool) -> None:
    """The bf16 model and its FP8 export on the same rows, and the table of errors."""
    from transformers import AutoTokenizer

    bf16, fp8 = scratch / "bf16", scratch / "fp8"
    write_bf16(model, bf16)
    report = quantize_directory(bf16, fp8)
    tokenizer = AutoTokenizer.from_pretrained(bf16)
    items = held_out_items(SEED, 100)
    items = items[:: len(items) // ROWS][:ROWS]
    rows = dialogue_rows(tokenizer, items) if tuned else pretraining_rows(tokenizer)
    tokens = sum(len(ids) - max(prompt, 1) for ids, prompt in rows)
    print(f"{len(rows)} rows, {tokens} tokens; {report.bytes_before} -> {report.bytes_after} bytes\n")
    print("| weights | activations | perplexity | against bf16 |\n|---|---|---:|---:|")
    first = perplexity(bf16, rows, {}, tokenizer.pad_token_id)
    print(f"| bf16 | bf16 | {first:.5f} | |")
    for activations, options in (("FP8, a scale a token", {}), ("bf16", {"dequantize": True})):
        found = perplexity(fp8, rows, options, tokenizer.pad_token_id)
        print(f"| FP8 | {activations} | {found:.5f} | {found / first - 1:+.3%} |", flush=True)
    if tuned:
        right_answers(bf16, fp8, items)
    print_errors(report.errors)


def right_answers(bf16: Path, fp8: Path, items: Sequence[TaggedRow]) -> None:
    """Greedy answers to the same prompts, scored as the demo scores them."""
    for name, directory in (("bf16", bf16), ("FP8", fp8)):
        tallies = [vars(score) for score in score_directory(directory, items).values()]
        for what in ("calls", "joint_goal"):
            right, total = (sum(getattr(t[what], field) for t in tallies) for field in ("right", "total"))
            print(f"{name}: {what}: {right} of {total} right")


def print_errors(errors: Sequence[TensorError]) -> None:
    print("\n" + "\n".join(error_table(tuple(errors))))
    layers = sorted({int(e.name.split(".")[2]) for e in errors})
    print("\n| layer | " + " | ".join(QUANTIZED_KINDS) + " |\n|---|" + "---:|" * len(QUANTIZED_KINDS))
    by_place = {(int(e.name.split(".")[2]), kind_of(e.name)): e.relative_frobenius for e in errors}
    for layer in layers:
        print(f"| {layer} | " + " | ".join(f"{by_place[layer, kind]:.2%}" for kind in QUANTIZED_KINDS) + " |")


def write_bf16(model: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)


def dialogue_rows(tokenizer: Any, items: Sequence[TaggedRow]) -> Rows:
    """Held-out dialogues as the demo trains them, shortest first."""
    rows = []
    for item in items:
        chat = to_messages(item.row)
        prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(chat, tokenize=False)
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, whole)]
        rows.append((ids[1], len(ids[0])))
    return sorted(rows, key=lambda row: len(row[0]))


def pretraining_rows(tokenizer: Any) -> Rows:
    """What the nano base learned to do, on rows of another seed: it knows nothing of dialogues."""
    ids = stage_rows(tokenizer.backend_tokenizer, replace(STAGES[-1], rows=ROWS), SEED)
    return [(row, 0) for row in ids]


def perplexity(directory: Path, rows: Rows, options: dict[str, Any], pad: int) -> float:
    """Over the answers (over all tokens where a row has no prompt); logits in bf16, the loss in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    more = {"quantization_config": CompressedTensorsConfig(**options)} if options else {}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, **more).eval()
    total, count = 0.0, 0
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        length = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([r + [pad] * (length - len(r)) for r, _ in batch])
        counted = torch.tensor([[prompt <= i < len(r) for i in range(1, length)] for r, prompt in batch])
        with torch.inference_mode():
            logits = model(input_ids=ids).logits.float()  # padding is on the right: no real token sees it
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        total, count = total + float(loss[counted].double().sum()), count + int(counted.sum())
    return exp(total / count)


def speed(scratch: Path) -> None:
    """Seconds and peak memory of quantising a model of 8B layer shapes, in a process of its own."""
    from tests.tiny_llama import make_tiny_llama

    shape: dict[str, Any] = {
        "hidden_size": 4096, "ffn_size": 14336, "num_heads": 32, "num_kv_heads": 8, "vocab_size": 32000
    }  # fmt: skip
    model = make_tiny_llama(scratch / "hf", **shape, num_layers=2, dtype="bfloat16", shards=3)
    for _ in range(2):  # the second run finds the source in the page cache
        command = [sys.executable, "-m", "benchmarks.fp8_export", "--quantize-only", str(model), str(scratch / "fp8")]
        subprocess.run(command, check=True)


def quantize_and_measure(model: Path, out: Path) -> None:
    import shutil

    shutil.rmtree(out, ignore_errors=True)
    report = quantize_directory(model, out, max_shard_bytes=200 << 20)  # two workers need more than one file
    peak = int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024
    print(
        f"{report.bytes_before / 1e9:.2f} GB -> {report.bytes_after / 1e9:.2f} GB in {report.seconds:.1f} s "
        f"({report.gb_per_second:.2f} GB/s read), peak memory {peak / 1e6:.0f} MB, torch imported: "
        f"{'torch' in sys.modules}"
    )


if __name__ == "__main__":
    main()
