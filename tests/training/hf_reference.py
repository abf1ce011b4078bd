"""The same training in plain Hugging Face transformers and torch, as the truth that every layout has to meet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coalm_nemo.config import RunConfig
from coalm_nemo.data.sampler import NO_ITEM, items_at
from coalm_nemo.data.tokens import TokenRows


@dataclass(frozen=True)
class Reference:
    """Loss and gradient norm of each step."""

    losses: list[float]
    grad_norms: list[float]


def train_reference(run: RunConfig, rows: TokenRows, steps: int, model: Any = None) -> Reference:
    """AdamW in fp32 on one process, row by row; norms are not decayed; constant learning rate.

    `model`: one that is made otherwise (with adapters); all of its weights that want a gradient are trained.
    """
    model = model if model is not None else load_model(run)
    optimizer = make_adamw(model, run)
    losses, norms = [], []
    for step in range(steps):
        items = items_at(
            step * run.batch.global_size,
            run.batch.global_size,
            size=len(rows),
            seed=run.run.seed,
            shuffle=run.data.shuffle,
        )
        loss = backward_batch(model, rows, [int(i) for i in items if i != NO_ITEM])
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.clip_grad or float("inf"))))
        optimizer.step()
        losses.append(loss)
    return Reference(losses, norms)


def load_model(run: RunConfig) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(run.model.hf_path, dtype=torch.float32, attn_implementation="sdpa")


def make_adamw(model: Any, run: RunConfig) -> torch.optim.AdamW:
    """Weight decay on matrices only."""
    o = run.optimizer
    matrices = [p for p in model.parameters() if p.ndim > 1 and p.requires_grad]
    vectors = [p for p in model.parameters() if p.ndim == 1 and p.requires_grad]
    groups = [{"params": matrices, "weight_decay": o.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps)


def backward_batch(model: Any, rows: TokenRows, items: list[int]) -> float:
    """Gradients of the mean loss over all supervised tokens of the batch; returns that mean."""
    model.zero_grad(set_to_none=True)
    tokens = sum(int(rows.row(i)[1][1:].sum()) for i in items)
    total = 0.0
    for i in items:
        ids, mask = (torch.from_numpy(a.astype("int64")) for a in rows.row(i))
        logits = model(input_ids=ids[None]).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        loss = (losses * mask[1:]).sum() / tokens
        loss.backward()
        total += float(loss.detach().double())
    return total


def load_prepared(run_dir: Path) -> TokenRows:
    """The rows that a run in `run_dir` tokenised."""
    (path,) = (run_dir / "data").glob("train-*")
    return TokenRows.load(path)
