"""A language model rewords thoughts and answers: requests, the cache before them, the checks after them, the count.

One request a turn, not one a dialogue. A turn's prompt is bounded whatever the dialogue's length (a dialogue of 30 turns
with its observations is 10,000 tokens); short JSON with one to three fields is what small local models write reliably;
an answer that cannot be used costs one turn, not a dialogue; and no request waits for another. The price is that the
instructions are sent with every turn, which servers with a prefix cache (vLLM, SGLang) do not compute again.
Requests show the original words only, so that an answer never changes the next request and the cache holds.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from coalm_nemo.chat_client import ChatClient, OverBudget, check_base_url
from coalm_nemo.data.sources.base import Block
from coalm_nemo.data.sources.cra.schema import Schema
from coalm_nemo.data.sources.cra.turns import Turn
from coalm_nemo.data.sources.cra.writer_cache import WriterCache, default_cache_file
from coalm_nemo.data.sources.cra.writer_checks import Evidence, evidence, fault_in
from coalm_nemo.errors import UserError

FIELDS = {"thought": "thought", "thought_after": "thought_after", "response": "system"}
"""What the model is told a field is called -> the field of Turn."""
TURNS_BEFORE = 2
"""Turns shown before the one to be reworded: enough to know what "there" and "that one" are."""
LONGEST_PART_CHARACTERS = 4000
MAX_ANSWER_TOKENS = 1024
"""A model in JSON mode may run on with blanks; three fields are 100 to 300 tokens."""

_INSTRUCTIONS = """\
You reword single turns of conversations between a user and an assistant that can call functions. You get one turn as \
JSON. Say each text under "rewrite" in fresh, natural words, as a thoughtful assistant would put it, with exactly the \
same content.
"thought" is what the assistant thinks before it acts. If there is a call, keep the function's name and every argument \
value letter by letter, and name no other function. If there is none, name no function.
"thought_after" is what it concludes from the observation. Do not mention anything that is not in the conversation or \
the observation.
"response" is what it says to the user. Keep every name, number, price, date, time and phone number exactly as it is \
written, keep what is affirmed and what is denied, keep a question a question, and add nothing.
Do not make a text much longer. Each text is one line of plain prose without a label in front. Answer with one JSON \
object that has exactly the keys of "rewrite", with the new texts as strings, and with nothing else."""


@dataclass(frozen=True)
class WriterOptions:
    """The options of CraSource without their prefix."""

    url: str
    model: str
    cache: str = ""
    budget_requests: int = 0
    budget_tokens: int = 0
    retries: int = 5
    timeout_s: float = 60.0
    concurrency: int = 16
    temperature: float = 0.7
    build: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Whose budget it is: made before the workers fork, so it is the same in all of them."""

    def __post_init__(self) -> None:
        check_base_url(self.url)
        if not self.model:
            raise UserError("writer needs writer_model, the model's name at that endpoint")
        for name in ("budget_requests", "budget_tokens", "retries", "temperature"):
            if not getattr(self, name) >= 0:
                raise UserError(f"writer_{name} is {getattr(self, name)}; it must not be negative")
        if not 0 < self.timeout_s < float("inf"):
            raise UserError(f"writer_timeout_s is {self.timeout_s}; it must be above 0")
        if self.concurrency < 1:
            raise UserError(f"writer_concurrency is {self.concurrency}; it must be at least 1")


@dataclass(frozen=True)
class Request:
    """One turn that is to be reworded."""

    turn: Turn
    known: Evidence
    key: str
    """What the answer is kept under."""
    body: bytes


@dataclass(frozen=True)
class Reply:
    """What came of a request: the model's text, or why there is none."""

    text: str = ""
    fault: str = ""
    """failed | over_budget"""


@dataclass
class Effort:
    """What a block cost: not in the manifest, because it depends on what the cache held."""

    requests: int = 0
    cached: int = 0
    tokens: int = 0


