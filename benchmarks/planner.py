"""The planner against published figures, its constants, the 405B plan, and how long a search takes.

Prints the tables of `benchmarks/results/planner.md`.

    python -m benchmarks.planner
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from statistics import median

from coalm_nemo.planning.constants import PRIOR, RANGES, Constants, fitted
from coalm_nemo.planning.costs import StepTime
from coalm_nemo.planning.estimate import Estimate, estimate
from coalm_nemo.planning.explain import CAUSES, shares
from coalm_nemo.planning.fit import leave_one_model_out, relative_error, summary
from coalm_nemo.planning.hardware import GIB, find_gpu
from coalm_nemo.planning.job import Job, Layout
from coalm_nemo.planning.published import Published, read_published
from coalm_nemo.planning.search import search
from coalm_nemo.planning.shapes import SHAPES

RUNS = 5


def main() -> None:
    """Print every table."""
    rows = read_published()
    throughput(rows)
    peaks(rows)
    constants(rows)
    not_fitted_on(rows)
    plan_405b()
    speed()


def throughput(rows: list[Published]) -> None:
    """Published and predicted tokens/s/GPU of every row."""
    crossed = leave_one_model_out(rows)
    errors = [relative_error(r, fitted()) for r in rows]
    print(
        "| model, task, precision | GPUs | batch | tokens | layout | published | predicted | error | model left out |"
    )
    print(f"|---|---:|---:|---:|---|{'---:|' * 4}")
    for r, error, left in zip(rows, errors, crossed, strict=True):
        predicted = estimate(r.job, r.layout).tokens_per_s_per_gpu
        print(
            f"| {r.model} {r.job.task} {r.job.precision} | {r.job.gpus} | {r.job.global_batch} | {r.job.seq_len_tokens} "
            f"| {r.layout.short()} | {r.tokens_per_s_per_gpu:g} | {predicted:.1f} | {error:+.1%} | {left:+.1%} |"
        )
    for what, found in (("fitted", summary(errors)), ("leave one model out", summary(crossed))):
        print(f"\n{what}: " + ", ".join(f"{k} {v:.1%}" for k, v in found.items()))


def peaks(rows: list[Published]) -> None:
    """Published peak memory, and ours on the first and on the fullest stage."""
    print("\n| GPUs | published | first stage | error | fullest stage |\n|---:|---:|---:|---:|---:|")
    for r in rows:
        if r.peak_memory_gb:
            e = estimate(r.job, r.layout).memory
            first, worst = e.first.allocated / GIB, e.worst.allocated / GIB
            error = first / r.peak_memory_gb - 1
            print(f"| {r.job.gpus} | {r.peak_memory_gb} | {first:.1f} | {error:+.1%} | {worst:.1f} |")


def constants(rows: list[Published]) -> None:
    """Each constant with its prior and range, and the error when it is not there."""
    base = summary([relative_error(r, fitted()) for r in rows])["rms"]
    neutral = {"hbm": 1.0, "attention": 1.0, "tensor_exposed": 0.0, "pipeline_exposed": 0.0, "data_exposed": 0.0}
    neutral["pass_overhead_s"] = 0.0
    print(f"\n| constant | fitted | prior | range | rms without it ({base:.1%} with all) |\n|---|---:|---:|---|---:|")
    for f in fields(Constants):
        low, high = RANGES[f.name]
        without = ""
        if f.name in neutral:
            changed = replace(fitted(), **{f.name: neutral[f.name]})
            without = f"{summary([relative_error(r, changed) for r in rows])['rms']:.1%}"
        value = getattr(fitted(), f.name)
        print(f"| {f.name} | {value:.4g} | {getattr(PRIOR, f.name):g} | {low:g} to {high:g} | {without} |")


def not_fitted_on(rows: list[Published]) -> None:
    """Published figures outside the CSV."""
    sft = next(r for r in rows if (r.model, r.job.task, r.job.precision) == ("llama3-70b", "sft", "fp8"))
    lora = next(r for r in rows if (r.model, r.job.task) == ("llama3-70b", "lora"))
    h200 = Job(SHAPES["405b"], 512, 1152, 8192, "pretrain", gpu=find_gpu("h200-141gb"))
    eight = Layout(tensor=4, pipeline=8, virtual_pipeline=8, context=2, count_embedding_and_loss=True)
    print("\n| published elsewhere | published | predicted | error |\n|---|---:|---:|---:|")
    for what, value, e in (
        ("70B SFT FP8, the layout of the row above, another container", 1812, estimate(sft.job, sft.layout)),
        ("70B LoRA FP8 on 8 GPUs, the same", 2520, estimate(lora.job, lora.layout)),
        ("405B FP8 on H200, TP4 (batch and the rest of the layout assumed)", 368.5, estimate(h200, eight)),
    ):
        print(f"| {what} | {value} | {e.tokens_per_s_per_gpu:.1f} | {e.tokens_per_s_per_gpu / value - 1:+.1%} |")


def plan_405b() -> None:
    """The layouts for 405B full SFT on 128 GPUs, beside the usual recipe's."""
    usual_job = Job(SHAPES["405b"], 128, 16, 2048, precision="bf16")
    usual = estimate(usual_job, Layout(tensor=8, pipeline=16, count_embedding_and_loss=True))
    print(f"\n| 405B SFT on 128 H100 | batch | {' | '.join(HEADINGS)} |\n|---|{'---:|' * (1 + len(HEADINGS))}")
    line("TP8 PP16, no VP, BF16, 2048", usual, usual)
    for batch in (64, 128):
        found = search(Job(SHAPES["405b"], 128, batch))
        low_bubble = next(e for e in found.fitting if e.bubble_fraction <= 0.03)
        wanted = [found.fitting[0], low_bubble, next(e for e in found.fitting if e.layout.context == 2)]
        for e in dict.fromkeys(e.layout for e in wanted):
            line(e.short(), next(x for x in found.fitting if x.layout == e), usual)
    best = search(Job(SHAPES["405b"], 128, 128)).fitting[0]
    print(f"\nA step of {best.layout.short()} at batch 128, {best.time.total:.2f} s:\n")
    print("| " + " | ".join(CAUSES.values()) + " |\n" + "|" + "---:|" * len(fields(StepTime)))
    print("| " + " | ".join(f"{v:.1%}" for v in shares(best.time).values()) + " |")


