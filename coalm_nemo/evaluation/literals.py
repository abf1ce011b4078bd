"""Values as models write them: JSON and Python literals in one grammar, read character by character.

There is no `eval`, no `ast.parse` and no recursion without a bound: the work grows with the length of the text alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

MAX_DEPTH = 32
"""Brackets within brackets."""
_MAX_DIGITS = 400
_SPACE = re.compile(r"[ \t\r\n]*")
_NUMBER = re.compile(r"[+-]?(?:\d[\d_]*(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")
_WORD = re.compile(r"[^\W\d]\w*")
_PLAIN = {quote: re.compile(rf"[^{quote}\\\n]*") for quote in "'\""}
_WORDS = {
    "true": True, "True": True, "false": False, "False": False, "null": None, "None": None,
}  # fmt: skip
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0", "\n": ""} | {
    c: c for c in "\\'\"/"
}
_HEX = frozenset("0123456789abcdefABCDEF")
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}


class Malformed(Exception):
    """The text is no literal here; the message is a snake_case reason."""


@dataclass
class Reader:
    """A place in a text. Every `read_...` starts at `at`, moves past what it read, or raises Malformed."""

    text: str
    at: int = 0

    def skip_space(self) -> None:
        match = _SPACE.match(self.text, self.at)
        assert match is not None
        self.at = match.end()

    def peek(self) -> str:
        """The next character that is no white space, "" at the end."""
        self.skip_space()
        return self.text[self.at : self.at + 1]

    def sees(self, pattern: re.Pattern[str]) -> bool:
        """Whether the pattern matches here."""
        return pattern.match(self.text, self.at) is not None

    def take(self, wanted: str) -> None:
        """Pass over one character."""
        if self.peek() != wanted:
            raise Malformed("malformed_call")
        self.at += 1

    def match(self, pattern: re.Pattern[str]) -> str | None:
        """What the pattern matches after white space, passed over; None where it does not."""
        self.skip_space()
        return self.match_here(pattern)

    def match_here(self, pattern: re.Pattern[str]) -> str | None:
        """The same, white space not skipped first."""
        found = pattern.match(self.text, self.at)
        if found is None:
            return None
        self.at = found.end()
        return found.group()

    def read_value(self, depth: int = 0) -> Any:
        """A string, number, boolean, null, list, tuple (as a list) or dictionary."""
        if depth > MAX_DEPTH:
            raise Malformed("too_deep")
        first = self.peek()
        if first == "[" or first == "(":
            return self._read_list("]" if first == "[" else ")", depth)
        if first == "{":
            return self._read_dictionary(depth)
        if first and first in _PLAIN:
            return self.read_string()
        if first and first in "+-.0123456789":
            return self._read_number()
        return self._read_word()

    def read_string(self) -> str:
        """A string in either quote, on one line, with the escapes of Python and JSON."""
        quote = self.peek()
        if quote not in _PLAIN:
            raise Malformed("malformed_call")
        self.at += 1
        parts: list[str] = []
        while True:
            plain = _PLAIN[quote].match(self.text, self.at)
            assert plain is not None
            parts.append(plain.group())
            self.at = plain.end()
            end = self.text[self.at : self.at + 1]
            self.at += 1
            if end == quote:
                return _join_surrogates("".join(parts))
            if end != "\\":  # the end of the line or of the text
                raise Malformed("malformed_call")
            parts.append(self._read_escape())

    def _read_escape(self) -> str:
        letter = self.text[self.at : self.at + 1]
        self.at += 1
        if letter in _HEX_DIGITS:
            width = _HEX_DIGITS[letter]
            digits = self.text[self.at : self.at + width]
            self.at += width
            if len(digits) < width or not _HEX.issuperset(digits) or int(digits, 16) > 0x10FFFF:
                raise Malformed("malformed_call")
            return chr(int(digits, 16))
        return _ESCAPES.get(letter, "\\" + letter)  # as Python does with an escape that it does not know

    def _read_list(self, end: str, depth: int) -> list[Any]:
        self.at += 1
        values: list[Any] = []
        while self.peek() != end:
            values.append(self.read_value(depth + 1))
            if self.peek() != end:
                self.take(",")
        self.at += 1
        return values

    def _read_dictionary(self, depth: int) -> dict[Any, Any]:
        self.at += 1
        values: dict[Any, Any] = {}
        while self.peek() != "}":
            key = self.read_value(depth + 1)
            if isinstance(key, list | dict):
                raise Malformed("malformed_call")
            if key in values:
                raise Malformed("duplicate_argument")
            self.take(":")
            values[key] = self.read_value(depth + 1)
            if self.peek() != "}":
                self.take(",")
        self.at += 1
        return values

    def _read_number(self) -> int | float:
        text = self.match(_NUMBER)
        if text is None or self.text[self.at : self.at + 1].isalnum():
            raise Malformed("malformed_call")
        if len(text) > _MAX_DIGITS:
            raise Malformed("too_long")
        digits = text.lstrip("+-")
        try:
            if digits.replace("_", "").isdecimal():
                if digits[0] == "0" and digits.strip("0_"):  # 007 is a number in neither language
                    raise Malformed("malformed_call")
                return int(text)
            number = float(text)
        except ValueError:
            raise Malformed("malformed_call") from None
        if number in (float("inf"), float("-inf")):
            raise Malformed("malformed_call")
        return number

    def _read_word(self) -> bool | None:
        word = self.match(_WORD)
        if word is None:
            raise Malformed("malformed_call")
        if word not in _WORDS:
            raise Malformed("not_a_literal")
        return _WORDS[word]


def _join_surrogates(text: str) -> str:
    r"""JSON writes one character beyond the first 65,536 as two escapes. A half that is left over becomes U+FFFD."""
    if not any("\ud800" <= c <= "\udfff" for c in text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def same_value(a: Any, b: Any) -> bool:
    """Equal as JSON: 1 and 1.0 are one number, True is none, the order of keys is free."""
    if isinstance(a, bool) or isinstance(b, bool) or a is None or b is None:
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_value(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same_value(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
