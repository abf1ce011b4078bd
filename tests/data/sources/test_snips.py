"""SNIPS' training files, in each of the layouts they are found in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coalm_nemo.data.rows import Row
from coalm_nemo.data.sources.base import Dropped
from coalm_nemo.data.sources.snips import SnipsSource
from coalm_nemo.errors import UserError

SONGS = [
    {"data": [{"text": "Do "}, {"text": "My  Hat", "entity": "track"}, {"text": " in "}, {"text": "Café", "entity": "list"}]},
    {"data": [{"text": "Queue "}, {"text": "A", "entity": "track"}, {"text": " and "}, {"text": "B", "entity": "track"}]},
    {"data": [{"text": "Just play"}, {"text": " ", "entity": "artist"}]},
    {"data": [{"text": "  "}]},
]  # fmt: skip
WEATHER = [{"data": [{"text": "Rain in "}, {"text": "Oslo", "entity": "city"}, {"text": "?"}]}]


def write(file: Path, value: Any, encoding: str = "utf-8") -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(json.dumps(value, ensure_ascii=False).encode(encoding))


@pytest.fixture(params=["flat", "folders", "lists"])
def snips(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Two intents; the short file of one beside its full one, and validation files, are to be ignored."""
    for intent, utterances in (("PlaySong", SONGS), ("GetRain", WEATHER)):
        place = tmp_path / intent if request.param == "folders" else tmp_path
        content = utterances if request.param == "lists" else {intent: utterances}
        write(place / f"validate_{intent}.json", {"Other": []})
        write(place / f"train_{intent}{'_full' if intent == 'PlaySong' else ''}.json", content)
    write((tmp_path / "PlaySong" if request.param == "folders" else tmp_path) / "train_PlaySong.json", {"Other": []})
    return tmp_path


def rows_of(path: Path) -> list[Row | Dropped]:
    source = SnipsSource(str(path))
    return [row for block in source.blocks() for row in source.rows(block, 0)]


def test_states(snips: Path) -> None:
    rows = rows_of(snips)
    assert rows[-1] == Dropped("empty_text", "train_PlaySong_full.json:4")
    kept = [row for row in rows if isinstance(row, Row)]
    assert {row.part for row in kept} == {"tod"}
    prompts = [row.messages[0]["content"].rpartition("\n\n")[2] for row in kept]
    assert prompts == ["User: Rain in Oslo?", "User: Do My Hat in Café", "User: Queue A and B", "User: Just play"]
    outputs = [row.messages[1]["content"] for row in kept]
    assert outputs[1] == 'System: {"domain": "PlaySong", "slot_values": {"track": "My Hat", "list": "Café"}}'
    states = [json.loads(output.removeprefix("System: ")) for output in outputs]
    assert [(s["domain"], s["slot_values"]) for s in states[::2]] == [
        ("GetRain", {"city": "Oslo"}),
        ("PlaySong", {"track": ["A", "B"]}),
    ]
    assert states[3]["slot_values"] == {}


def test_every_row_lists_every_domain_with_its_slots(snips: Path) -> None:
    instructions = {row.messages[0]["content"].rpartition("\n\n")[0] for row in rows_of(snips) if isinstance(row, Row)}
    (instruction,) = instructions
    assert "- GetRain: city\n- PlaySong: artist, list, track\n" in instruction
    sample = json.loads(instruction.rpartition("System: ")[2])
    assert set(sample) == {"domain", "slot_values"}


def test_blocks_in_any_order_give_the_same_rows(snips: Path) -> None:
    source = SnipsSource(str(snips))
    backwards = [list(source.rows(block, 0)) for block in reversed(list(source.blocks()))]
    assert [row for rows in reversed(backwards) for row in rows] == rows_of(snips)


def test_latin_1_is_taken_where_utf_8_fails(tmp_path: Path) -> None:
    raw = b'{"A": [{"data": [{"text": "' + "één ".encode("latin-1") + "café".encode() + b'"}]}]}'
    (tmp_path / "train_A.json").write_bytes(raw)
    write(tmp_path / "train_B.json", [{"data": [{"text": "Málaga"}]}], encoding="latin-1")
    texts = [row.messages[0]["content"].rpartition("User: ")[2] for row in rows_of(tmp_path) if isinstance(row, Row)]
    assert texts == ["één café", "Málaga"]


def test_an_edited_file_is_read_again(tmp_path: Path) -> None:
    import os

    write(tmp_path / "train_A.json", {"A": WEATHER})
    rows_of(tmp_path)
    write(tmp_path / "train_A.json", {"A": [{"data": [{"text": "x", "entity": "county"}]}]})
    os.utime(tmp_path / "train_A.json", (1, 1))
    (row,) = rows_of(tmp_path)
    assert isinstance(row, Row)
    assert "- A: county" in row.messages[0]["content"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "is not valid JSON"),
        (b"3", "is not a SNIPS file"),
        (b'{"A": 3}', "'A' must be a list of utterances"),
        (b'{"A": [{"data": []}, {"text": "x"}]}', "record 2 needs 'data'"),
        (b'[{"data": [{"text": 3}]}]', "record 1 needs 'data'"),
        (b'[{"data": [{"text": "\\ud83d"}]}]', "is not valid JSON"),
    ],
)
def test_another_layout_is_named(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "train_A_full.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"train_A_full\.json.*{sentence}"):
        rows_of(tmp_path)


def test_what_holds_no_snips_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no SNIPS training file"):
        rows_of(tmp_path)
    with pytest.raises(UserError, match="is not a directory"):
        rows_of(tmp_path / "absent")
    for place in ("one", "two"):
        write(tmp_path / place / "train_A.json", WEATHER)
    with pytest.raises(UserError, match=r"holds train_A\.json twice"):
        rows_of(tmp_path)
