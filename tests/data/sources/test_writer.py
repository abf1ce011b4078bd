"""Rewording by a model, against a real HTTP server: what is asked, kept, refused, paid for and remembered."""

from __future__ import annotations

import json
import multiprocessing
import sqlite3
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coalm_nemo import chat_client
from coalm_nemo.data.build import build
from coalm_nemo.data.build_config import load_build_config
from coalm_nemo.data.rows import Row
from coalm_nemo.data.sources.base import Dropped
from coalm_nemo.data.sources.cra.dialogue import read_dialogues
from coalm_nemo.data.sources.cra.turns import Turn
from coalm_nemo.data.sources.cra.writer import parse_answer
from coalm_nemo.data.sources.cra.writer_cache import WriterCache, default_cache_file
from coalm_nemo.data.sources.cra.writer_checks import Evidence, evidence, fault_in, names, numbers
from coalm_nemo.data.sources.sgd import SgdSource
from coalm_nemo.errors import UserError
from tests.data.sources.cra_world import dialogue, write
from tests.data.sources.writer_server import Endpoint, Reply, endpoint, good, reword

TURNS, FIELDS = 6, 14
Made = tuple[list[Row | Dropped], dict[str, int]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_client, "FIRST_DELAY_S", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def server() -> Iterator[Endpoint]:
    with endpoint(reword(good)) as running:
        yield running


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return write(tmp_path / "world", [dialogue()])


def source(world: Path, url: str, **options: Any) -> SgdSource:
    cache = str(world.parent / "cache.sqlite")
    given: dict[str, Any] = {"writer_model": "m", "writer_retries": 2, "writer_cache": cache}
    return SgdSource(str(world), writer=url, **(given | options))


def make(source: SgdSource, seed: int = 0) -> Made:
    rows: list[Row | Dropped] = []
    counts: Counter[str] = Counter()
    for block in source.blocks():
        rows += source.rows(block, seed)
        counts.update(source.counts(block))
    return rows, {k.removeprefix("writer_"): n for k, n in counts.items() if k.startswith("writer_")}


def test_good_words_are_taken_and_the_rows_pass_their_checks(world: Path, server: Endpoint) -> None:
    plain, _ = make(SgdSource(str(world)))
    rows, counts = make(source(world, server.url))
    assert counts == {"rewritten": FIELDS} and len(server.requests) == TURNS
    assert [r.row_id for r in rows] == [r.row_id for r in plain]
    written = {r.row_id: r for r in rows if isinstance(r, Row)}
    assert len(written) == len(rows)
    booking = written["w_1/9/action"]
    assert booking.messages[1]["content"].startswith("Action: BookRepair(")
    assert "\nThought: Let me think. " in booking.messages[0]["content"]
    assert "\nSystem: Alright, try Mill's" in booking.messages[0]["content"]
    assert written["w_1/9/response"].messages[1]["content"] == "System: Alright, done."


def test_a_request_shows_one_turn_and_little_before_it(world: Path, server: Endpoint) -> None:
    make(source(world, server.url, writer_temperature=0.25))
    shown = [json.loads(request["messages"][1]["content"]) for request in server.requests]
    booking = next(s for s in shown if s["user"] == "Right.")
    assert [*booking] == ["before", "user", "call", "observation", "rewrite"]
    assert [*booking["rewrite"]] == ["thought", "thought_after", "response"]
    assert len(booking["before"]) == 4 and booking["call"].startswith("BookRepair(")
    request = server.requests[0]
    assert request["model"] == "m" and request["temperature"] == 0.25
    assert request["response_format"] == {"type": "json_object"}
    assert len({r["seed"] for r in server.requests}) == TURNS


def test_a_fenced_answer_is_read_and_garbage_is_not(world: Path, server: Endpoint) -> None:
    plain, _ = make(SgdSource(str(world)))
    inner = server.answerer
    server.answerer = lambda request: Reply("Sure!\n```json\n" + inner(request).text + "\n```")
    assert make(source(world, server.url))[1] == {"rewritten": FIELDS}
    server.answerer = lambda _: Reply("__import__('os').abort()")
    assert make(source(world, server.url), seed=1)[1] == {"rejected_not_json": FIELDS}
    server.answerer = lambda _: Reply(json.dumps({"thought": 7}))
    rows, counts = make(source(world, server.url, writer_model="n"))
    assert counts == {"rejected_not_text": TURNS, "rejected_missing": FIELDS - TURNS} and rows == plain


def test_changed_facts_are_refused(world: Path, server: Endpoint) -> None:
    swaps = {"Ghent": "Bruges", "2": "3", "tomorrow": "on Sunday", "1 Canal": "9 Canal", "Wheel": "Hub"}

    def change(name: str, text: str) -> str:
        for old, new in swaps.items():
            text = text.replace(old, new)
        return text

    plain, _ = make(SgdSource(str(world)))
    server.answerer = reword(change)
    rows, counts = make(source(world, server.url))
    assert "rewritten" not in counts and sum(counts.values()) == FIELDS
    assert {"rejected_number_new", "rejected_name_new", "rejected_thought_inconsistent"} <= {*counts}
    assert rows == plain


@pytest.fixture
def turns(world: Path) -> list[tuple[Turn, Evidence]]:
    plain = SgdSource(str(world))
    made = plain.turns(read_dialogues(world / "dialogues_001.json")[0], 0)
    return list(zip(made, evidence(made, plain.schema), strict=True))


@pytest.mark.parametrize(
    ("original", "text", "fault"),
    [
        ("Try Spoke at 7 pm.", "How about Spoke at 7 p.m.?", None),
        ("Try Spoke at 7 pm.", "How about Spoke at 8 pm?", "number_new"),
        ("Try Spoke at 7 pm.", "How about Spoke?", "number_lost"),
        ("It costs $25.50.", "The price is 25.50.", "number_new"),
        ("Two of them match.", "I found 2 that match.", None),
        ("There is 1 of them.", "There is just one of them.", None),
        ("I found Spoke on March 3rd.", "On March 3, Spoke is there.", None),
        ("It is the Ghent Mill.", "It is the mill.", "name_lost"),
        ("It is a mill.", "It is the Ghent mill.", "name_new"),
        ("It is on friday.", "It is on monday.", "name_new"),
        ("Your code is TR0123.", "The code: TR0124.", "number_new"),
        ("Call 555-1234.", "The number is 555-1234.", None),
        ("It opens at 9:30 am and closes at 5 pm.", "From 9:30 am on, closed at 5 pm.", None),
        ("It opens at 9:30 am and closes at 5 pm.", "It opens at 5 pm and closes at 9:30 am.", "order"),
        ("It is open late.", "It isn't open late.", "negation"),
        ("No parking, not open late.", "No parking, open late.", "negation"),
        ("Is that all?", "No problem, is that all?", None),
        ("It is a small one.", "It is tiny.", "value_lost"),
        ("It is a fine one.", "It is a large one.", "value_new"),
        ('They play "Blue Moon".', "They play the blue one.", "name_lost"),
        ("Anything else?", "Anything else? See www.example.org", "number_new"),
        ("Done.", "FindWorkshop is done.", "function_named"),
        ("Done.", " ", "empty"),
        ("Done.", "It is\ndone.", "not_one_line"),
        ("Done.", "It is \ud800 done.", "not_one_line"),
        ("Done.", "It is done, " * 8, "too_long"),
        ("Done.", "System: It is done.", "label"),
        ("Is that so?", "I ask the user: is that so?", None),
        ("20Th Salon, # A6.", "It is 20Th Salon, at # A6.", None),
        ("Done.", "thought: it is done.", "label"),
        ("Done.", "It is done.<|eot_id|>", "control_token"),
        ("Done.", ["Done."], "not_text"),
    ],
)
def test_which_answers_may_replace_the_source_s(
    turns: list[tuple[Turn, Evidence]], original: str, text: Any, fault: str | None
) -> None:
    search, known = turns[1]
    assert fault_in("system", text, replace(search, system=original), known) == fault


@pytest.mark.parametrize(
    ("at", "field", "text", "fault"),
    [
        (1, "thought", "They are in Ghent, so FindWorkshop with Ghent comes next.", None),
        (1, "thought", "They are in Gent, so FindWorkshop comes next.", "thought_inconsistent"),
        (1, "thought", "I look it up with city Ghent.", "thought_inconsistent"),
        (1, "thought", "FindWorkshop for Ghent, then BookRepair.", "thought_inconsistent"),
        (1, "thought", "FindWorkshop for Ghent, as Anna asked.", "name_new"),
        (1, "thought_after", "There are 4 workshops, and Mill's is a good one.", None),
        (1, "thought_after", "There are 5 workshops.", "number_new"),
        (1, "thought_after", "I suggest Spoke, one of 4 workshops.", "name_swapped"),
        (1, "thought_after", "The 7 Hill workshop in Ghent is Mill's.", "number_swapped"),
        (1, "thought_after", "FindWorkshop gave four.", None),
        (1, "thought_after", "BookRepair gave four.", "thought_inconsistent"),
        (1, "thought_after", "The search found none, and I say so.", "negation"),
        (2, "thought", "The street is known: 1 Canal Row.", None),
        (2, "thought", "I call FindWorkshop.", "thought_inconsistent"),
        (2, "thought", "The street is Abbey Road.", "name_new"),
    ],
)
def test_which_thoughts_may_replace_ours(
    turns: list[tuple[Turn, Evidence]], at: int, field: str, text: str, fault: str | None
) -> None:
    assert fault_in(field, text, *turns[at]) == fault


def test_what_later_calls_rest_on_must_still_be_said(turns: list[tuple[Turn, Evidence]]) -> None:
    """`tomorrow` stands for 2019-03-02 in the booking; the system's confirmation says it before."""
    confirm, known = turns[3]
    assert confirm.system.startswith("Mill's") and "2019 03 02" in " ".join(known.values)
    small = replace(confirm, system="a spoke, right?")
    assert fault_in("system", "something, right?", small, known) == "value_lost"


def test_numbers_and_names_have_one_spelling() -> None:
    assert numbers("At 7 P.M., 7pm or 19:00: three of 3rd, $1,200.50 and 5%.") == [
        *("7pm", "7pm", "19:00", "3", "3", "$1,200.50", "5%")
    ]
    assert names("I saw Ann's dog. She, Dr. Who and I met on friday: Fine.") == ["Ann", "Dr", "friday"]
    assert parse_answer('{"a": 1} {"b": 2}') == {"a": 1}
    assert [parse_answer(text) for text in ("", "[1]", "{" * 9000, "{'a': 1}")] == [None] * 4


def test_a_second_build_asks_nothing(world: Path, server: Endpoint, capsys: pytest.CaptureFixture[str]) -> None:
    first = make(source(world, server.url))
    assert "writer_requests 6, writer_cached 0, writer_tokens 600" in capsys.readouterr().err
    assert make(source(world, server.url)) == first and len(server.requests) == TURNS
    assert "writer_requests 0, writer_cached 6, writer_tokens 0" in capsys.readouterr().err
    for change in ({"writer_temperature": 0.0}, {"writer_model": "other"}):
        make(source(world, server.url, **change))
    make(source(world, server.url), seed=1)
    assert len(server.requests) == 4 * TURNS


def test_an_interrupted_build_goes_on(world: Path, server: Endpoint) -> None:
    inner = server.answerer

    def then_refuses(request: dict[str, Any]) -> Reply:
        return inner(request) if len(server.requests) <= 4 else Reply(status=403, body={"error": {"message": "no"}})

    server.answerer = then_refuses
    with pytest.raises(UserError, match="403: no"):
        make(source(world, server.url, writer_concurrency=1))
    server.answerer, asked = inner, len(server.requests)
    assert make(source(world, server.url))[1] == {"rewritten": FIELDS}
    assert len(server.requests) - asked == TURNS - 4


def test_too_many_requests_then_success(world: Path, server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    inner, waits = server.answerer, list[float]()

    def busy_once(request: dict[str, Any]) -> Reply:
        first = len(server.requests) == 1
        return Reply(status=429, headers={"Retry-After": "0.25"}, body="busy") if first else inner(request)

    server.answerer = busy_once
    made = source(world, server.url, writer_concurrency=1)
    monkeypatch.setattr(made.rewriter.client.stop, "wait", waits.append)
    assert make(made)[1] == {"rewritten": FIELDS}
    assert waits == [0.25] and len(server.requests) == TURNS + 1


def test_retry_after_may_be_a_date() -> None:
    assert chat_client._retry_after_s("Wed, 01 Jan 2031 00:00:00 GMT") == chat_client.LONGEST_RETRY_AFTER_S
    assert [chat_client._retry_after_s(text) for text in (None, "soon", "-3", "nan", "2")] == [0, 0, 0, 0, 2]


def test_a_server_that_keeps_failing_leaves_the_words_as_they_were(world: Path, server: Endpoint) -> None:
    plain, _ = make(SgdSource(str(world)))
    server.answerer = lambda _: Reply(status=500, body="oops")
    assert make(source(world, server.url)) == (plain, {"failed": FIELDS})
    assert len(server.requests) == 3 * TURNS


def test_a_server_that_does_not_answer_in_time(world: Path, server: Endpoint) -> None:
    import time

    server.answerer = lambda _: time.sleep(0.3) or Reply("{}")  # type: ignore[func-returns-value]
    made = source(world, server.url, writer_timeout_s=0.05, writer_retries=0)
    assert make(made)[1] == {"failed": FIELDS}


def test_a_refusal_ends_the_build_without_showing_the_key(
    world: Path, server: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    server.answerer = lambda _: Reply(status=401, body={"error": {"message": "Incorrect API key sk-secret"}})
    with pytest.raises(UserError, match=r"refused with 401: Incorrect API key \*\*\*$"):
        make(source(world, server.url))
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer sk-secret"}
    assert b"sk-secret" not in b"".join(f.read_bytes() for f in world.parent.glob("cache*"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\x07secret")
    with pytest.raises(UserError, match="cannot be sent in a header"):
        make(source(world, server.url))


def test_a_redirect_is_refused(world: Path, server: Endpoint) -> None:
    server.answerer = lambda _: Reply(status=302, headers={"Location": "http://127.0.0.1:1/"}, body="")
    with pytest.raises(UserError, match="refused with 302"):
        make(source(world, server.url))


def test_nobody_there(world: Path, server: Endpoint) -> None:
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:1/v1/chat/completions cannot be reached"):
        make(source(world, "http://127.0.0.1:1/v1"))
    server.answerer = lambda _: Reply(body="<html>It works!</html>")
    with pytest.raises(UserError, match="does not answer in the form"):
        make(source(world, server.url))
    server.answerer = reword(good)
    make(source(world, server.url))
    filled = make(source(world, "http://127.0.0.1:1/v1"))  # nothing is asked, so nobody need be there
    assert filled[1] == {"rewritten": FIELDS}


def test_a_server_that_goes_away_later(world: Path, server: Endpoint) -> None:
    inner = server.answerer
    server.answerer = lambda r: inner(r) if len(server.requests) == 1 else Reply(body="<html>")
    counts = make(source(world, server.url, writer_concurrency=1))[1]
    assert counts == {"rewritten": 2, "failed": FIELDS - 2}


@pytest.mark.parametrize("budget", [{"writer_budget_requests": 2}, {"writer_budget_tokens": 150}])
def test_a_budget(world: Path, server: Endpoint, budget: dict[str, int]) -> None:
    counts = make(source(world, server.url, writer_concurrency=1, **budget))[1]
    assert len(server.requests) == 2 and counts["over_budget"] + counts["rewritten"] == FIELDS
    again = make(source(world, server.url, writer_concurrency=1, **budget))[1]  # what is kept costs nothing
    assert len(server.requests) == 4 and again["rewritten"] > counts["rewritten"]


def _reserved(cache: Path, count: int) -> int:
    opened = WriterCache(cache)
    return sum(opened.reserve("build", 25, 0) for _ in range(count))


def test_processes_share_a_budget(tmp_path: Path) -> None:
    cache = tmp_path / "c.sqlite"
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        assert sum(pool.map(_reserved, [cache] * 2, [20] * 2)) == 25


def test_the_first_answer_stands(tmp_path: Path) -> None:
    one, two = WriterCache(tmp_path / "c.sqlite"), WriterCache(tmp_path / "c.sqlite")
    assert (one.keep("k", "first"), two.keep("k", "second"), two.answer("other")) == ("first", "first", None)
    with sqlite3.connect(tmp_path / "c.sqlite") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_file_that_is_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.sqlite").write_text("something else entirely, and long enough to be looked at " * 20)
    with pytest.raises(UserError, match=r"c\.sqlite cannot be used"):
        WriterCache(tmp_path / "c.sqlite").answer("k")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_file() == tmp_path / "coalm_nemo" / "writer.sqlite"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"writer": "http://h/v1"}, "needs writer_model"),
        ({"writer_model": "m"}, "without writer"),
        ({"writer": "localhost:8000", "writer_model": "m"}, "not a base URL"),
        ({"writer": "http://me:key@h/v1", "writer_model": "m"}, "OPENAI_API_KEY"),
        ({"writer": "http://h/v1?key=k", "writer_model": "m"}, "OPENAI_API_KEY"),
        ({"writer": "http://h/v1", "writer_model": "m", "writer_retries": -1}, "writer_retries is -1"),
        ({"writer": "http://h/v1", "writer_model": "m", "writer_timeout_s": 0.0}, "writer_timeout_s"),
        ({"writer": "http://h/v1", "writer_model": "m", "writer_concurrency": 0}, "writer_concurrency"),
    ],
)
def test_options_are_checked_before_anything_is_read(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        SgdSource("nowhere", **options)


def test_sets_are_the_same_whatever_the_workers(
    world: Path, server: Endpoint, tiny_llama: Path, tmp_path: Path
) -> None:
    for number in (2, 3, 4):
        made = dialogue() | {"dialogue_id": f"w_{number}"}
        (world / f"dialogues_00{number}.json").write_text(json.dumps([made]))
    words = [f"sources.sgd.writer={server.url}", "sources.sgd.writer_model=m"]
    words += [f"sources.sgd.writer_cache={tmp_path / 'c.sqlite'}"]
    config = load_build_config(None, [f"sgd={world}"], words, tokenizer=str(tiny_llama), seq_len_tokens=8192)
    sets = [build(config, tmp_path / f"set{workers}", workers=workers).directory for workers in (2, 1)]
    assert len(server.requests) == 4 * TURNS
    first, second = ({f.name: f.read_bytes() for f in d.rglob("*") if f.is_file()} for d in sets)
    assert first == second
    figures = json.loads((sets[0] / "manifest.json").read_text())["sources"]["sgd"]
    assert figures["writer_rewritten"] == 4 * FIELDS and "writer_requests" not in figures
