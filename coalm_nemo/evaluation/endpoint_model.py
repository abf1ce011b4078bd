"""Any OpenAI-compatible server that answers: vLLM, SGLang, a hosted model. Many requests at once, under a rate limit.

The key comes from the environment (OPENAI_API_KEY) and goes to the given host alone (`chat_client`).
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any

from coalm_nemo.chat_client import ChatClient, Refused
from coalm_nemo.evaluation.base import Prompt
from coalm_nemo.evaluation.runner import Reply, cut_at_stop, in_order

if TYPE_CHECKING:
    from coalm_nemo.evaluation.model_source import ModelSource

MOST_STOP_STRINGS = 4
"""OpenAI takes no more; the answer is cut at the others here."""
_TOO_LONG = (
    "context length",
    "context_length",
    "maximum context",
    "too long",
    "longer than the maximum",
    "max_model_len",
)


class RateLimit:
    """At most so many requests a minute, evenly spaced; 0: no limit. Used by many threads."""

    def __init__(self, requests_per_minute: float) -> None:
        self.gap_s = 60 / requests_per_minute if requests_per_minute > 0 else 0.0
        self._lock = threading.Lock()
        self._next = 0.0

    def wait(self, stop: threading.Event) -> None:
        """Until it is this request's turn, or `stop` is set."""
        if not self.gap_s:
            return
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self.gap_s
        stop.wait(turn - now)


class EndpointModel:
    """A named model at a base URL. Raises UserError where nothing answers there or every request is refused."""

    def __init__(
        self,
        url: str,
        model_name: str,
        *,
        concurrency: int = 16,
        requests_per_minute: float = 0.0,
        retries: int = 5,
        timeout_s: float = 120.0,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.client = ChatClient(url, retries, timeout_s, option="--endpoint")
        self.name = model_name
        self.fingerprint = hashlib.blake2b(f"{self.client.url}\0{model_name}".encode(), digest_size=16).hexdigest()
        self.concurrency, self.limit = concurrency, RateLimit(requests_per_minute)
        self.temperature, self.seed = temperature, seed
        self._limit_name = "max_tokens"
        self._reached = False

    @classmethod
    def from_source(cls, source: ModelSource) -> EndpointModel:
        return cls(
            source.endpoint, source.model_name, concurrency=source.concurrency,
            requests_per_minute=source.requests_per_minute, retries=source.retries, timeout_s=source.timeout_s,
            temperature=source.temperature, seed=source.seed,
        )  # fmt: skip

    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        return in_order(self.stream(prompts))

    def stream(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Reply]]:
        """Replies as they come. Where one request ends the evaluation, the others are not waited for."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            asked = {pool.submit(self._ask, prompt): i for i, prompt in enumerate(prompts)}
            try:
                for future in as_completed(asked):
                    yield asked[future], future.result()
            except BaseException:
                self.client.stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _ask(self, prompt: Prompt) -> Reply:
        limit_name = self._limit_name
        try:
            answer = self.client.ask(self._body(prompt, limit_name), self._allowed, lambda: self._reached)
        except Refused as refusal:
            if limit_name == "max_tokens" and "max_completion_tokens" in str(refusal):
                self._limit_name = "max_completion_tokens"  # newer hosted models know the limit by this name only
                return self._ask(prompt)
            return self._refused(refusal)
        if answer is None:
            return Reply("", "endpoint_failed")
        self._reached = True
        text = cut_at_stop(answer.text, prompt.stop)
        return Reply(text.strip(), "cut_short" if answer.cut and text == answer.text else "")

    def _refused(self, refusal: Refused) -> Reply:
        """A prompt that is too long is a fact about the model; every other refusal ends the evaluation."""
        said = str(refusal)
        if refusal.status in (400, 413, 422) and any(words in said.lower() for words in _TOO_LONG):
            return Reply("", "prompt_too_long")
        raise refusal

    def _allowed(self) -> bool:
        self.limit.wait(self.client.stop)
        return True

    def _body(self, prompt: Prompt, limit_name: str) -> bytes:
        body: dict[str, Any] = {
            "model": self.name,
            "messages": list(prompt.messages),
            limit_name: prompt.max_new_tokens,
            "temperature": self.temperature,
        }
        if self.temperature > 0:
            body["seed"] = self.seed
        if prompt.stop:
            body["stop"] = list(prompt.stop[:MOST_STOP_STRINGS])
        if prompt.tools:
            body["tools"] = [dict(t) for t in prompt.tools]
        return json.dumps(body, ensure_ascii=False).encode()