class Writer:
    """A worker's access to the model. Made in the worker, used block by block."""

    def __init__(self, options: WriterOptions, schema: Schema) -> None:
        self.options, self.schema = options, schema
        self.cache = WriterCache(Path(options.cache).expanduser() if options.cache else default_cache_file())
        self.client = ChatClient(options.url, options.retries, options.timeout_s)
        self.effort = Effort()
        self._lock = threading.Lock()
        self._counts: dict[tuple[Path, int], Counter[str]] = {}

    def rewrite(
        self, block: Block, dialogues: Sequence[tuple[str, list[Turn]]], seed: int
    ) -> Iterator[tuple[str, list[Turn]]]:
        """The block's dialogues with their turns reworded where that could be done; `counts` tells how often."""
        counts = self._counts[block.file, block.first] = Counter()
        self.effort = Effort()
        requests = [self._requests(name, turns, seed) for name, turns in dialogues]
        replies = iter(self._replies([request for dialogue in requests for request in dialogue]))
        self._report(block)
        for (name, _), dialogue in zip(dialogues, requests, strict=True):
            yield name, [reworded(request.turn, request.known, next(replies), counts) for request in dialogue]

    def counts(self, block: Block) -> dict[str, int]:
        """Figures of the block last reworded, by field: they depend on the answers alone."""
        found = self._counts.pop((block.file, block.first), Counter[str]())
        return {f"writer_{name}": number for name, number in sorted(found.items())}

    def _requests(self, dialogue_id: str, turns: Sequence[Turn], seed: int) -> list[Request]:
        known = evidence(turns, self.schema)
        return [self._request(dialogue_id, turns, at, known[at], seed) for at in range(len(turns))]

    def _request(self, dialogue_id: str, turns: Sequence[Turn], at: int, known: Evidence, seed: int) -> Request:
        messages = prompt(turns, at)
        own_seed = _digest(seed, dialogue_id, turns[at].number)
        body = {
            "model": self.options.model,
            "messages": messages,
            "temperature": self.options.temperature,
            "seed": int(own_seed[:8], 16) >> 1,  # differs between turns: "Bye." need not be reworded alike everywhere
            "max_tokens": MAX_ANSWER_TOKENS,
            "response_format": {"type": "json_object"},
        }
        key = _digest(self.options.model, float(self.options.temperature), body["seed"], messages)
        return Request(turns[at], known, key, json.dumps(body, ensure_ascii=False).encode())

    def _replies(self, requests: Sequence[Request]) -> list[Reply]:
        """In order. What the cache lacks is asked for by several threads at once."""
        kept = [self.cache.answer(request.key) for request in requests]
        missing = [request for request, answer in zip(requests, kept, strict=True) if answer is None]
        self.effort.cached = len(requests) - len(missing)
        asked: Iterator[Reply] = iter(())
        if missing:
            with ThreadPoolExecutor(min(self.options.concurrency, len(missing)), "writer") as pool:
                try:
                    asked = iter(list(pool.map(self._ask, missing)))
                except BaseException:
                    self.client.stop.set()
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        return [Reply(answer) if answer is not None else next(asked) for answer in kept]

    def _ask(self, request: Request) -> Reply:
        try:
            answer = self.client.ask(request.body, self._allowed, lambda: self.cache.reached(self.options.build))
        except OverBudget:
            return Reply(fault="over_budget")
        except UserError:
            self.client.stop.set()
            raise
        if answer is None:
            return Reply(fault="failed")
        self.cache.spend(self.options.build, answer.tokens)
        with self._lock:
            self.effort.tokens += answer.tokens
        return Reply(self.cache.keep(request.key, answer.text))

    def _allowed(self) -> bool:
        """A budget of tokens may be overrun by the requests under way when it is used up."""
        options = self.options
        allowed = self.cache.reserve(options.build, options.budget_requests, options.budget_tokens)
        with self._lock:
            self.effort.requests += allowed
        return allowed

    def _report(self, block: Block) -> None:
        e = self.effort
        words = f"writer_requests {e.requests}, writer_cached {e.cached}, writer_tokens {e.tokens}"
        print(f"writer: {block.file.name}: {words}", file=sys.stderr, flush=True)


def prompt(turns: Sequence[Turn], at: int) -> list[dict[str, str]]:
    """The messages for one turn; every part is cut to a length, so that the whole is bounded."""
    turn = turns[at]
    shown: dict[str, Any] = {}
    before = turns[max(0, at - TURNS_BEFORE) : at]
    if before:
        shown["before"] = [line for t in before for line in (f"User: {_cut(t.user)}", f"System: {_cut(t.system)}")]
    shown["user"] = _cut(turn.user)
    if turn.call is not None:
        shown |= {"call": _cut(turn.call.text), "observation": _cut(turn.observation)}
    shown["rewrite"] = {name: getattr(turn, attribute) for name, attribute in _asked(turn).items()}
    user = json.dumps(shown, ensure_ascii=False, indent=1)
    return [{"role": "system", "content": _INSTRUCTIONS}, {"role": "user", "content": user}]


def _asked(turn: Turn) -> dict[str, str]:
    """The fields that the turn has."""
    return {name: attribute for name, attribute in FIELDS.items() if getattr(turn, attribute).strip()}


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_PART_CHARACTERS else text[:LONGEST_PART_CHARACTERS] + " ..."


def reworded(turn: Turn, known: Evidence, reply: Reply, counts: Counter[str]) -> Turn:
    """The turn with those fields replaced that may be; every field is counted once."""
    asked = _asked(turn)
    if reply.fault:
        counts[reply.fault] += len(asked)
        return turn
    answer = parse_answer(reply.text)
    if answer is None:
        counts["rejected_not_json"] += len(asked)
        return turn
    new: dict[str, Any] = {}
    for name, attribute in asked.items():
        text = answer.get(name)
        if fault := fault_in(attribute, text, turn, known):
            counts[f"rejected_{fault}"] += 1
        elif (line := " ".join(str(text).split())) == getattr(turn, attribute):
            counts["unchanged"] += 1
        else:
            counts["rewritten"] += 1
            new[attribute] = line
    return replace(turn, **new)


def parse_answer(text: str) -> dict[str, Any] | None:
    """The first JSON object in the model's text, with or without a code fence or words around it; never evaluated."""
    start = text.find("{")
    if start < 0:
        return None
    try:
        found, _ = json.JSONDecoder(strict=False).raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
