"""One command on a machine with H100s: numerics, BF16 and FP8 gates, and the speed and memory of slices of Llama's shapes.

    bash benchmarks/h100.sh                       # all parts, each under ten minutes; a part again: --part 8b-4096
    python -m benchmarks.h100 --smoke --out DIR   # the same code on a CPU in tiny shapes

Writes OUT/results.json and OUT/table.md after every part. With Transformer Engine its layers are measured; without it the
plain-torch ones, named as such, and FP8 is then torch's own scaled product (`fp8_scaled_mm`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform as machine
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.h100_cases import ENGINE_FP8, SMOKE, TORCH_FP8, Case, speed_parts
from coalm_nemo.errors import UserError
from coalm_nemo.platform import Platform, choose_platform

PART_LIMIT_S = 570.0
"""No case is begun after this; the part ends within ten minutes."""
CASE_S = 75.0
"""What a case is expected to take at most, start included."""
TARGETS = {"bf16": 550, "fp8_current": 700}
"""TFLOP/s (attention causal) that the 8B-shaped full slice is held against."""
GATE_STEPS, GATE_WARM_UP, GATE_BATCH = 200, 20, 16
NOT_MEASURED = "not measured"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU: shows that everything runs")
    parser.add_argument("--part", action="append", help="only this part; may be given more than once")
    parser.add_argument("--list", action="store_true", help="print the parts and end")
    parser.add_argument("--out", type=Path, default=Path("runs/h100"))
    args = parser.parse_args()
    try:
        where, gpus = find_platform(args.smoke)
        parts = [*FIXED_PARTS, *(SMOKE if args.smoke else speed_parts(gpus, where.transformer_engine))]
        if args.list:
            print("\n".join(parts))
            return 0
        if unknown := sorted(set(args.part or []) - set(parts)):
            raise UserError(f"there is no part {', '.join(unknown)}; there are {', '.join(parts)}")
    except UserError as e:
        print(f"h100: {e}", file=sys.stderr)
        return 2
    for part in args.part or parts:
        measure_part(part, where, gpus, args.out, smoke=args.smoke)
    if not args.part:
        print((args.out / "table.md").read_text(encoding="utf-8"))
    return 0


def find_platform(smoke: bool) -> tuple[Platform, int]:
    """Where to measure, and the number of GPUs. Raises UserError where there is no GPU and no smoke run is asked for."""
    import torch

    if smoke:
        return choose_platform("cpu"), 0
    if not torch.cuda.is_available():
        raise UserError(
            "torch sees no GPU here, and there is nothing to measure without one; --smoke tries the code on the CPU"
        )
    from importlib.util import find_spec

    layers = "auto" if find_spec("transformer_engine") else "torch"
    return choose_platform("cuda", layers), torch.cuda.device_count()


def measure_part(part: str, where: Platform, gpus: int, out: Path, *, smoke: bool) -> None:
    """Measure one part and write all that is known so far. Each piece runs in a process of its own."""
    out.mkdir(parents=True, exist_ok=True)
    print(f"== {part}", flush=True)
    if part in FIXED_PARTS:
        rows = FIXED_PARTS[part](where, out, smoke)
    else:
        cases = SMOKE if smoke else speed_parts(gpus, where.transformer_engine)
        rows = list(measure_cases(cases[part], out / part, smoke))
    path = out / "results.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"parts": {}}
    known |= {"machine": describe(where, gpus), "smoke": smoke}
    known["parts"][part] = rows
    for file, text in ((path, json.dumps(known, indent=1) + "\n"), (out / "table.md", table(known))):
        aside = file.with_name(file.name + ".partial")
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, file)


def measure_cases(cases: list[Case], out: Path, smoke: bool) -> Iterator[dict[str, Any]]:
    """A row a case; one that fails or has no time left says so."""
    started = time.monotonic()
    for number, case in enumerate(cases):
        left = PART_LIMIT_S - (time.monotonic() - started)
        if left < CASE_S:
            row: dict[str, Any] = {"case": case.name, "not_measured": "no time was left in its part"}
        else:
            row = {"case": case.name} | in_own_process({"case": vars(case), "smoke": smoke}, out / str(number), left)
        print(f"   {case.name}: {row.get('not_measured') or speed_words(row)}", flush=True)
        yield row


def in_own_process(task: dict[str, Any], out: Path, limit_s: float) -> dict[str, Any]:
    """What `--task` writes; a crash (out of memory, say) costs its own row only, and its log is kept."""
    out.mkdir(parents=True, exist_ok=True)
    answer, log = out / "answer.json", out / "log.txt"
    answer.unlink(missing_ok=True)
    problem = call(
        [sys.executable, "-m", "benchmarks.h100_task", json.dumps(task), str(out), str(answer)], log, limit_s
    )
    if problem or not answer.is_file():
        return {"not_measured": problem or f"it wrote no answer; see {log}"}
    return json.loads(answer.read_text(encoding="utf-8"))


def call(command: list[str], log: Path, limit_s: float, fine: tuple[int, ...] = (0,)) -> str:
    """Run a command and, past its time, end it with all that it started; what went wrong, or nothing."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"it took more than {limit_s:.0f} s; see {log}"
    return "" if code in fine else f"it ended with exit code {code}; see {log}"


