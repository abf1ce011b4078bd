"""Full fine-tuning, LoRA and QLoRA: checkpoint and weight bytes on the demo's model, memory by the planner for Llama.

OMP_NUM_THREADS=1 python -m benchmarks.adapters [--out runs/adapters]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from coalm_nemo.config import build_config
from coalm_nemo.models.llama import LlamaConfig, load_llama_config
from coalm_nemo.planning.command import PlanRequest, layout_of, make_job
from coalm_nemo.planning.flops import lora_parameters
from coalm_nemo.planning.hardware import GIB
from coalm_nemo.planning.search import search
from coalm_nemo.planning.shapes import find_shape
from recipes import load_recipe

NANO_BASE = Path(__file__).parent.parent / "coalm_nemo" / "demo" / "nano_base"
METHODS = {
    "full": [],
    "LoRA r8": ["lora.rank=8", "lora.alpha=16"],
    "QLoRA r8": ["lora.rank=8", "lora.alpha=16", "lora.base=nf4"],
}
SIZES = {
    "8b": {"full": (8, "coalm_8b"), "lora": (1, "coalm_8b_lora"), "qlora": (1, "coalm_8b_lora")},
    "70b": {"full": (32, "coalm_70b"), "lora": (8, "coalm_70b_lora"), "qlora": (1, "coalm_70b_lora")},
    "405b": {"full": (128, "coalm_405b"), "lora": (32, "coalm_405b_lora"), "qlora": (8, "coalm_405b_qlora")},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/adapters"))
    args = parser.parse_args()
    print(
        "| the demo's model, fp32 | checkpoint, bytes | weights in memory, bytes | loss of step 20 |\n|---|---:|---:|---:|"
    )
    for name, words in METHODS.items():
        print(f"| {name} | {' | '.join(demo(args.out, name, words))} |", flush=True)
    print("\n| model | method | H100 | GiB a GPU | tokens/s/GPU | checkpoint, GB |\n|---|---|---:|---:|---:|---:|")
    for shape, methods in SIZES.items():
        for method, (gpus, recipe) in methods.items():
            print(f"| {shape.upper()} | {method} | {' | '.join(planned(shape, method, gpus, recipe))} |", flush=True)


def demo(out: Path, name: str, words: list[str]) -> tuple[str, str, str]:
    """Twenty steps on rows of the demo's world."""
    from coalm_nemo.demo import rows

    run_dir, path = out / name.replace(" ", "_"), out / "rows.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        rows.write_rows(path, rows.training_rows(1, 100))
    command = [
        "train", "--recipe", "coalm_demo", "--nproc", "1", "parallel.tensor=1", "parallel.pipeline=1", "train.steps=20",
        f"run.dir={run_dir}", f"model.hf_path={NANO_BASE}", f"data.train={path}", *words,
    ]  # fmt: skip
    subprocess.run([sys.executable, "-m", "coalm_nemo.cli", *command], check=True, stdout=subprocess.DEVNULL)
    saved = sum(p.stat().st_size for p in (run_dir / "checkpoints").rglob("*.distcp"))
    loss = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["lm_loss"]
    return f"{saved:,}", f"{weight_bytes(load_llama_config(NANO_BASE), words):,.0f}", f"{loss:.3f}"


def weight_bytes(llama: LlamaConfig, words: list[str]) -> float:
    """Of the frozen or trained base and the adapters, as models/nf4.py and models/lora.py keep them."""
    from coalm_nemo.models.lora import num_parameters
    from coalm_nemo.planning.flops import linear_parameters
    from coalm_nemo.planning.memory import NF4_BYTES

    run = build_config(load_recipe("coalm_demo"), [], words)
    linear = llama.num_layers * linear_parameters(llama)
    rest = llama.num_parameters() - linear + num_parameters(llama, run.lora)
    return 4 * rest + (NF4_BYTES if run.lora.base == "nf4" else 4) * linear


def planned(shape: str, method: str, gpus: int, recipe: str) -> tuple[str, ...]:
    """The planner's best layout on so many GPUs; a checkpoint holds BF16 weights, FP32 masters and the moments."""
    run = load_recipe(recipe)
    job = make_job(PlanRequest(gpus=gpus, model=shape, method=method), run)
    best = search(job, layout_of(run)).fitting[0]
    trained = find_shape(shape)[1].num_parameters() if method == "full" else _adapters(shape, job.lora_rank)
    moments = 2 * (2 if run.optimizer.moments == "bf16" else 4)
    memory, speed = best.memory.worst.total / GIB, best.tokens_per_s_per_gpu
    return str(gpus), f"{memory:.1f}", f"{speed:,.0f}", f"{trained * (2 + 4 + moments) / 1e9:,.1f}"


def _adapters(shape: str, rank: int) -> float:
    model = find_shape(shape)[1]
    return model.num_layers * lora_parameters(model, rank, "all")


if __name__ == "__main__":
    main()
