"""What a training row shares with an evaluation is found, and what everybody says is not held against it."""

from __future__ import annotations

import json
import pickle
import random
import time
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coalm_nemo.data import contamination
from coalm_nemo.data.contamination import EvaluationItems, Overlap, normalised_words
from coalm_nemo.errors import UserError

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
API_BANK, HAMMER = DATA / "api-bank" / "hammer_apibank_l1.json", DATA / "hammer" / "masking_sft_data_example.json"
needs_real_data = pytest.mark.skipif(
    not (API_BANK.is_file() and HAMMER.is_file()), reason=f"API-Bank and Hammer rows are not at {DATA}"
)

LONG = "please find me a cheap italian restaurant in the north of cambridge that has a table for six on friday evening"
SHORT = "book the cheapest flight to Lisbon"
WORDS = LONG.split()


def write(directory: Path, name: str, content: Any) -> Path:
    """A file of the given lines, or of a JSON value, or of a JSON value a line."""
    path = directory / name
    if path.suffix == ".jsonl":
        content = "\n".join(json.dumps(v) for v in content)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def items_of(directory: Path, *lines: str) -> EvaluationItems:
    return EvaluationItems.read([write(directory, "items.txt", "\n".join(lines))])


# ---- what is an overlap


@pytest.mark.parametrize(
    "said",
    [
        LONG,
        "Hello! " + LONG + " Thanks.",
        LONG.upper().replace(" ", ",  "),
        LONG.replace("cheap", "“cheap”").replace(" ", "\n"),
        LONG.replace("cambridge", "ｃａｍｂｒｉｄｇｅ"),  # NFKC
        " ".join(["kindly", *WORDS[1:14], "near", "me"]),  # thirteen of its words
    ],
)
def test_thirteen_words_in_a_row_are_an_overlap(tmp_path: Path, said: str) -> None:
    overlap = items_of(tmp_path, "something else", LONG).overlap(["what now?", said])
    assert overlap is not None and (overlap.kind, overlap.item_id) == ("ngram", "items.txt:2")
    assert len(overlap.words.split()) == 13 and overlap.words in LONG


@pytest.mark.parametrize(
    "said",
    [
        " ".join(WORDS[:12]),
        " ".join([*WORDS[:10], "really", *WORDS[10:]]),  # 10 words before, 11 after
        " ".join([*WORDS[:9], "indian", *WORDS[10:]]),
        " ".join(reversed(WORDS)),
        "",
        "?!",
    ],
)
def test_fewer_are_none(tmp_path: Path, said: str) -> None:
    assert items_of(tmp_path, LONG).overlap([said]) is None


def test_words_of_two_texts_are_not_in_a_row(tmp_path: Path) -> None:
    items = items_of(tmp_path, LONG)
    assert items.overlap([" ".join(WORDS[:10]), " ".join(WORDS[10:])]) is None
    padding = " ".join(f"w{i}" for i in range(13))
    assert items.overlap([f"{padding} {' '.join(WORDS[:10])}", f"{' '.join(WORDS[10:])} {padding}"]) is None


def test_a_short_request_must_be_the_whole_turn(tmp_path: Path) -> None:
    items = items_of(tmp_path, SHORT)
    assert items.overlap(["Hi.", SHORT.upper() + "!"]) == Overlap("exact", "items.txt:1", SHORT.lower())
    assert items.overlap([f"User: hello there\nAI: yes?\nUser: {SHORT}."]) is not None
    assert items.overlap(["[BEGIN OF QUERY]\n" + SHORT + "\n[END OF QUERY]"]) is not None
    assert items.overlap([SHORT + " today"]) is None
    assert items.overlap([SHORT.removesuffix(" Lisbon")]) is None


