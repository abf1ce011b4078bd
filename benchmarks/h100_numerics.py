"""The same weights and rows through every layer spec and precision, against transformers in fp32."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coalm_nemo.config import RunConfig
from coalm_nemo.errors import UserError
from coalm_nemo.platform import Platform

SMALL = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 8}
SMALL |= {"num_key_value_heads": 4, "vocab_size": 4096, "max_position_embeddings": 2048, "rope_theta": 10000.0}
TINY = SMALL | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
LENGTH, TINY_LENGTH = 1024, 128
LOGIT_SPREAD = 1.6
"""Weights this wide make logits that tell tokens apart: with small ones any model's loss is that of guessing."""


@dataclass(frozen=True)
class Variant:
    """One way to compute the same thing, and how far it may be from transformers in fp32."""

    layers: str
    precision: str
    loss_tolerance: float
    """Relative."""
    least_cosine: float
    """Of a matrix's gradient with the torch spec's in fp32."""


FP32 = Variant("torch", "fp32", 1e-5, 0.999999)
BF16 = Variant("torch", "bf16", 5e-3, 0.99)
EMULATED = Variant("torch", "fp8_emulated_current", 1e-2, 0.6)
"""Weights as wide as these make the gradients of the first casts drift: emulated, FP8's cosine is 0.75 to 0.77."""
SCALED = Variant("torch", "fp8_scaled_mm", 1e-2, 0.6)
ENGINE = (
    Variant("transformer_engine", "bf16", 5e-3, 0.99),
    Variant("transformer_engine", "fp8_current", 1e-2, 0.6),
    Variant("transformer_engine", "fp8_blockwise", 1e-2, 0.6),
)
"""Delayed scaling needs its calibration; the gate runs it."""


def check(platform: Platform, out: Path, *, smoke: bool) -> list[dict[str, Any]]:
    """A row a variant. One rank, this process."""
    import torch

    from coalm_nemo.checkpoint.convert import import_checkpoint
    from coalm_nemo.data.batch import Shape
    from coalm_nemo.models.llama import load_llama_config
    from coalm_nemo.models.random_init import write_random_weights
    from coalm_nemo.training.feed import Feed
    from coalm_nemo.training.ranks import Ranks
    from coalm_nemo.training.setup import start_process_groups, stop_process_groups

    source, length = out / "config", TINY_LENGTH if smoke else LENGTH
    source.mkdir(parents=True, exist_ok=True)
    shape = TINY if smoke else SMALL
    wide = {"initializer_range": LOGIT_SPREAD / shape["hidden_size"] ** 0.5}
    raw = {"model_type": "llama", "dtype": "float32", "tie_word_embeddings": False, **shape, **wide}
    (source / "config.json").write_text(json.dumps(raw | {"architectures": ["LlamaForCausalLM"]}), encoding="utf-8")
    hf, base = write_random_weights(source, out / "hf", 7), out / "base"
    if not base.is_dir():
        import_checkpoint(hf, base)
    llama, rows = load_llama_config(hf), _rows(shape["vocab_size"], length)
    run = _run(FP32, length)
    start_process_groups(run, platform, Ranks(0, 0, 1, "single"), torch.distributed.HashStore())
    try:
        device = platform.device(0)
        feed = Feed(rows, run, Shape(length, True, 1, 0, 16), shuffle=False, data_rank=0, data_size=1)
        batch = feed.global_batch(0, None)
        micro = feed.micro_batches(batch, device)
        truth = transformers_loss(hf, [rows.row(r)[0] for r in batch.rows], device)
        variants = [
            FP32,
            BF16,
            *([EMULATED] if smoke else []),
            *([SCALED] if has_fp8(platform) else []),
            *(ENGINE if platform.transformer_engine else ()),
        ]
        computed = {v: _compute(llama, v, platform, base, micro, length) for v in variants}
    finally:
        stop_process_groups()
    missing = [] if platform.transformer_engine else [_missing(v) for v in ENGINE]
    return [_row(v, *computed[v], truth, computed[FP32][1]) for v in variants] + missing


def has_fp8(platform: Platform) -> bool:
    """Whether torch's scaled product runs here: on CPUs it does."""
    try:
        platform.refuse(SCALED.precision)
    except UserError:
        return False
    return True


def _run(variant: Variant, length: int) -> RunConfig:
    run = RunConfig()
    run.precision.dtype, run.run.layers = variant.precision, variant.layers
    run.train.seq_len_tokens, run.data.packing, run.data.pack_multiple = length, True, 1
    run.batch.global_size, run.logging.loss_by_source = 4, False
    return run


def _rows(vocabulary: int, length: int) -> Any:
    from coalm_nemo.data.tokens import TokenRows

    draw = np.random.default_rng(3)
    offsets = np.concatenate([[0], np.cumsum(draw.integers(length // 8, length, 24))]).astype(np.int64)
    tokens = draw.integers(0, vocabulary, int(offsets[-1]), dtype=np.int32)
    return TokenRows(tokens, np.ones_like(tokens, dtype=np.uint8), offsets, [str(i) for i in range(24)], "random")


def transformers_loss(hf: Path, rows: list[Any], device: Any) -> float:
    """Mean over all tokens, row by row, fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="sdpa").to(device)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids = torch.from_numpy(np.asarray(row, dtype=np.int64)).to(device)
            logits = model(input_ids=ids[None, :-1]).logits[0]
            total += float(torch.nn.functional.cross_entropy(logits.float(), ids[1:], reduction="sum"))
            count += len(ids) - 1
    return total / count


def _compute(
    llama: Any, variant: Variant, platform: Platform, base: Path, batches: list[Any], length: int
) -> tuple[float, dict[str, Any]]:
    """Mean loss, and the gradient of every matrix of the layers by name."""
    from dataclasses import replace

    from coalm_nemo.models.gpt import build_chunks
    from coalm_nemo.models.parallel_linears import LINEARS
    from coalm_nemo.training.checkpointing import load_model_state
    from coalm_nemo.training.step import run_schedule

    where = replace(platform, transformer_engine=variant.layers == "transformer_engine")
    (model,) = build_chunks(llama, _run(variant, length), where)
    load_model_state([model], base)
    model.config.finalize_model_grads_func = None
    total, tokens = sum(run_schedule([model], batches, length, forward_only=False)).tolist()
    matrices = {
        f"{layer.layer_number}:{path}": layer.get_submodule(path).weight
        for layer in model.decoder.layers
        for path in LINEARS
    }
    return total / tokens, {name: w.grad.detach().double().flatten().cpu() for name, w in matrices.items()}


def _name(variant: Variant) -> str:
    return f"{variant.layers} {variant.precision}"


def _missing(variant: Variant) -> dict[str, Any]:
    return {"variant": _name(variant), "not_measured": "needs Transformer Engine"}


def _row(
    variant: Variant, loss: float, gradients: dict[str, Any], truth: float, reference: dict[str, Any]
) -> dict[str, Any]:
    cosines = {n: float(g @ reference[n] / (g.norm() * reference[n].norm())) for n, g in gradients.items()}
    worst, gap = min(cosines, key=lambda n: cosines[n]), abs(loss / truth - 1)
    return {
        "variant": _name(variant),
        "loss": loss,
        "transformers_loss": truth,
        "relative_gap": gap,
        "least_cosine": cosines[worst],
        "where": worst,
        "passed": gap <= variant.loss_tolerance and cosines[worst] >= variant.least_cosine,
    }
