"""`coalm data build` against the tokenizer alone, and its memory on a small and a large set.

The rows have the kinds, shares and mean lengths of CoALM-IT; their words are Python's own documentation, so that no
file is needed but a tokenizer. Speed: wall time of the whole command (start, parsing, rendering, checks, packing,
writing) against `tokenizers.encode_batch` on the same rendered text with as many threads, taking turns. Memory: the
proportional set size of all processes together, sampled.

    python -m benchmarks.data_build --tokenizer Llama-3.1-8B-Instruct [--rows 30000] [--rounds 3] [--memory]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

SHARES = {"snips": 13_084, "hammer": 202_500, "toolace": 13_819, "cra": 82_236}
"""Rows of CoALM-IT by kind."""
ALL_ROWS = 311_639
COALM = [sys.executable, "-m", "coalm_nemo.cli"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=30_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sgd", type=Path, help="also on CRA rows of these SGD files")
    parser.add_argument("--memory", action="store_true", help="peak memory on --rows and on 311,639 rows")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        small = write_rows(Path(scratch) / "small.jsonl", args.rows)
        speed(Path(scratch), args.tokenizer, "mix", ["--source", f"released={small}"], args.rounds)
        if args.sgd:
            speed(Path(scratch), args.tokenizer, "SGD", ["--source", f"sgd={args.sgd}"], args.rounds)
        if args.memory:
            large = write_rows(Path(scratch) / "large.jsonl", ALL_ROWS)
            peaks = [memory(Path(scratch), args.tokenizer, file) for file in (small, large)]
            print(f"memory: {ALL_ROWS:,} rows take {peaks[1] / peaks[0]:.2f} x what {args.rows:,} rows take")


def speed(scratch: Path, tokenizer: Path, name: str, source: list[str], rounds: int) -> None:
    """Print tokens/s of the build and of the tokenizer, and the median of the ratios."""
    ratios = []
    for number in range(rounds):
        out = scratch / f"{name}{number}"
        seconds = build(out, tokenizer, source)
        tokens, alone = encode_batch_seconds(out, tokenizer)
        ratios.append(alone / seconds)
        print(
            f"{name}, round {number}: {tokens:,} tokens; build {tokens / seconds:,.0f} tokens/s, "
            f"encode_batch {tokens / alone:,.0f} tokens/s, ratio {ratios[-1]:.2f}"
        )
        shutil.rmtree(out)
    if ratios:
        print(f"{name}: median ratio {statistics.median(ratios):.2f}")


def build(out: Path, tokenizer: Path, source: list[str]) -> float:
    """Wall seconds of the command."""
    started = time.perf_counter()
    words = ["data", "build", *source, "--tokenizer", str(tokenizer), "--out", str(out)]
    subprocess.run([*COALM, *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def encode_batch_seconds(directory: Path, tokenizer: Path) -> tuple[int, float]:
    """(tokens, seconds) of `encode_batch` over the set's text, 1,000 rows a call; reading and decoding not counted."""
    from tokenizers import Tokenizer

    from coalm_nemo.data.shards import ShardSet

    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.environ["RAYON_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
    core = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    rows, tokens, seconds = ShardSet.load(directory), 0, 0.0
    for start in range(0, len(rows), 1000):
        ids = [rows.row(i)[0].tolist() for i in range(start, min(start + 1000, len(rows)))]
        texts = core.decode_batch(ids, skip_special_tokens=False)
        begun = time.perf_counter()
        encoded = core.encode_batch(texts, add_special_tokens=False)
        seconds += time.perf_counter() - begun
        tokens += sum(len(e.ids) for e in encoded)
    assert tokens == len(rows.tokens), "the tokenizer alone gives other tokens"
    return tokens, seconds


def memory(scratch: Path, tokenizer: Path, file: Path) -> int:
    """Peak bytes of the command and its workers together; printed."""
    out = scratch / "measured"
    words = ["data", "build", "--source", f"released={file}", "--tokenizer", str(tokenizer), "--out", str(out)]
    started = time.perf_counter()
    process = subprocess.Popen([*COALM, *words], stdout=subprocess.DEVNULL)
    peak = Peak(process.pid)
    assert process.wait() == 0
    seconds = time.perf_counter() - started
    manifest = json.loads((out / "manifest.json").read_text())
    print(
        f"memory: {manifest['rows']:,} rows, {manifest['tokens']:,} tokens: peak {peak.stop() / 2**20:,.0f} MiB, "
        f"{manifest['tokens'] / seconds:,.0f} tokens/s, fill {manifest['fill']:.2%}"
    )
    shutil.rmtree(out)
    return peak.bytes


class Peak:
    """Samples what a process tree holds, shared pages counted once."""

    def __init__(self, pid: int) -> None:
        self.root, self.bytes, self.running = psutil.Process(pid), 0, True
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()

    def _sample(self) -> None:
        while self.running:
            total = 0
            try:
                for process in [self.root, *self.root.children(recursive=True)]:
                    total += process.memory_full_info().pss
            except psutil.Error:
                total = 0  # one of them just ended
            self.bytes = max(self.bytes, total)
            time.sleep(0.2)

    def stop(self) -> int:
        self.running = False
        self.thread.join()
        return self.bytes


def write_rows(path: Path, count: int) -> Path:
    """`count` Alpaca rows of CoALM-IT's kinds in its shares."""
    with path.open("w", encoding="utf-8") as file:
        for row in make_rows(count):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def make_rows(count: int, seed: int = 0) -> Iterator[dict[str, str]]:
    draw = random.Random(seed)
    words = documentation()
    tools = [tool(draw, words) for _ in range(51)]
    for _ in range(count):
        kind = draw.choices(list(SHARES), list(SHARES.values()))[0]
        if kind == "cra":
            yield cra_row(draw, words, tools)
        elif kind == "snips":
            slots = "\n".join(f"{t.partition('(')[0]}: {t}" for t in tools[:38])
            yield {
                "instruction": f"Track the state.\n{slots}",
                "input": f"User: {some(draw, words, 9)}",
                "output": 'System: {"domain": "x", "slot_values": {"y": "' + some(draw, words, 2) + '"}}',
            }
        else:
            yield tool_row(draw, words)


def documentation() -> list[str]:
    from pydoc_data.topics import topics

    return " ".join(topics.values()).split()


def some(draw: random.Random, words: list[str], count: int) -> str:
    start = draw.randrange(len(words) - count)
    return " ".join(words[start : start + count])


def tool(draw: random.Random, words: list[str]) -> str:
    names = [w for w in some(draw, words, 12).split() if w.isidentifier()][:4]
    return f"Tool{draw.randrange(10**6)}({', '.join(names)})"


def tool_row(draw: random.Random, words: list[str]) -> dict[str, str]:
    """Hammer's form: every row has its own tools, as one line of JSON."""
    tools = []
    for _ in range(draw.randint(1, 4)):
        parameters = {
            f"p{draw.randrange(1000)}": {"type": "str", "description": some(draw, words, draw.randint(5, 14))}
            for _ in range(draw.randint(1, 5))
        }
        name = f"f{draw.randrange(10**9)}"
        tools.append({"name": name, "description": some(draw, words, draw.randint(8, 16)), "parameters": parameters})
    calls = [{"name": t["name"], "arguments": {p: some(draw, words, 2) for p in t["parameters"]}} for t in tools[:2]]
    head = f"[BEGIN OF TASK INSTRUCTION]\n{' '.join(words[:60])}\n[END OF TASK INSTRUCTION]\n"
    head += f"[BEGIN OF AVAILABLE TOOLS]\n{json.dumps(tools)}\n[END OF AVAILABLE TOOLS]\n"
    head += f"[BEGIN OF FORMAT INSTRUCTION]\n{' '.join(words[60:120])}\n[END OF FORMAT INSTRUCTION]"
    query = some(draw, words, draw.randint(10, 40))
    return {
        "instruction": head,
        "input": f"[BEGIN OF QUERY]\n{query}\n[END OF QUERY]",
        "output": json.dumps(calls),
    }


def cra_row(draw: random.Random, words: list[str], tools: list[str]) -> dict[str, str]:
    """Fifty-one signatures that stand in every row, and a history of its own."""
    history = "".join(
        f"User: {some(draw, words, 12)}\nThought: {some(draw, words, 14)}\nSystem: {some(draw, words, 12)}\n"
        for _ in range(draw.randint(0, 5))
    )
    head = f"{' '.join(words[:50])}\n[BEGIN OF AVAILABLE TOOLS]\n" + "\n".join(tools) + "\n[END OF AVAILABLE TOOLS]\n"
    head += f"[BEGIN OF CONVERSATION HISTORY]\n{history}[END OF CONVERSATION HISTORY]"
    asked = f"User: {some(draw, words, 12)}\nThought: {some(draw, words, 20)}"
    return {"instruction": head, "input": asked, "output": f"Action: {tools[0].partition('(')[0]}(a='x', n=2)"}


if __name__ == "__main__":
    main()
