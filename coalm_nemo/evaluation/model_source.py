"""Which model answers, as the user names it: a Hugging Face directory, an endpoint, or the gold answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from coalm_nemo.errors import UserError

if TYPE_CHECKING:
    from coalm_nemo.evaluation.base import AnswerModel

GOLD = "gold"
Kind = Literal["gold", "local", "endpoint"]


@dataclass(frozen=True)
class ModelSource:
    """What was asked for; nothing is loaded yet."""

    model: str = ""
    """An HF directory, or `gold`."""
    endpoint: str = ""
    """Base URL of an OpenAI-compatible server, such as http://localhost:8000/v1."""
    model_name: str = ""
    """The model's name at the endpoint."""
    batch_size: int = 16
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""
    device: str = "auto"
    temperature: float = 0.0
    """0: greedy."""
    seed: int = 0
    concurrency: int = 16
    requests_per_minute: float = 0.0
    """0: no limit."""
    retries: int = 5
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        if bool(self.model) == bool(self.endpoint):
            raise UserError("name the model: either --model HF_DIR (or gold), or --endpoint URL with --model-name")
        if self.endpoint and not self.model_name:
            raise UserError("--endpoint needs --model-name, the model's name at that server")
        if self.model and self.model_name:
            raise UserError("--model-name goes with --endpoint; a directory of --model needs no other name")
        if self.model and self.model != GOLD and not Path(self.model).is_dir():
            raise UserError(f"{self.model} is not a directory; --model is a Hugging Face directory, or gold")
        if self.dtype not in ("auto", "bf16", "fp32"):
            raise UserError(f"--dtype {self.dtype}: write auto, bf16 or fp32")
        self._check_numbers()

    def _check_numbers(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size}: it must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature {self.temperature}: it must not be negative")
        if self.concurrency < 1 or self.retries < 0:
            raise UserError("--concurrency must be at least 1 and --retries not negative")
        if not 0 <= self.requests_per_minute < float("inf") or not 0 < self.timeout_s < float("inf"):
            raise UserError("--requests-per-minute must not be negative and --timeout-s must be above 0")

    @property
    def kind(self) -> Kind:
        if self.endpoint:
            return "endpoint"
        return "gold" if self.model == GOLD else "local"

    @property
    def name(self) -> str:
        """How scores name the model."""
        return self.model_name if self.kind == "endpoint" else self.model

    def open(self) -> AnswerModel:
        """The model, ready to answer. Raises UserError."""
        if self.kind == "gold":
            from coalm_nemo.evaluation.gold_model import GoldModel

            return GoldModel()
        if self.kind == "endpoint":
            from coalm_nemo.evaluation.endpoint_model import EndpointModel

            return EndpointModel.from_source(self)
        from coalm_nemo.evaluation.fingerprint import directory_fingerprint
        from coalm_nemo.evaluation.local_model import LocalModel

        return LocalModel.from_source(self, directory_fingerprint(Path(self.model)))

    def settings(self, model: AnswerModel) -> dict[str, Any]:
        """What the opened model's answers depend on beside it and the prompt; part of every kept answer's key."""
        kept: dict[str, Any] = {"temperature": self.temperature}
        if self.temperature > 0:
            kept["seed"] = self.seed
        if self.kind == "local":
            kept["dtype"] = getattr(model, "dtype", self.dtype)
        return kept
