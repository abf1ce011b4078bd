"""One request to an OpenAI-compatible endpoint, with retries: what it says, or why there is nothing.

Used by the writer that rewords CRA rows and by evaluation. The key is read from the environment at each request and sent
to the given host alone: redirects are not followed.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

from coalm_nemo.errors import UserError

FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 30.0
LONGEST_RETRY_AFTER_S = 600.0
"""A server that asks for more than this is asked again all the same."""
LARGEST_ANSWER_BYTES = 4 << 20
KEY_VARIABLE = "OPENAI_API_KEY"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int
    cut: bool = False
    """The limit of tokens ended it."""


@dataclass(frozen=True)
class Fault:
    """An attempt that came to nothing and may be repeated."""

    what: str
    delay_s: float = 0.0
    """The server's own wish."""
    nobody: bool = False
    """Nothing that speaks this protocol answered: wrong address, or a server that is not up."""


class OverBudget(Exception):
    """The caller may send no further request."""


class Refused(UserError):
    """The server understood the request and will not answer it."""

    def __init__(self, sentence: str, status: int) -> None:
        super().__init__(sentence)
        self.status = status


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would arrive as GET, perhaps elsewhere, with the key."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class ChatClient:
    """Used by many threads at once."""

    def __init__(self, base_url: str, retries: int, timeout_s: float, option: str = "writer") -> None:
        """`option`: where the user gave the URL, for messages."""
        self.url = f"{check_base_url(base_url, option)}/chat/completions"
        self.option = option
        self.retries, self.timeout_s = retries, timeout_s
        self.stop = threading.Event()
        """Set when the caller ends for another reason: nothing is waited for any more."""
        local = urllib.parse.urlsplit(self.url).hostname in _LOOPBACK
        proxies = [urllib.request.ProxyHandler({})] if local else []
        self._opener = urllib.request.build_opener(_NoRedirect, *proxies)

    def ask(self, body: bytes, allowed: Callable[[], bool], reached: Callable[[], bool]) -> Answer | None:
        """None where every attempt failed. `allowed` is asked before each attempt; OverBudget where it says no.

        Raises Refused where the server does so, UserError where none is there and none ever was (`reached`).
        """
        fault = Fault("was not asked")
        for attempt in range(self.retries + 1):
            if self.stop.is_set():
                return None
            if not allowed():
                raise OverBudget
            outcome = self._attempt(body)
            if isinstance(outcome, Answer):
                return outcome
            fault = outcome
            if attempt < self.retries:
                self.stop.wait(max(_backoff_s(attempt), fault.delay_s))
        if fault.nobody and not self.stop.is_set() and not reached():
            raise UserError(f"the endpoint {self.url} {fault.what}; is the server up, and `{self.option}` its URL?")
        return None

    def _attempt(self, body: bytes) -> Answer | Fault:
        try:
            with self._opener.open(self._request(body), timeout=self.timeout_s) as response:
                return _read_answer(response.read(LARGEST_ANSWER_BYTES + 1), len(body))
        except urllib.error.HTTPError as e:
            with e:
                return self._refused(e)
        except urllib.error.URLError as e:  # while connecting; what happens after that is not wrapped in one
            return Fault(f"cannot be reached ({e.reason})", nobody=True)
        except (OSError, http.client.HTTPException) as e:
            return Fault(f"broke off ({type(e).__name__})")

    def _request(self, body: bytes) -> urllib.request.Request:
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"}, method="POST")
        if key := _api_key():
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        return request

    def _refused(self, error: urllib.error.HTTPError) -> Fault:
        if error.code in (408, 429) or error.code >= 500:
            return Fault(f"answered {error.code}", _retry_after_s(error.headers.get("Retry-After")))
        raise Refused(f"the endpoint {self.url} refused with {error.code}: {_message(error)}", error.code) from None


def check_base_url(url: str, option: str = "writer") -> str:
    """The URL without a final slash. It goes into manifests and scores, so nothing secret may be in it. Raises UserError."""
    try:
        parts = urllib.parse.urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        valid = False
    if not valid or any(c.isspace() or not c.isprintable() for c in url):
        raise UserError(f"{option} is not a base URL; write one such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(
            f"{option} must be a bare base URL, without user, key or query; a key belongs in {KEY_VARIABLE}"
        )
    return url.rstrip("/")


def _api_key() -> str:
    """Read at each request: it must be kept nowhere. http.client would quote an invalid one in its error."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key.isascii() or any(not c.isprintable() for c in key):
        raise UserError(f"{KEY_VARIABLE} holds characters that cannot be sent in a header")
    return key


def _read_answer(raw: bytes, asked_bytes: int) -> Answer | Fault:
    """The answer in OpenAI's form. Where it says no usage, a token is taken to be four bytes.

    Half a surrogate pair, which JSON can spell, becomes a question mark: no file could hold it.
    """
    if len(raw) > LARGEST_ANSWER_BYTES:
        return Fault("answered with far too much")
    try:
        answer = json.loads(raw)
        choice = answer["choices"][0]
        message = choice["message"]
        text = message["content"] or _called(message.get("tool_calls"))
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return Fault("does not answer in the form of OpenAI's chat completions", nobody=True)
    usage = answer.get("usage")
    tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
    if not isinstance(tokens, int) or tokens < 0:
        tokens = (asked_bytes + len(raw)) // 4
    return Answer(str(text).encode("utf-8", "replace").decode(), tokens, choice.get("finish_reason") == "length")


def _called(tool_calls: Any) -> str:
    """Calls that a server has parsed out of the text, as the list of calls that they were."""
    if not tool_calls:
        return ""
    functions = [call["function"] for call in tool_calls]
    return json.dumps([{"name": f["name"], "arguments": json.loads(f["arguments"] or "{}")} for f in functions])


def _message(error: urllib.error.HTTPError) -> str:
    """The server's own words on one line, without the key, which a server may quote."""
    raw = _start_of(error)
    try:
        words = json.loads(raw)
        words = words.get("error", words)
        raw = str(words.get("message", words) if isinstance(words, dict) else words)
    except (ValueError, AttributeError, RecursionError):
        pass
    key = _api_key()
    text = " ".join((raw.replace(key, "***") if key else raw).split())
    return text[:300] or str(error.reason)


def _start_of(body: IO[bytes]) -> str:
    try:
        return body.read(20_000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""


def _backoff_s(attempt: int) -> float:
    """Doubling, with jitter so that threads that failed together do not come back together."""
    return float(min(LONGEST_DELAY_S, FIRST_DELAY_S * 2**attempt) * random.Random().uniform(0.5, 1.0))


def _retry_after_s(header: str | None) -> float:
    """Seconds, or a date (RFC 9110, section 10.2.3)."""
    if not header:
        return 0.0
    try:
        delay = float(header)
    except ValueError:
        try:
            delay = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return min(max(delay, 0.0), LONGEST_RETRY_AFTER_S) if delay == delay else 0.0
