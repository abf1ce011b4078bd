"""The script that trains on SGD: nothing is in both of its halves, and its base is the shipped one."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.sgd_before_after import HELD_OUT_EVERY, MAX_POSITIONS, by_group, longer_base, split
from coalm_nemo.data.sources.sgd import SgdSource
from coalm_nemo.demo.pipeline import NANO_BASE
from tests.data.sources.cra_world import dialogue, write


def test_every_dialogue_is_in_one_of_the_halves(tmp_path: Path) -> None:
    names = [f"w_{number}" for number in range(2 * HELD_OUT_EVERY + 1)]
    sgd = write(tmp_path / "sgd", [dialogue() | {"dialogue_id": name} for name in names])
    halves = []
    for folder in split(sgd, tmp_path):
        read = json.loads((folder / "dialogues_001.json").read_text())
        halves.append([d["dialogue_id"] for d in read])
        source = SgdSource(str(folder), tools="dialogue")
        assert [row for block in source.blocks() for row in source.rows(block, 0)]
    assert halves[1] == ["w_0", f"w_{HELD_OUT_EVERY}", f"w_{2 * HELD_OUT_EVERY}"]
    assert sorted(halves[0] + halves[1]) == sorted(names)


def test_the_longer_base_has_the_same_weights_and_tokens(tmp_path: Path) -> None:
    base = longer_base(tmp_path / "base")
    for name in ("model.safetensors", "tokenizer.json"):
        assert (base / name).read_bytes() == (NANO_BASE / name).read_bytes()
    shipped, longer = (json.loads((folder / "config.json").read_text()) for folder in (NANO_BASE, base))
    assert longer == shipped | {"max_position_embeddings": MAX_POSITIONS}


def test_calls_are_counted_apart_by_whether_training_had_them(tmp_path: Path) -> None:
    sgd = write(tmp_path / "sgd", [dialogue()])
    prompt = {"messages": [{"role": "user", "content": "History\n\nUser: In Gent.\nThought: x"}]}
    golds = {"Action: FindWorkshop(city='Ghent')": (1, 1), "Action: FindWorkshop(city='Rome')": (0, 1)}
    items = [
        {"gold": gold, "steps": [prompt], "counts": {"call": [call, 1], "call_name": [name, 1]}}
        for gold, (call, name) in golds.items()
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    assert by_group(sgd, tmp_path / "items.jsonl") == {
        "call is one of the training rows'": (1, 1, 1),
        "call is not one of the training rows'": (1, 0, 1),
        "up to 5 user turns": (2, 1, 2),
    }