HEADINGS = ("tokens/s/GPU", "times", "bubble", "GiB, fullest", "spare", "epoch h", "GPU-hours")


def line(name: str, e: Estimate, usual: Estimate) -> None:
    """One layout as a table's line."""
    times = e.tokens_per_s_per_gpu / usual.tokens_per_s_per_gpu
    print(
        f"| {name} | {e.job.global_batch} | {e.tokens_per_s_per_gpu:.0f} | {times:.2f} | {e.bubble_fraction:.1%} "
        f"| {e.memory.worst.total / GIB:.1f} | {e.spare / GIB:.1f} | {e.epoch_gpu_hours / e.job.gpus:.2f} "
        f"| {e.epoch_gpu_hours:.0f} |"
    )


def speed() -> None:
    """Seconds of searches, and of a whole process."""
    print(f"\n| what | layouts | seconds, median of {RUNS} |\n|---|---:|---:|")
    for what, job in (
        ("405B SFT on 128", Job(SHAPES["405b"], 128, 128)),
        ("405B SFT on 1024", Job(SHAPES["405b"], 1024, 512)),
        ("405B pretraining on 1024", Job(SHAPES["405b"], 1024, 1536, 8192, "pretrain")),
        ("70B pretraining on 1024", Job(SHAPES["70b"], 1024, 1024, 8192, "pretrain")),
    ):
        found = search(job)
        seconds = timed(lambda job=job: search(job))  # type: ignore[misc]
        print(f"| search, {what} | {len(found.fitting) + len(found.too_large)} | {seconds:.2f} |")
    script = "from coalm_nemo.planning.command import *; plan_command(PlanRequest(model='405b', gpus=128))"
    command = [sys.executable, "-c", script]
    seconds = timed(lambda: subprocess.run(command, check=True, capture_output=True))
    print(f"| a whole process, 405B SFT on 128 | | {seconds:.2f} |")


def timed(action: Callable[[], object]) -> float:
    """Median seconds of `RUNS` runs."""
    taken = []
    for _ in range(RUNS):
        started = time.perf_counter()
        action()
        taken.append(time.perf_counter() - started)
    return median(taken)


if __name__ == "__main__":
    main()
