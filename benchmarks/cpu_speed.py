"""Tokens a CPU-second of our training loop, of the bare megatron-core step inside it, and of a plain transformers loop.

One process, one thread, the same model, rows, batch and optimizer; the three take turns in blocks of steps, and the
ratios are taken block by block, so that a machine whose speed drifts does not decide the result.

    OMP_NUM_THREADS=1 python benchmarks/cpu_speed.py [--blocks 8] [--steps 6]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

SHAPE = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8}
SHAPE |= {"num_key_value_heads": 4, "vocab_size": 4096, "max_position_embeddings": 512, "rope_theta": 10000.0}
ROWS, LENGTH, BATCH = 256, 129, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        contenders = {"transformers": hf_loop(False), "transformers, fused AdamW": hf_loop(True)}
        contenders |= our_loop(Path(scratch))
        report(measure(contenders, args.blocks, args.steps), args.steps)


def measure(contenders: dict[str, Callable[[int], None]], blocks: int, steps: int) -> dict[str, list[float]]:
    """CPU seconds of each block, after a warm-up block each."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for block in range(blocks + 1):
        for name, train in contenders.items():
            started = time.process_time()
            for step in range(steps):
                train(block * steps + step)
            if block:
                seconds[name].append(time.process_time() - started)
    return seconds


def report(seconds: dict[str, list[float]], steps: int) -> None:
    tokens = steps * BATCH * (LENGTH - 1)
    rates = {name: round(tokens / statistics.median(s)) for name, s in seconds.items()}
    result = {
        "tokens_per_cpu_s": rates,
        "loop_over_transformers": ratio(seconds, "transformers", "loop"),
        "loop_over_transformers_fused": ratio(seconds, "transformers, fused AdamW", "loop"),
        "loop_overhead_over_bare_step": round(ratio(seconds, "loop", "bare step") - 1, 3),
    }
    print(json.dumps(result, indent=1))


def ratio(seconds: dict[str, list[float]], above: str, below: str) -> float:
    """Median over blocks of one contender's seconds divided by another's."""
    return round(statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True)), 3)


def token_rows() -> Any:
    from coalm_nemo.data.tokens import TokenRows

    tokens = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], ROWS * LENGTH, dtype=np.int32)
    offsets = np.arange(ROWS + 1, dtype=np.int64) * LENGTH
    return TokenRows(tokens, np.ones_like(tokens, dtype=np.uint8), offsets, [str(i) for i in range(ROWS)], "random")


def hf_loop(fused: bool) -> Callable[[int], None]:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01, fused=fused)
    rows = torch.from_numpy(token_rows().tokens.astype(np.int64)).view(ROWS, LENGTH)

    def step(number: int) -> None:
        batch = rows[[(number * BATCH + i) % ROWS for i in range(BATCH)]]
        optimizer.zero_grad(set_to_none=True)
        logits = model(input_ids=batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()

    return step


def our_loop(scratch: Path) -> dict[str, Callable[[int], None]]:
    """ "loop": a step as `coalm train` runs it, with feed and callbacks; "bare step": megatron-core's calls alone."""
    from coalm_nemo.config import RunConfig
    from coalm_nemo.data.batch import Shape
    from coalm_nemo.models.llama import parse_llama_config
    from coalm_nemo.platform import choose_platform
    from coalm_nemo.training.callbacks.base import RunStart
    from coalm_nemo.training.callbacks.metrics_file import MetricsFile
    from coalm_nemo.training.feed import Feed
    from coalm_nemo.training.loop import Loop
    from coalm_nemo.training.prefetch import Prefetcher
    from coalm_nemo.training.ranks import Ranks
    from coalm_nemo.training.setup import build_trainee, start_process_groups
    from coalm_nemo.training.throughput import Meter
    from coalm_nemo.training.worker import quiet_libraries
    from coalm_nemo.validate import check_run

    quiet_libraries()
    run = RunConfig()
    run.precision.dtype, run.optimizer.lr, run.schedule.name = "fp32", 1e-4, "constant"
    run.batch.global_size, run.batch.micro_size, run.train.seq_len_tokens, run.train.steps = BATCH, BATCH, 512, 10**6
    llama = parse_llama_config({"model_type": "llama", **SHAPE})
    platform, device = choose_platform("cpu"), torch.device("cpu")
    start_process_groups(run, platform, Ranks(0, 0, 1, "single"), torch.distributed.HashStore())
    trainee = build_trainee(llama, run, platform, run.train.steps, lambda models: None)
    feed = Feed(token_rows(), run, Shape(512, False), shuffle=True, data_rank=0, data_size=1)
    metrics = MetricsFile(scratch / "metrics.jsonl")
    metrics.on_start(RunStart(run, check_run(run, llama, 1), ROWS, ROWS, 1.0, 0, run.train.steps, 0))
    meter = Meter(run, llama, 1, feed.positions, feed.fill(), device, print)
    loop = Loop(run, trainee, feed, None, None, [metrics], device, run.train.steps, None, meter)  # type: ignore[arg-type]
    batches = Prefetcher(feed, device, 0, None, run.train.steps)
    fixed = feed.micro_batches(feed.global_batch(0, None), device)

    def looped(number: int) -> None:
        loop._step(number, batches.next(), stop=False)

    return {"loop": looped, "bare step": lambda number: bare_step(trainee, fixed)}


def bare_step(trainee: Any, batches: list[Any]) -> None:
    """What any program that uses megatron-core has to call, on a batch made beforehand."""
    from coalm_nemo.training.step import run_schedule

    for chunk in trainee.chunks:
        chunk.zero_grad_buffer()
    trainee.optimizer.zero_grad()
    losses = run_schedule(trainee.chunks, batches, LENGTH - 1, forward_only=False)
    trainee.optimizer.step()
    trainee.scheduler.step(increment=1)
    losses[0].tolist()


if __name__ == "__main__":
    main()