def numerics(where: Platform, out: Path, smoke: bool) -> list[dict[str, Any]]:
    """Every layer spec and precision against transformers."""
    answer = in_own_process({"numerics": True, "smoke": smoke}, out / "numerics", PART_LIMIT_S)
    rows = answer.get("rows") or [{"variant": "all", **answer}]
    for row in rows:
        print(
            f"   {row['variant']}: {row.get('not_measured') or ('passed' if row['passed'] else 'NOT passed')}",
            flush=True,
        )
    return rows


def gates(where: Platform, out: Path, smoke: bool) -> list[dict[str, Any]]:
    """`coalm fp8-check`: FP8 against BF16, each recipe.

    The demo's nano base on the text it was made with, whose loss has a floor far from zero: there noise moves the loss by
    less than a thousandth, where the demo's own dialogues, which end at a loss of 0.01, move by several percent.
    """
    if smoke:
        names: tuple[str, ...] = ("fp8_emulated_current", TORCH_FP8)
    else:
        names = ENGINE_FP8 if where.transformer_engine else (TORCH_FP8,)
    from coalm_nemo.demo.pretraining_text import STAGES, write_stage
    from coalm_nemo.demo.tokenizer import build_tokenizer

    steps = 2 if smoke else GATE_STEPS
    stage, rows = replace(STAGES[-1], rows=steps * GATE_BATCH), out / "gate_rows.jsonl"
    write_stage(rows, build_tokenizer(), stage, 1)
    missing = [] if smoke or where.transformer_engine else list(ENGINE_FP8)
    limit_s = PART_LIMIT_S / len(names)
    return [_gate(name, rows, stage.seq_len_tokens, steps, out / name, limit_s, smoke) for name in names] + [
        {"gate": name, "not_measured": "needs Transformer Engine"} for name in missing
    ]


def _gate(
    precision: str, rows: Path, seq_len_tokens: int, steps: int, out: Path, limit_s: float, smoke: bool
) -> dict[str, Any]:
    from coalm_nemo.demo.pipeline import NANO_BASE

    out.mkdir(parents=True, exist_ok=True)
    layers = "auto" if smoke or precision in ENGINE_FP8 else "torch"
    words = [
        "--recipe", "nano_base", "--precision", precision, "--baseline", "bf16", "--steps", str(steps), "--out", str(out),
        f"run.dir={out / 'run'}", f"model.hf_path={NANO_BASE}", f"data.train={rows}", "schedule.name=linear",
        f"schedule.warmup_steps={min(GATE_WARM_UP, steps - 1)}", f"train.seq_len_tokens={seq_len_tokens}",
        f"batch.global_size={GATE_BATCH}", f"batch.micro_size={GATE_BATCH}",
        f"run.platform={'cpu' if smoke else 'cuda'}", f"run.layers={layers}",
    ]  # fmt: skip
    result = out / "fp8_check.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "coalm_nemo.cli", "fp8-check", *words]
    problem = call(command, out / "log.txt", limit_s, fine=(0, 1))  # 1: it ran, and did not pass
    if problem or not result.is_file():
        return {"gate": precision, "not_measured": problem or f"it wrote no verdict; see {out / 'log.txt'}"}
    found = json.loads(result.read_text(encoding="utf-8"))
    return {"gate": precision, "verdict": found["verdict"], "reason": found["reason"], "steps": found["steps"]}


FIXED_PARTS = {"numerics": numerics, "gates": gates}


