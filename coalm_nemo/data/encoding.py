"""Rows -> token ids with their loss mask, a batch at a time, with nothing but the tokenizer's fast core.

Every text is tokenised as plain text and control tokens are put in by id: no text can forge a turn, and a target starts
at the token at which generation starts, because header and target are tokenised apart.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coalm_nemo.data.chat_format import (
    END_OF_TURN,
    Turn,
    Unrenderable,
    choose_format,
    first_difference,
    render_turn,
    render_with_template,
)
from coalm_nemo.data.line_tokenizer import LineTokenizer
from coalm_nemo.data.rows import Row
from coalm_nemo.data.shorten import Conversation, shorten
from coalm_nemo.data.sources.base import Dropped
from coalm_nemo.errors import UserError

CONTROL_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", END_OF_TURN)
TOKEN_CHECK_INTERVAL = 64
"""Every so many rows the template's rendering is tokenised too; its text is compared on every row."""


@dataclass(frozen=True)
class EncodedRow:
    """One row of a shard."""

    row: Row
    tokens: np.ndarray
    """int32 [L]"""
    loss_mask: np.ndarray
    """uint8 [L], 1 where the token is a target"""
    turns: list[Turn]
    """What was rendered."""

    @property
    def supervised(self) -> int:
        return int(self.loss_mask.sum())