def test_greetings_and_turns_of_dialogues_are_everybodys(tmp_path: Path) -> None:
    assert items_of(tmp_path, "yes thanks", "no that is all").overlap(["yes thanks", "no that is all"]) is None
    turns = [{"role": "user", "content": SHORT}, {"role": "assistant", "content": "For when, and for how many people?"}]
    dialogue = {"messages": [*turns, {"role": "user", "content": "Yes, that works for me."}]}
    items = EvaluationItems.read([write(tmp_path, "dialogues.jsonl", [dialogue])])
    assert items.overlap(["Yes that works for me", "For when, and for how many people?", SHORT]) is None
    items = EvaluationItems.read([write(tmp_path, "single.jsonl", [{"messages": turns}])])
    assert items.overlap(["For when, and for how many people?"]) is None  # an answer
    assert items.overlap([SHORT]) is not None


def test_what_many_items_say_is_a_prompt(tmp_path: Path) -> None:
    prompt = "You are given a question and some tools. Answer it by calling one of them in turn:"
    few, many = ([f"{prompt} question number {i} is {i * 7919} kilometres" for i in range(n)] for n in (10, 11))
    row = [prompt, "and something that nobody asked"]
    assert items_of(tmp_path, *few).overlap(row) is not None
    items = items_of(tmp_path, *many)
    assert items.overlap(row) is None
    figures = items.figures()
    assert figures["evaluation_items"] == 11 and figures["ignored_as_prompts"] == items.ignored > 0
    other = [f"item {i} says {i * 104729} things" for i in range(300)]
    assert items_of(tmp_path, *many, *other).overlap(row) is not None  # 11 of 311 are not one in twenty


def test_a_prompt_of_one_file_is_found_among_larger_ones(tmp_path: Path) -> None:
    prompt = " ".join(WORDS)
    small = write(tmp_path, "small.txt", "\n".join(f"{prompt} {i}" for i in range(20)))
    large = write(tmp_path, "large.txt", "\n".join(f"item {i} says {i * 104729} things" for i in range(900)))
    assert EvaluationItems.read([large, small]).overlap([prompt]) is None


def test_hammers_prompt_blocks_are_left_out_on_both_sides(tmp_path: Path) -> None:
    def row(query: str) -> dict[str, str]:
        blocks = [("TASK INSTRUCTION", LONG), ("AVAILABLE TOOLS", json.dumps(LONG)), ("FORMAT INSTRUCTION", LONG)]
        text = "\n\n".join(f"[BEGIN OF {b}]\n{t}\n[END OF {b}]" for b, t in [*blocks, ("QUERY", query)])
        return {"instruction": text, "input": "", "output": "[]"}

    items = EvaluationItems.read([write(tmp_path, "hammer.json", [row(SHORT), row("what is the time in Rome now")])])
    assert items.overlap([LONG]) is None
    assert items.overlap([row("who won the cup")["instruction"], "[]"]) is None
    assert items.overlap([row(SHORT)["instruction"]]) == Overlap("exact", "hammer.json:1", SHORT.lower())
    plain = items_of(tmp_path, LONG)
    assert plain.overlap([row("who won the cup")["instruction"]]) is None
    assert plain.overlap([row(LONG)["instruction"]]) is not None


def test_equal_hashes_of_different_words_are_no_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contamination, "_ngram_hashes", lambda codes: np.zeros(len(codes) - 12, np.uint64))
    items = items_of(tmp_path, " ".join(WORDS[:13]))
    assert items.overlap([" ".join(reversed(WORDS))]) is None
    assert items.overlap([LONG]) is not None


# ---- files