def describe(where: Platform, gpus: int) -> dict[str, Any]:
    """Device, versions, date."""
    import torch

    packages = {}
    for name in ("torch", "megatron-core", "transformer-engine", "transformers"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    name = torch.cuda.get_device_name(0) if gpus else machine.processor() or machine.machine()
    layers = "Transformer Engine" if where.transformer_engine else "plain torch"
    return {
        "device": name,
        "gpus": gpus,
        "layers": layers,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "versions": packages,
    }


def speed_words(row: dict[str, Any]) -> str:
    """`31 layers, 9,876 tokens/s, 512 TFLOP/s`"""
    return f"{row['layers']} layers, {row['tokens_per_s_per_gpu']:,.0f} tokens/s, {row['tflops_causal']:,.1f} TFLOP/s"


def table(known: dict[str, Any]) -> str:
    """The results as Markdown; what is not known says "not measured" and why."""
    found = known["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in found["versions"].items())
    lines = [f"{found['gpus']} x {found['device']}, layers of {found['layers']}, {found['date']}; {versions}", ""]
    if known.get("smoke"):
        lines[:0] = ["A smoke run on tiny shapes: its figures mean nothing.", ""]
    parts = known["parts"]
    lines += [*_numerics_table(parts.get("numerics", [])), "", *_gates_table(parts.get("gates", [])), ""]
    lines += _speed_table([row for name, rows in parts.items() if name not in FIXED_PARTS for row in rows])
    return "\n".join([*lines, "", *_targets(parts)]) + "\n"


def _lines(head: str, rows: list[str]) -> list[str]:
    columns = head.count("|") - 1
    return [head, "|" + "---|" * columns, *rows] if rows else [f"{head} {NOT_MEASURED}"]


def _why(row: dict[str, Any]) -> str:
    return f"{NOT_MEASURED}: {row['not_measured']}"


def _numerics_table(rows: list[dict[str, Any]]) -> list[str]:
    made = [
        f"| {r['variant']} | {_why(r)} |  |  |" if "not_measured" in r
        else f"| {r['variant']} | {r['relative_gap']:.1e} | {r['least_cosine']:.6f} ({r['where']}) | {_passed(r['passed'])} |"
        for r in rows
    ]  # fmt: skip
    return _lines("| numerics | loss against transformers fp32 | least gradient cosine | |", made)


def _gates_table(rows: list[dict[str, Any]]) -> list[str]:
    made = [
        f"| {r['gate']} | {_why(r)} |  |" if "not_measured" in r
        else f"| {r['gate']}, {r['steps']} steps | {r['verdict']} | {r['reason']} |"
        for r in rows
    ]  # fmt: skip
    return _lines("| gate | verdict | |", made)


def _speed_table(rows: list[dict[str, Any]]) -> list[str]:
    head = "| slice | layers | tokens/s/GPU | TFLOP/s causal | full | MFU causal | GiB | of plan |"
    return _lines(head, [_speed_line(r) for r in rows])


def _speed_line(r: dict[str, Any]) -> str:
    if "not_measured" in r:
        return f"| {r['case']} | {r.get('layers', '')} | {_why(r)} |  |  |  |  |  |"
    mfu = f"{r['mfu_causal']:.1%}" if r["mfu_causal"] else ""
    memory = f"{r['memory_bytes'] / 2**30:.1f}" if r["memory_bytes"] else ""
    plan = f"{r['memory_over_plan']:.0%}" if r["memory_over_plan"] else ""
    return (
        f"| {r['case']} | {r['layers']} | {r['tokens_per_s_per_gpu']:,.0f} | {r['tflops_causal']:,.1f} | "
        f"{r['tflops_full']:,.1f} | {mfu} | {memory} | {plan} |"
    )


def _targets(parts: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The best 8B-shaped full slice of each precision against what is asked for."""
    lines = []
    rows = [r for name in ("8b-4096", "8b-8192") for r in parts.get(name, [])]
    for precision, target in TARGETS.items():
        named = [
            r for r in rows if r.get("task") == "full" and r.get("precision") == precision and "tflops_causal" in r
        ]
        best = max((r["tflops_causal"] for r in named), default=None)
        said = NOT_MEASURED if best is None else f"{best:,.0f} TFLOP/s, {_passed(best >= target)}"
        lines.append(f"8B-shaped, full, {precision}, at least {target} TFLOP/s (causal): {said}")
    return lines


def _passed(ok: bool) -> str:
    return "passed" if ok else "NOT passed"


if __name__ == "__main__":
    sys.exit(main())
