"""The harness's models: a Hugging Face directory, and one that knows the answers of local tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coalm_nemo.evaluation.model_source import ModelSource


def hf_model(source: ModelSource) -> Any:
    """The harness's own Hugging Face model: likelihoods and greedy text."""
    import torch
    from lm_eval.models.huggingface import HFLM

    device = source.device if source.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = {"bf16": "bfloat16", "fp32": "float32"}.get(source.dtype, "bfloat16" if device != "cpu" else "float32")
    directory = str(Path(source.model).absolute())
    return HFLM(pretrained=directory, tokenizer=directory, device=device, dtype=dtype, batch_size=source.batch_size)


def gold_model() -> Any:
    """Gives the right choice the highest likelihood and writes every target; only local tasks carry them in their rows."""
    from lm_eval.api.model import LM

    class Gold(LM):
        def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
            right = [r.idx == r.doc["gold"] for r in requests]
            return [(0.0, True) if r else (-1000.0, False) for r in right]

        def loglikelihood_rolling(self, requests: Any) -> list[float]:
            raise NotImplementedError("no local task asks for the likelihood of a whole text")

        def generate_until(self, requests: Any) -> list[str]:
            return [r.doc["target"] for r in requests]

    return Gold()
