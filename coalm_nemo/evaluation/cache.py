"""Generations that are kept: an interrupted evaluation goes on where it was, and scoring needs no model.

One JSON object a line, appended with one write each, so that a kill loses at most the line being written. A torn line is
passed over wherever it stands. Several evaluations may append to one file on a local disk; the last line of a key counts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from coalm_nemo.errors import UserError
from coalm_nemo.evaluation.base import Prompt
from coalm_nemo.evaluation.runner import Reply, StreamingModel, in_order

FILE_NAME = "generations.jsonl"
NOT_KEPT = ("endpoint_failed",)
"""Faults of the moment: another run asks again."""


def prompt_key(fingerprint: str, settings: Mapping[str, Any], prompt: Prompt) -> str:
    """What an answer depends on, and nothing else: the gold answer is no part of it."""
    asked = [fingerprint, dict(settings), list(prompt.messages), prompt.tools, prompt.max_new_tokens, list(prompt.stop)]
    text = json.dumps(asked, sort_keys=True, ensure_ascii=True, default=list)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class GenerationCache:
    """The kept replies of one file, by key. Raises UserError where the file cannot be read or written."""

    def __init__(self, file: Path) -> None:
        self.file = Path(file)
        self.replies: dict[str, Reply] = {}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            raw = self.file.read_bytes() if self.file.exists() else b""
            self._handle = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as e:
            raise UserError(f"the kept generations in {self.file} cannot be opened ({e.strerror})") from e
        for line in raw.splitlines():
            self._read(line)
        self._mend = bool(raw) and not raw.endswith(b"\n")

    def _read(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            self.replies[str(entry["key"])] = Reply(str(entry["answer"]), str(entry.get("fault", "")))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return

    def keep(self, key: str, reply: Reply) -> None:
        """Append one reply; after this returns, a kill of the process does not lose it."""
        entry = {"key": key, "answer": reply.text} | ({"fault": reply.fault} if reply.fault else {})
        line = json.dumps(entry, ensure_ascii=True) + "\n"
        if self._mend:  # end the torn line, or this one would be lost with it
            line, self._mend = "\n" + line, False
        try:
            written = os.write(self._handle, line.encode())
        except OSError as e:
            raise UserError(f"{self.file} cannot be written ({e.strerror}); the same command goes on from here") from e
        if written < len(line):
            raise UserError(f"{self.file} cannot be written (the disk is full); the same command goes on from here")
        self.replies[key] = reply

    def close(self) -> None:
        os.close(self._handle)


class CachedModel:
    """A model behind a cache: equal prompts are generated once."""

    def __init__(self, inner: StreamingModel, cache: GenerationCache, settings: Mapping[str, Any]) -> None:
        self.inner, self.cache, self.settings = inner, cache, settings
        self.name, self.fingerprint = inner.name, inner.fingerprint

    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        return in_order(self.stream(prompts))

    def stream(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Reply]]:
        """What is kept comes first, then the rest as the model gives it."""
        open_prompts: dict[str, list[int]] = defaultdict(list)
        for i, prompt in enumerate(prompts):
            key = prompt_key(self.fingerprint, self.settings, prompt)
            if key in self.cache.replies:
                yield i, self.cache.replies[key]
            else:
                open_prompts[key].append(i)
        keys = list(open_prompts)
        if not keys:
            return
        for at, reply in self.inner.stream([prompts[open_prompts[key][0]] for key in keys]):
            if reply.fault not in NOT_KEPT:
                self.cache.keep(keys[at], reply)
            for i in open_prompts[keys[at]]:
                yield i, reply


class KeptAnswersOnly:
    """Stands in for a model when only kept answers may be used (--rescore)."""

    def __init__(self, name: str, fingerprint: str) -> None:
        self.name, self.fingerprint = name, fingerprint

    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        return in_order(self.stream(prompts))

    def stream(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Reply]]:
        raise UserError(
            f"{len(prompts)} prompts have no kept answer of {self.name}; the evaluation was not finished, or its options "
            "were others: run it without --rescore"
        )
        yield  # a generator, as its users expect
