"""An endpoint on this machine: many requests at once, retried, limited, refused; the key goes nowhere else."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from coalm_nemo import chat_client
from coalm_nemo.errors import UserError
from coalm_nemo.evaluation.base import Prompt
from coalm_nemo.evaluation.endpoint_model import EndpointModel, RateLimit
from coalm_nemo.evaluation.runner import Reply
from tests.data.sources.writer_server import Endpoint, endpoint
from tests.data.sources.writer_server import Reply as Sent


def said(request: dict[str, Any]) -> str:
    return str(request["messages"][-1]["content"])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_client, "FIRST_DELAY_S", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def server() -> Iterator[Endpoint]:
    with endpoint(lambda request: Sent(f" re: {said(request)} ")) as running:
        yield running


def model(server: Endpoint, **options: Any) -> EndpointModel:
    return EndpointModel(server.url, "m", **({"retries": 2, "timeout_s": 10} | options))


def prompts(count: int, **options: Any) -> list[Prompt]:
    return [Prompt([{"role": "user", "content": f"q{n}"}], f"the gold answer {n}", **options) for n in range(count)]


def test_answers_come_in_the_prompts_order_and_gold_is_never_sent(server: Endpoint) -> None:
    asked = prompts(40, max_new_tokens=7, stop=("a", "b", "c", "d", "e"), tools=[{"type": "function"}])
    assert model(server).answer(prompts(40)) == [f"re: q{n}" for n in range(40)]
    model(server).answer(asked[:1])
    assert not any("gold" in str(r) for r in server.requests)
    last = server.requests[-1]
    assert last["model"] == "m" and last["temperature"] == 0 and last["max_tokens"] == 7 and "seed" not in last
    assert last["stop"] == ["a", "b", "c", "d"] and last["tools"] == [{"type": "function"}]


def test_requests_run_side_by_side_and_no_more_than_asked() -> None:
    lock, now, most = threading.Lock(), 0, 0

    def slow(request: dict[str, Any]) -> Sent:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.05)
        with lock:
            now -= 1
        return Sent("x")

    with endpoint(slow) as server:
        model(server, concurrency=4).answer(prompts(16))
    assert 2 <= most <= 4


def test_what_fails_for_a_moment_is_asked_again(server: Endpoint) -> None:
    seen: dict[str, int] = {}

    def flaky(request: dict[str, Any]) -> Sent:
        seen[said(request)] = seen.get(said(request), 0) + 1
        return Sent("fine") if seen[said(request)] > 2 else Sent(status=(429, 503)[seen[said(request)] - 1])

    server.answerer = flaky
    assert model(server).answer(prompts(5)) == ["fine"] * 5
    assert set(seen.values()) == {3}


def test_retry_after_is_waited_for(server: Endpoint) -> None:
    times: list[float] = []

    def busy(request: dict[str, Any]) -> Sent:
        times.append(time.monotonic())
        return Sent("fine") if len(times) > 1 else Sent(status=429, headers={"Retry-After": "0.4"})

    server.answerer = busy
    assert model(server).answer(prompts(1)) == ["fine"] and times[1] - times[0] >= 0.4


def test_one_prompt_that_always_fails_is_an_empty_answer_with_its_reason(server: Endpoint) -> None:
    server.answerer = lambda request: Sent(status=500) if said(request) == "q3" else Sent("fine")
    replies = dict(model(server, concurrency=1).stream(prompts(6)))
    assert replies.pop(3) == Reply("", "endpoint_failed") and set(replies.values()) == {Reply("fine")}


def test_a_prompt_too_long_is_a_counted_fault_and_every_other_refusal_ends_it(server: Endpoint) -> None:
    text = "This model's maximum context length is 8192 tokens."
    server.answerer = lambda request: Sent(status=400, body={"error": {"message": text}})
    assert dict(model(server).stream(prompts(2))) == dict.fromkeys(range(2), Reply("", "prompt_too_long"))
    server.answerer = lambda request: Sent(status=404, body={"error": {"message": "no model m"}})
    with pytest.raises(UserError, match="refused with 404: no model m"):
        model(server).answer(prompts(20))


def test_newer_servers_get_the_limit_by_its_newer_name(server: Endpoint) -> None:
    def newer(request: dict[str, Any]) -> Sent:
        if "max_tokens" in request:
            return Sent(status=400, body={"error": {"message": "use 'max_completion_tokens' instead"}})
        return Sent(str(request["max_completion_tokens"]))

    server.answerer = newer
    assert model(server).answer(prompts(8, max_new_tokens=9)) == ["9"] * 8


def test_calls_that_the_server_has_parsed_are_calls_again(server: Endpoint) -> None:
    called = {"function": {"name": "f", "arguments": '{"a": 1}'}}
    message = {"content": None, "tool_calls": [called]}
    server.answerer = lambda request: Sent(body={"choices": [{"message": message, "finish_reason": "tool_calls"}]})
    assert model(server).answer(prompts(1)) == ['[{"name": "f", "arguments": {"a": 1}}]']


def test_stop_strings_and_the_limit_of_tokens(server: Endpoint) -> None:
    choice = {"message": {"content": "Action: f()\nObservation: made up"}, "finish_reason": "length"}
    server.answerer = lambda request: Sent(body={"choices": [choice]})
    assert dict(model(server).stream(prompts(1, stop=("Observation:",)))) == {0: Reply("Action: f()")}
    assert dict(model(server).stream(prompts(1)))[0].fault == "cut_short"


def test_the_key_goes_to_the_given_host_alone(server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with endpoint(lambda request: Sent("elsewhere")) as other:
        target = f"{other.url}/chat/completions"
        server.answerer = lambda request: Sent(status=307, headers={"Location": target})
        with pytest.raises(UserError) as error:
            model(server).answer(prompts(1))
        assert not other.requests and "sk-secret" not in str(error.value)
    assert server.headers[0]["Authorization"] == "Bearer sk-secret"
    assert "sk-secret" not in model(server).fingerprint + model(server).name


def test_nobody_there_is_one_sentence(server: Endpoint) -> None:
    nobody = EndpointModel("http://127.0.0.1:9/v1", "m", retries=0)
    with pytest.raises(UserError, match="cannot be reached.*--endpoint"):
        nobody.answer(prompts(3))


def test_requests_are_spaced() -> None:
    limit, never = RateLimit(6000), threading.Event()
    start = time.monotonic()
    threads = [threading.Thread(target=limit.wait, args=(never,)) for _ in range(11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - start >= 0.1  # ten gaps of 10 ms


def test_the_fingerprint_is_of_server_and_model(server: Endpoint) -> None:
    names = [EndpointModel(server.url, "m"), EndpointModel(server.url, "n"), EndpointModel(server.url + "/x", "m")]
    assert len({m.fingerprint for m in names}) == 3
    assert EndpointModel(server.url + "/", "m").fingerprint == names[0].fingerprint