BFCL = [
    {"id": "simple_0", "question": [[{"role": "user", "content": SHORT}]], "function": [{"description": LONG}]},
    {"id": "multi_1", "question": [[{"role": "system", "content": LONG}, {"role": "user", "content": "a " * 20}], []]},
]
MULTIWOZ = {
    "MUL1.json": {
        "goal": {"message": [LONG]},
        "log": [{"text": "hi " * 14, "metadata": {}}, {"text": "bye " * 14, "metadata": {"taxi": {"x": LONG}}}],
    },
    "MUL2.json": {"goal": {}, "log": [{"text": "ho " * 14, "metadata": {}}]},
}
SGD = [
    {
        "dialogue_id": "9_1",
        "services": [LONG],
        "turns": [
            {"speaker": "USER", "utterance": "hi " * 14, "frames": [{"service": LONG, "actions": [LONG]}]},
            {"speaker": "SYSTEM", "utterance": "bye " * 14, "frames": []},
        ],
    }
]
LAYOUTS: dict[str, tuple[str, Any, dict[str, str]]] = {
    "lines": ("a.txt", f"\n{LONG}\n\n{SHORT}\n", {LONG: "2", SHORT: "4"}),
    "bfcl_is_lines_in_json": ("b.json", "\n".join(map(json.dumps, BFCL)), {SHORT: "simple_0", "a " * 13: "multi_1"}),
    "one_line_in_json": ("b.json", BFCL[0], {SHORT: "simple_0"}),
    "multiwoz": ("c.json", MULTIWOZ, {"hi " * 13: "MUL1.json", "bye " * 13: "MUL1.json", "ho " * 13: "MUL2.json"}),
    "sgd": ("d.json", SGD, {"hi " * 13: "9_1", "bye " * 13: "9_1"}),
    "messages": ("e.jsonl", [{"messages": [{"role": "user", "content": LONG}], "tools": []}], {LONG: "1"}),
    "sharegpt": ("f.json", [{"system": "x " * 20, "conversations": [{"from": "human", "value": LONG}]}], {LONG: "1"}),
    "strings": ("g.json", [SHORT, LONG], {SHORT: "1", LONG: "2"}),
    "around_an_array": ("h.json", {"version": 3, "data": [{"id": 7, "question": SHORT}]}, {SHORT: "7"}),
    "api_bank_dialogue": (
        "i.jsonl",
        [{"role": "User", "text": LONG}, {"role": "API", "result": "x " * 20}],
        {LONG: "1"},
    ),
    "api_bank_hammer": ("j.json", [{"instruction": "", "input": f"User: {SHORT}", "output": "[]"}], {SHORT: "1"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_language_of_each_layout_is_read(tmp_path: Path, layout: str) -> None:
    name, content, found = LAYOUTS[layout]
    items = EvaluationItems.read([write(tmp_path, name, content)])
    for text, item in found.items():
        overlap = items.overlap([text])
        assert overlap is not None and overlap.item_id == f"{name}:{item}"
    if LONG not in found:
        assert items.overlap([LONG]) is None, "a tool, a prompt or a note was taken for language"
    assert items.overlap(["x " * 13]) is None


BAD = {
    "no_such_file": ("none.txt", None, "cannot be read: No such file"),
    "name": ("items.csv", "a,b", "must end in .txt"),
    "json": ("a.json", '{"id": ', "a.json is not valid JSON"),
    "later_line": ("a.jsonl", None, "a.jsonl:2 is not valid JSON"),
    "nothing": ("a.txt", "\n \n", "holds no text"),
    "no_language": ("a.json", [{"id": "abc", "tools": ["a tool"]}], "holds no text"),
    "empty_json": ("a.json", [], "holds no text"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_sentence(tmp_path: Path, case: str) -> None:
    name, content, sentence = BAD[case]
    path = tmp_path / name
    if case == "later_line":
        path.write_text('{"text": "a"}\n{"text": \n')
    elif content is not None:
        write(tmp_path, name, content)
    with pytest.raises(UserError, match=sentence):
        EvaluationItems.read([path])


def test_directories_and_bytes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a directory"):
        EvaluationItems.read([tmp_path])
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        EvaluationItems.read([tmp_path / "latin.txt"])
    (tmp_path / "deep.json").write_text("[" * 100_000 + '"a"' + "]" * 100_000)
    with pytest.raises(UserError, match="deep.json is not valid JSON"):
        EvaluationItems.read([tmp_path / "deep.json"])


def test_no_files_are_no_items() -> None:
    items = EvaluationItems.read([])
    assert len(items) == 0 and items.overlap([LONG, SHORT]) is None


def test_a_worker_gets_the_same_items(tmp_path: Path) -> None:
    items = items_of(tmp_path, LONG, SHORT)
    copy = pickle.loads(pickle.dumps(items))
    assert len(copy) == 2
    for text in (LONG, SHORT):
        assert copy.overlap([text]) == items.overlap([text]) is not None


# ---- any words


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_normalised_words_are_what_a_plain_reading_gives(text: str) -> None:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    assert normalised_words(text) == "".join(c if c.isalnum() else " " for c in folded).split()


def test_half_a_surrogate_pair_is_no_letter() -> None:
    assert normalised_words("a\ud800b") == ["a", "b"]


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> tuple[EvaluationItems, list[list[str]]]:
    """200 items of 5 to 60 words, out of 400 words that are all ei*."""
    draw = random.Random(0)
    items = [[f"e{draw.randrange(400)}" for _ in range(draw.randint(5, 60))] for _ in range(200)]
    return items_of(tmp_path_factory.mktemp("items"), *map(" ".join, items)), items


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_thirteen_words_planted_anywhere_are_found(
    evaluation: tuple[EvaluationItems, list[list[str]]], data: st.DataObject
) -> None:
    items, texts = evaluation
    chosen = data.draw(st.sampled_from([t for t in texts if len(t) >= 13]))
    start = data.draw(st.integers(0, len(chosen) - 13))
    around = st.lists(st.sampled_from(["t1", "t2", "e1", "e399", "...", "naïve"]), max_size=40)
    row = [*data.draw(around), *chosen[start : start + 13], *data.draw(around)]
    overlap = items.overlap(["some other text", data.draw(st.sampled_from([" ", ", ", "\n"])).join(row)])
    assert overlap is not None and overlap.kind == "ngram"
    assert overlap.words in " ".join(texts[int(overlap.item_id.split(":")[1]) - 1])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 400).map("t{}".format), max_size=80).map(" ".join), max_size=5))
def test_other_words_never_hit(evaluation: tuple[EvaluationItems, list[list[str]]], row: list[str]) -> None:
    assert evaluation[0].overlap(row) is None


def test_microseconds_a_row(tmp_path: Path) -> None:
    """About 0.1 ms for 450 words that evaluation items use too; the limit leaves room for a busy machine."""
    draw = random.Random(1)
    vocabulary = [f"{draw.randrange(16**5):x}" for _ in range(5_000)]
    items = items_of(tmp_path, *(" ".join(draw.choices(vocabulary, k=40)) for _ in range(2_000)))
    rows = [" ".join(draw.choices(vocabulary, k=450)) for _ in range(300)]
    started = time.process_time()
    assert not any(items.overlap([row]) for row in rows)
    assert (time.process_time() - started) / len(rows) < 1.5e-3


# ---- real files


@needs_real_data
def test_hammers_rows_do_not_collide_with_api_bank_through_their_prompt() -> None:
    items = EvaluationItems.read([API_BANK])
    assert len(items) == 399
    rows = json.loads(HAMMER.read_text(encoding="utf-8"))
    assert [items.overlap([r["instruction"] + r["input"], r["output"]]) for r in rows] == [None] * len(rows)


@needs_real_data
def test_api_bank_queries_are_found_in_a_hammer_row() -> None:
    """Every query with a turn of thirteen words, and every short one that is all its user says, planted in a row."""
    items = EvaluationItems.read([API_BANK])
    frame = json.loads(HAMMER.read_text(encoding="utf-8"))[0]["instruction"].split("[BEGIN OF QUERY]")[0]
    queries = [r["instruction"].split("[BEGIN OF QUERY]")[1] for r in json.loads(API_BANK.read_text(encoding="utf-8"))]
    found = [items.overlap([f"{frame}[BEGIN OF QUERY]{q}"]) is not None for q in queries]
    long = [any(len(normalised_words(line)) > 14 for line in q.split("\n")) for q in queries]
    assert all(f for f, has_long in zip(found, long, strict=True) if has_long)
    assert sum(found) > 0.9 * len(queries)