class RowEncoder:
    """One tokenizer and its chat format. Built once a process."""

    def __init__(self, hf_dir: Path, template: str = "auto") -> None:
        """Raises UserError where the directory has no fast tokenizer, or its chat template is not the format."""
        from coalm_nemo.data.chat import load_tokenizer

        self.hf_tokenizer = load_tokenizer(hf_dir)
        self.format = choose_format(template, self.hf_tokenizer)
        self.plain = LineTokenizer(Path(hf_dir) / "tokenizer.json")
        self.bos = str(self.hf_tokenizer.bos_token)
        self.control = {name: self._token_id(name, hf_dir) for name in (*CONTROL_TOKENS, self.bos)}
        self.newlines = self.plain.encode(["\n\n"])[0]
        self.headers: dict[str, array[int]] = {}
        names = {*map(str, self.hf_tokenizer.all_special_tokens), *self.hf_tokenizer.get_added_vocab()}
        self.special = sorted(names)
        self.special_prefix = os.path.commonprefix(self.special)

    def _token_id(self, name: str, hf_dir: Path) -> int:
        token = self.plain.token_id(name)
        if token is None:
            raise UserError(f"the tokenizer in {hf_dir} has no token {name}; a Llama 3 tokenizer is needed")
        return token

    def encode(self, rows: Sequence[Row], *, loss: str, max_tokens: int) -> list[EncodedRow | Dropped]:
        """One entry a row, in order, but more where a dialogue with loss on all turns is too long for one.

        `loss`: "last" or "all" assistant turns. A row has at most `max_tokens` tokens: the oldest turns of its history
        are left out, and where that is not enough, the row. Raises UserError where the tokenizer's own template renders
        a row otherwise.
        """
        pending: list[Conversation | Dropped] = [self._conversation(row, loss) for row in rows]
        encoded = iter(self._encode_all([c for c in pending if isinstance(c, Conversation)]))
        result: list[EncodedRow | Dropped] = []
        for entry in pending:
            if isinstance(entry, Dropped):
                result.append(entry)
                continue
            tokens, mask = next(encoded)
            if len(tokens) <= max_tokens:
                result.append(EncodedRow(entry.row, tokens, mask, entry.turns))
            else:
                result += self._shortened(entry, max_tokens)
        return result

    def _shortened(self, conversation: Conversation, max_tokens: int) -> list[EncodedRow | Dropped]:
        def length(candidate: Conversation) -> int:
            return len(self._encode_all([candidate])[0][0])

        fitting = shorten(conversation, self._turns, length, max_tokens)
        lost = len(conversation.targets) - sum(len(c.targets) for c in fitting)
        dropped = [Dropped("too_long", conversation.row.row_id)] * lost
        return [*(EncodedRow(c.row, *self._encode_all([c])[0], c.turns) for c in fitting), *dropped]

    def _conversation(self, row: Row, loss: str) -> Conversation | Dropped:
        last = max(i for i, m in enumerate(row.messages) if m["role"] == "assistant")
        wanted = {i for i, m in enumerate(row.messages) if m["role"] == "assistant" and (loss == "all" or i == last)}
        messages = row.messages[: last + 1]
        try:
            turns = self._turns(messages, row.tools)
        except Unrenderable as reason:
            return Dropped(str(reason), row.row_id)
        if not all(t.text for t in turns if t.message in wanted):
            return Dropped("empty_target", row.row_id)
        return Conversation(row, messages, turns, frozenset(wanted))

    def _turns(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[Turn]:
        return self.format.turns(messages, tools)

    def _encode_all(self, conversations: list[Conversation]) -> list[tuple[np.ndarray, np.ndarray]]:
        texts = [
            turn.text if turn.message in c.targets else "\n\n" + turn.text for c in conversations for turn in c.turns
        ]
        ids = iter(self.plain.encode(texts))
        return [self._assemble(c, ids) for c in conversations]

    def _assemble(self, conversation: Conversation, ids: Iterator[array[int]]) -> tuple[np.ndarray, np.ndarray]:
        tokens = array("i", [self.control[self.bos]])
        targets: list[tuple[int, int]] = []
        for turn in conversation.turns:
            tokens += self._header(turn.role)
            text = next(ids)
            if turn.message in conversation.targets:
                tokens += self.newlines
                targets.append((len(tokens), len(tokens) + len(text) + 1))
            tokens += text
            tokens.append(self.control[END_OF_TURN])
        mask = np.zeros(len(tokens), dtype=np.uint8)
        for start, stop in targets:
            mask[start:stop] = 1
        return np.frombuffer(tokens, dtype=np.int32), mask

    def _header(self, role: str) -> array[int]:
        if role not in self.headers:
            start, end = (self.control[name] for name in CONTROL_TOKENS[:2])
            self.headers[role] = array("i", [start, *self.plain.encode([role])[0], end])
        return self.headers[role]

    def _spells_control_token(self, text: str) -> bool:
        return self.special_prefix in text and any(name in text for name in self.special)

    def check_rendering(self, encoded: EncodedRow, *, tokens_too: bool) -> None:
        """Compare one row with the tokenizer's own chat template. Raises UserError with the first difference.

        Rows whose text spells a control token are passed over: there the template does what this format refuses to do.
        """
        if not self.hf_tokenizer.chat_template:
            return
        row = encoded.row
        last = max(i for i, m in enumerate(row.messages) if m["role"] == "assistant")
        if any(self._spells_control_token(turn.text) for turn in encoded.turns):
            return
        ours = self.bos + "".join(render_turn(turn) for turn in encoded.turns)
        theirs = render_with_template(self.hf_tokenizer, row.messages[: last + 1], row.tools)
        if ours != theirs:
            raise UserError(f"{row.row_id}: {first_difference(ours, theirs)}")
        if tokens_too:
            self._check_tokens(encoded, theirs)

    def _check_tokens(self, encoded: EncodedRow, text: str) -> None:
        theirs = self.hf_tokenizer.encode(text, add_special_tokens=False, verbose=False)
        ours = encoded.tokens.tolist()
        if ours != theirs:
            at = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(map(len, (ours, theirs)))
            )
            near = [self.hf_tokenizer.decode(ids[max(0, at - 2) : at + 3]) for ids in (ours, theirs)]
            raise UserError(
                f"{encoded.row.row_id}: the tokenizer cuts its template's text otherwise from token {at} on: "
                f"{near[1]!r} against {near[0]!r}; a header and the text after it must be tokens of their own"
            )
