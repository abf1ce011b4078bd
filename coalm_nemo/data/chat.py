"""Chat rows -> token ids and the loss mask, made together.

The text is cut where the assistant starts and where it stops, and each piece is tokenised by itself: the prompt
pieces get mask 0, the assistant's content with its end-of-turn token mask 1. At inference the prompt is tokenised by
itself too, so training sees exactly the tokens that generation will see.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from coalm_nemo.data.rows import Row
from coalm_nemo.errors import UserError

DATE_STRING = "26 Jul 2024"
"""Llama 3's templates print today's date unless told; a training set must not change with the day it is built."""

END_OF_TURN = ("<|eot_id|>", "<|eom_id|>")


def load_tokenizer(hf_dir: Path) -> Any:
    """transformers' tokenizer of an HF directory. Raises UserError where there is none or it lacks a chat template."""
    if not Path(hf_dir).is_dir():
        raise UserError(f"{hf_dir} is not a directory; model.hf_path must be a Hugging Face Llama directory")
    try:
        tokenizer = _tokenizer_class(Path(hf_dir)).from_pretrained(str(hf_dir), local_files_only=True)
    except Exception as e:
        raise UserError(f"{hf_dir} has no usable tokenizer ({str(e).splitlines()[0][:200]})") from e
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{hf_dir}: tokenizer.json is missing; a fast tokenizer is needed")
    return tokenizer


def _tokenizer_class(hf_dir: Path) -> Any:
    """Llama 3 names the plain fast tokenizer, which loads without torch; any other is AutoTokenizer's to choose."""
    try:
        name = json.loads((hf_dir / "tokenizer_config.json").read_text(encoding="utf-8")).get("tokenizer_class")
    except (OSError, ValueError, AttributeError):
        name = None
    if name in ("PreTrainedTokenizerFast", "TokenizersBackend") and (hf_dir / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


class ChatEncoder:
    """Rows -> (token ids, loss mask) with one tokenizer and its chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special = [str(t) for t in tokenizer.all_special_tokens] + list(tokenizer.get_added_vocab())
        self.special = sorted(set(self.special))

    def encode(self, row: Row) -> tuple[list[int], list[int]]:
        """Token ids and mask of equal length; mask 1 where the token is a target. Raises UserError naming the row."""
        if row.token_ids:
            return row.token_ids, row.loss_mask or [1] * len(row.token_ids)
        if row.text:
            return self._encode_text(row)
        ids: list[int] = []
        mask: list[int] = []
        for text, supervised in self.segments(row):
            piece = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
            ids += piece
            mask += [int(supervised)] * len(piece)
        return ids, mask

    def segments(self, row: Row) -> list[tuple[str, bool]]:
        """The rendered conversation, cut into (text, supervised) pieces."""
        self._refuse_special_tokens(row)
        pieces: list[tuple[str, bool]] = []
        done = ""
        for i, message in enumerate(row.messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(row, i, add_generation_prompt=True)
            full = self._render(row, i + 1)
            target = full[len(prompt) :]
            if not full.startswith(prompt) or not prompt.startswith(done):
                raise UserError(
                    f"{row.row_id}: the chat template does not render assistant turn {i + 1} as a continuation of its "
                    "prompt, so a loss mask cannot be made"
                )
            if not target.rstrip().endswith(END_OF_TURN):
                raise UserError(
                    f"{row.row_id}: the chat template does not end an assistant turn with <|eot_id|>; "
                    "a model trained this way would never stop"
                )
            pieces += [(prompt[len(done) :], False), (target, True)]
            done = full
        return pieces

    def _render(self, row: Row, count: int, add_generation_prompt: bool = False) -> str:
        if not self.tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template; add chat_template.jinja to the model directory")
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    row.messages[:count],
                    tools=row.tools,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    date_string=DATE_STRING,
                )
            )
        except Exception as e:
            raise UserError(f"{row.row_id}: the chat template refuses the row ({str(e).splitlines()[0]})") from e

    def _encode_text(self, row: Row) -> tuple[list[int], list[int]]:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids = self.tokenizer.encode(row.text, add_special_tokens=False, verbose=False)
        ids = ([bos] if bos is not None else []) + ids + ([eos] if eos is not None else [])
        return ids, [1] * len(ids)

    def _refuse_special_tokens(self, row: Row) -> None:
        """A row that spells a control token would forge turns; the tokenizer cannot tell it from a real one."""
        for message in row.messages:
            content = message.get("content") or ""
            content += json.dumps(message["tool_calls"], ensure_ascii=False) if message.get("tool_calls") else ""
            for token in self.special:
                if token in content:
                    raise UserError(
                        f"{row.row_id}: the text of a {message['role']} turn holds the control token {token}"
                    )
