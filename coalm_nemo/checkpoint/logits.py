"""Do the Hugging Face model and the Megatron checkpoint say the same? Logits on a few prompts, in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coalm_nemo.models.llama import LlamaConfig, load_llama_config

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-4
"""Largest allowed difference relative to the largest logit: what fp32 sums in another order come to, with room."""


@dataclass(frozen=True)
class LogitReport:
    """Over all positions of all prompts."""

    max_abs_difference: float
    max_abs_logit: float
    prompts: int

    @property
    def ok(self) -> bool:
        return self.max_abs_difference <= TOLERANCE * max(1.0, self.max_abs_logit)


def compare_logits(hf_dir: Path, ckpt: Path) -> LogitReport | None:
    """Run both models one after the other; None where one does not fit into this machine's memory."""
    import psutil
    import torch

    llama = load_llama_config(hf_dir)
    if 4 * llama.num_parameters() * 1.5 > psutil.virtual_memory().available:
        return None
    prompts = draw_prompts(llama)
    ours = megatron_logits(llama, ckpt, prompts)
    theirs = hf_logits(hf_dir, prompts)
    worst = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    largest = max(float(t.abs().max()) for t in theirs)
    if any(not torch.isfinite(t).all() for t in [*ours, *theirs]):
        worst = float("inf")
    return LogitReport(worst, largest, len(prompts))


def draw_prompts(llama: LlamaConfig) -> list[torch.Tensor]:
    """Random token sequences of several lengths, int64 [1, s]; every vocabulary entry may come."""
    import torch

    generator = torch.Generator().manual_seed(0)
    lengths = [min(llama.max_positions, n) for n in (1, 17, 64, 200)]
    return [torch.randint(llama.vocab_size, (1, n), generator=generator) for n in lengths]


def hf_logits(hf_dir: Path, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    """transformers' logits, fp32 [s, vocab] a prompt."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(str(hf_dir), dtype=torch.float32, local_files_only=True)
    with torch.no_grad():
        return [model(input_ids=p).logits[0] for p in prompts]


def megatron_logits(llama: LlamaConfig, ckpt: Path, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    """megatron-core's logits on CPU, fp32 [s, vocab] a prompt."""
    import torch

    with single_rank_model(llama, ckpt) as model, torch.no_grad():
        return [_forward(model, p)[0] for p in prompts]


def _forward(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    import torch

    positions = torch.arange(tokens.size(1))[None]
    return model(input_ids=tokens, position_ids=positions, attention_mask=None)


@contextmanager
def single_rank_model(llama: LlamaConfig, ckpt: Path) -> Iterator[Any]:
    """The checkpoint as a megatron-core model in fp32 on the CPU of this process, in a world of one rank."""
    import torch

    from coalm_nemo.training.worker import quiet_libraries

    quiet_libraries()  # before megatron-core is imported: it warns then
    from coalm_nemo.config import RunConfig
    from coalm_nemo.models.gpt import build_chunks
    from coalm_nemo.platform import choose_platform
    from coalm_nemo.training.checkpointing import load_model_state
    from coalm_nemo.training.ranks import Ranks
    from coalm_nemo.training.setup import start_process_groups, stop_process_groups

    run = RunConfig()
    run.precision.dtype = "fp32"
    platform = choose_platform("cpu")
    start_process_groups(run, platform, Ranks(0, 0, 1, "single"), torch.distributed.HashStore())
    try:
        (model,) = build_chunks(llama, run, platform)
        load_model_state([model], ckpt)
        yield model.eval()
    finally:
        stop_process_groups()
