"""Text -> token ids at more than the tokenizer's speed, where the text repeats itself line by line.

Prompts for tool use do: task, tools and format stand in every row, and each turn's history in all later ones. Llama 3's
tokenizer first cuts text into words by a regular expression, and merges within words only. A line break followed by
something that is not white space always is the end of a word there (a word that holds line breaks ends at the last of
them, and no later rule looks back), so such lines can be tokenised by themselves, and remembered.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Sequence
from pathlib import Path

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The one pattern for which cutting at lines is known to be right: tokenizer.json of every Llama 3."""

REMEMBERED_CHARACTERS = 16 << 20
"""Above this all is forgotten: a worker's memory has a bound whatever the set's size."""

_LINE_START = re.compile(r"(?<=\n)(?=\S)")


class LineTokenizer:
    """Plain text to ids; control tokens in it stay text."""

    def __init__(self, tokenizer_json: Path) -> None:
        from tokenizers import Tokenizer

        self.core = Tokenizer.from_file(str(tokenizer_json))
        self.core.encode_special_tokens = True
        self.core.no_truncation()
        self.core.no_padding()
        self.by_line = cuts_words_as_llama3(tokenizer_json)
        self.known: dict[str, array[int]] = {}
        self.characters = 0

    def token_id(self, name: str) -> int | None:
        """Id of a token by its name."""
        found = self.core.token_to_id(name)
        return None if found is None else int(found)

    def encode(self, texts: Sequence[str]) -> list[array[int]]:
        """Ids of each text; int32."""
        if not self.by_line:
            return self._encode_batch(texts)
        pieces = [_LINE_START.split(text) for text in texts]
        self._learn({piece for lines in pieces for piece in lines if piece not in self.known})
        known = self.known
        result = []
        for lines in pieces:
            ids = array("i")
            for line in lines:
                ids += known[line]
            result.append(ids)
        if self.characters > REMEMBERED_CHARACTERS:
            self.known, self.characters = {}, 0
        return result

    def _learn(self, lines: set[str]) -> None:
        ordered = sorted(lines)
        for line, ids in zip(ordered, self._encode_batch(ordered), strict=True):
            self.known[line] = ids
            self.characters += len(line)

    def _encode_batch(self, texts: Sequence[str]) -> list[array[int]]:
        return [array("i", e.ids) for e in self.core.encode_batch_fast(list(texts), add_special_tokens=False)]


def cuts_words_as_llama3(tokenizer_json: Path) -> bool:
    """Whether the tokenizer cuts words by Llama 3's pattern and does nothing to the text before."""
    raw = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    words = raw.get("pre_tokenizer") or {}
    steps = words.get("pretokenizers", []) if words.get("type") == "Sequence" else []
    if raw.get("normalizer") is not None or [s.get("type") for s in steps] != ["Split", "ByteLevel"]:
        return False
    split, byte_level = steps
    return (
        split.get("pattern") == {"Regex": LLAMA3_WORDS}
        and split.get("behavior") == "Isolated"
        and not split.get("invert")
        and not byte_level.get("add_prefix_space")
        and not byte_level.get("use_regex", True)
    )
