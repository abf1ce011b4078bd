"""Our learning-rate schedule as a NeMo scheduler module. Imported only where NeMo is."""

# No `from __future__ import annotations` here: nemo_run's command reads the arguments' types, not their names.

from collections.abc import Callable
from functools import partial
from typing import Any

from nemo.lightning.pytorch.optim.base import LRSchedulerModule
from torch.optim.lr_scheduler import LambdaLR

from recipes.nemo.learning_rate import learning_rate


class MegatronSchedule(LRSchedulerModule):
    """Linear warm-up from 0, then constant, linear or cosine down to `min_lr` at the last step."""

    def __init__(self, name: str, warmup_steps: int, max_steps: int, min_lr: float = 0.0) -> None:
        super().__init__()
        self.name = name
        self.warmup_steps = warmup_steps
        self.max_steps = max_steps
        """NeMo's strategy sets it to the trainer's, so that a changed trainer.max_steps is followed."""
        self.min_lr = min_lr

    def scheduler(self, model: Any, optimizers: Any) -> dict[str, Any]:
        """Lightning's dictionary: one step of the schedule an optimizer step."""
        factors: list[Callable[[int], float]] = [
            partial(self._factor, group.get("initial_lr", group["lr"])) for group in optimizers.param_groups
        ]
        scheduler = LambdaLR(optimizers, factors)
        return {
            "optimizer": optimizers,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": 1},
            "monitor": "val_loss",
        }

    def _factor(self, lr: float, step: int) -> float:
        if not lr:
            return 0.0
        now = learning_rate(
            step,
            name=self.name,
            lr=lr,
            min_lr=self.min_lr,
            warmup_steps=self.warmup_steps,
            total_steps=self.max_steps,
        )
        return now / lr
