"""When a row of a batch is done: each has its own limit and stop strings. Imports torch: for `local_model` alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import StoppingCriteria


class RowsDone(StoppingCriteria):
    """transformers asks after every token, with all tokens so far [rows, tokens]; the answer is bool [rows]."""

    def __init__(
        self, tokenizer: Any, prompt_tokens: int, limits: Sequence[int], stops: Sequence[Sequence[str]]
    ) -> None:
        self.tokenizer, self.prompt_tokens, self.stops = tokenizer, prompt_tokens, stops
        self.limits = torch.tensor(limits)
        # A character is at most four byte tokens: this tail holds any stop string that the newest token ends.
        self.tails = [4 * max((len(s) for s in stop), default=0) + 4 for stop in stops]
        self.stopped = [False] * len(stops)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        new = input_ids[:, self.prompt_tokens :]
        done = self.limits.to(input_ids.device) <= new.shape[1]
        for row, stop in enumerate(self.stops):
            if stop and not self.stopped[row]:
                text = self.tokenizer.decode(new[row, -self.tails[row] :].tolist(), skip_special_tokens=True)
                self.stopped[row] = any(s in text for s in stop)
        return done | torch.tensor(self.stopped, device=input_ids.device)
