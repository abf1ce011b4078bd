"""The learning rate of a step, as megatron-core's OptimizerParamScheduler has it: NeMo's schedules start one step later."""

from __future__ import annotations

import math


def learning_rate(step: int, *, name: str, lr: float, min_lr: float, warmup_steps: int, total_steps: int) -> float:
    """After `step` optimizer steps. `name`: constant | linear | cosine."""
    if warmup_steps and step <= warmup_steps:
        return lr * step / warmup_steps
    if name == "constant":
        return lr
    decay_steps = max(total_steps, warmup_steps + 1)
    if step > decay_steps:
        return min_lr
    done = (step - warmup_steps) / (decay_steps - warmup_steps)
    left = 1 - done if name == "linear" else 0.5 * (math.cos(math.pi * done) + 1)
    return min_lr + left * (lr - min_lr)
