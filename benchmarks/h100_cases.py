"""What is measured: slices of Llama 3.1's shapes with as many layers as fit, by precision, task and length of a pack."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace

from coalm_nemo.config import RunConfig, SpeedSection
from coalm_nemo.models.llama import LlamaConfig
from coalm_nemo.planning.adapt import PRECISIONS, expected
from coalm_nemo.planning.shapes import SHAPES
from coalm_nemo.platform import Platform
from coalm_nemo.speed import FUSION_KERNEL
from recipes import load_recipe

ENGINE_FP8 = ("fp8_current", "fp8_blockwise", "fp8_delayed")
"""Transformer Engine's."""
TORCH_FP8 = "fp8_scaled_mm"
"""Measured where Transformer Engine is missing."""
LENGTHS = (4096, 8192)
SLICE_VOCABULARY = 16384
"""70B and 405B without their large tables, which would leave one GPU no room for layers: as a middle stage has none."""
TINY = LlamaConfig(2, 64, 128, 4, 2, 16, 256, 4096, 1e-5, 10000.0, None, False, "bfloat16")
STEPS, WARM_UP_STEPS, BATCH = 10, 3, 4


@dataclass(frozen=True)
class Case:
    """One measurement."""

    shape: str
    """8b | 70b | 405b | tiny"""
    task: str
    """full | lora"""
    precision: str
    seq_len_tokens: int
    tensor: int = 1
    """GPUs it takes, as tensor-parallel ranks."""
    overlap: bool = False
    """`speed.tensor_overlap`."""

    @property
    def name(self) -> str:
        split = f" TP{self.tensor}{' overlapped' if self.overlap else ''}" if self.tensor > 1 else ""
        return f"{self.shape} {self.task} {self.precision} {self.seq_len_tokens}{split}"


def speed_parts(gpus: int, engine: bool) -> dict[str, list[Case]]:
    """Cases by part, each part under ten minutes; `engine`: whether Transformer Engine is there."""
    parts = {f"{shape}-{n}": list(_slices(shape, n, engine)) for shape in SHAPES for n in LENGTHS}
    if gpus > 1:
        size = max(t for t in (2, 4, 8) if t <= gpus)
        fastest, ways = ("fp8_current", (False, True)) if engine else (TORCH_FP8, (False,))
        kinds = [(precision, on) for precision in ("bf16", fastest) for on in ways]
        parts["tensor"] = [Case("8b", "full", precision, LENGTHS[0], size, on) for precision, on in kinds]
    return parts


def _slices(shape: str, seq_len_tokens: int, engine: bool) -> Iterator[Case]:
    full = ("bf16", *ENGINE_FP8) if engine else ("bf16", TORCH_FP8)
    for task, precisions in (("full", full), ("lora", full[:2])):
        yield from (Case(shape, task, precision, seq_len_tokens) for precision in precisions)


SMOKE = {
    "tiny-64": [Case("tiny", "full", "bf16", 64), Case("tiny", "full", "fp8_emulated_current", 64)],
    "tiny-128": [Case("tiny", "lora", "bf16", 128), Case("tiny", "full", TORCH_FP8, 128)],
    "tensor": [Case("tiny", "full", "bf16", 64, tensor=2)],
}
"""The same code on a CPU in seconds."""


def make_run(case: Case, platform: Platform) -> RunConfig:
    """The recipe of the case's shape on `case.tensor` GPUs alone."""
    shape = "8b" if case.shape == "tiny" else case.shape
    run = load_recipe(f"coalm_{shape}" + ("_lora" if case.task == "lora" else ""))
    engine = platform.transformer_engine
    run.run.layers = "transformer_engine" if engine else "torch"
    run.parallel = RunConfig().parallel
    run.parallel.tensor = case.tensor
    run.precision.dtype = case.precision
    run.precision.fp8_params = bool(run.precision.fp8) and case.task == "full"
    if run.precision.weights == "float32":  # emulated FP8
        run.precision.gradients = "fp32"
    run.optimizer.moments = run.optimizer.moments if engine else "fp32"
    fuses = engine and case.task == "full" and importlib.util.find_spec(FUSION_KERNEL) is not None
    run.speed = SpeedSection(tensor_overlap=case.overlap, gradient_fusion=fuses, fused_loss=platform.is_cuda)
    run.train.seq_len_tokens, run.train.steps = case.seq_len_tokens, STEPS
    run.batch.global_size = BATCH
    run.logging.wandb, run.checkpoint.async_save = "disabled", False
    return run


def make_slice(case: Case, run: RunConfig, gpu: str) -> LlamaConfig | None:
    """The shape with the most layers that the planner fits on `gpu`; None where not even one does."""
    if case.shape == "tiny":
        return TINY
    whole = SHAPES[case.shape]
    if case.shape != "8b":
        whole = replace(whole, vocab_size=SLICE_VOCABULARY)
    fitting = [n for n in range(1, whole.num_layers + 1) if _fits(replace(whole, num_layers=n), run, case, gpu)]
    return replace(whole, num_layers=fitting[-1]) if fitting else None


def _fits(llama: LlamaConfig, run: RunConfig, case: Case, gpu: str) -> bool:
    assert run.precision.dtype in PRECISIONS
    plan = expected(run, llama, case.tensor, gpu)
    return plan is not None and plan.fits
