"""Every source, end to end: the supervised text of its rows, decoded, is the source's target with its end of turn.

The targets are taken from the raw files here, apart from the package's readers, wherever the layout has them as text.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coalm_nemo.data.build import build
from coalm_nemo.data.build_config import load_build_config
from coalm_nemo.data.chat import load_tokenizer
from coalm_nemo.data.shards import ShardSet
from coalm_nemo.data.show import describe_row, draw_rows
from coalm_nemo.data.sources.hammer import HammerSource
from tests.data.sources.cra_world import SGD, needs_sgd
from tests.tiny_llama import SPECIAL_TOKENS

END = "<|eot_id|>"
RECORDS = 1100
CHECKED = 1000
WORDS = (
    "city",
    "Gent",
    "two",
    "the 8th",
    "late",
    "'quoted'",
    '"said"',
    "é漢",
    "\\n",
    "12:30",
    "a_b",
    *SPECIAL_TOKENS[3:7],
)

Targets = dict[str, str]
Maker = Callable[[random.Random, Path], tuple[Path, Targets]]


def text(draw: random.Random, most: int = 9) -> str:
    """A few words; some spell control tokens."""
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, most)))


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def released(draw: random.Random, where: Path) -> tuple[Path, Targets]:
    prefixes = ("Action: f(a='{}')", "System: {}", '[{{"name": "{}"}}]', '[f(a="{}")]', 'System: {{"domain": "{}"}}')
    records = [
        {
            "id": f"r{i}",
            "instruction": text(draw),
            "input": f"User: {text(draw)}",
            "output": prefixes[i % 5].format(text(draw)),
        }
        for i in range(RECORDS)
    ]
    return write(where / "released.json", records), {r["id"]: r["output"] for r in records}


def chat(draw: random.Random, where: Path) -> tuple[Path, Targets]:
    records = []
    for i in range(RECORDS):
        turns = [(role, text(draw)) for _ in range(draw.randint(1, 4)) for role in ("user", "assistant")]
        records.append({"id": f"c{i}", "messages": [{"role": role, "content": said} for role, said in turns]})
    return write(where / "chat.json", records), {r["id"]: r["messages"][-1]["content"] for r in records}


def toolace(draw: random.Random, where: Path) -> tuple[Path, Targets]:
    records, targets = [], {}
    for i in range(RECORDS // 2):
        said = [(role, text(draw)) for _ in range(draw.randint(1, 4)) for role in ("user", "assistant")]
        records.append(
            {"id": f"t{i}", "system": text(draw), "conversations": [{"from": r, "value": v} for r, v in said]}
        )
        answers = [v for r, v in said if r == "assistant"]
        targets |= {f"t{i}/turn{number}": answer for number, answer in enumerate(answers, 1)}
    return write(where / "toolace.json", records), targets


def snips(draw: random.Random, where: Path) -> tuple[Path, Targets]:
    utterances, targets = [], {}
    for i in range(RECORDS):
        value = f"{text(draw, 3)} {i}"
        utterances.append({"data": [{"text": "Play "}, {"text": value, "entity": "song"}, {"text": " now"}]})
        targets[f"Play {value} now"] = "System: " + json.dumps(
            {"domain": "PlayMusic", "slot_values": {"song": value}}, ensure_ascii=False
        )
    (where / "snips").mkdir()
    write(where / "snips" / "train_PlayMusic_full.json", {"PlayMusic": utterances})  # type: ignore[arg-type]
    return where / "snips", targets


def hammer(draw: random.Random, where: Path) -> tuple[Path, Targets]:
    records = []
    for i in range(RECORDS // 2):
        parameters = {"city": {"description": text(draw), "type": "str"}, "n": {"description": "d", "type": "int"}}
        tools = [{"name": "find", "description": text(draw), "parameters": parameters}]
        answers = [{"name": "find", "arguments": {"city": text(draw, 3), "n": i}}]
        records.append({"id": i, "query": text(draw), "tools": json.dumps(tools), "answers": json.dumps(answers)})
    return write(where / "hammer.json", records), {}


def sgd(draw: random.Random, where: Path) -> tuple[Path, Targets]:
    """Calls and answers of two of the real files, as their annotation has them."""
    targets = {}
    shutil.copy(SGD / "train" / "schema.json", where)
    for file in sorted((SGD / "train").glob("dialogues_*.json"))[-2:]:
        shutil.copy(file, where)
        for dialogue in json.loads(file.read_text(encoding="utf-8")):
            for number, turn in enumerate(dialogue["turns"]):
                if turn["speaker"] == "SYSTEM":
                    name = f"{dialogue['dialogue_id']}/{number}"
                    targets[f"{name}/response"] = "System: " + " ".join(turn["utterance"].split())
                    calls = [f["service_call"] for f in turn["frames"] if "service_call" in f]
                    targets |= {f"{name}/action": f"Action: {call['method']}(" for call in calls}
    return where, targets


MAKERS = [released, chat, toolace, snips, hammer, pytest.param(sgd, marks=needs_sgd)]


@pytest.mark.parametrize("maker", MAKERS, ids=lambda m: m.__name__)
def test_a_thousand_rows(maker: Maker, tiny_llama: Path, tmp_path: Path) -> None:
    path, targets = maker(random.Random(0), tmp_path)
    words = [f"{maker.__name__}={path}"]
    config = load_build_config(None, words, [], tokenizer=str(tiny_llama), seq_len_tokens=8192)
    rows = ShardSet.load(build(config, tmp_path / "set", workers=1).directory)
    if maker is hammer:
        targets = dict(_hammer_targets(HammerSource(str(path)), config.seed))
    tokenizer = load_tokenizer(tiny_llama)
    drawn = draw_rows(rows, CHECKED, 0, None)
    assert len(drawn) == CHECKED
    for index in drawn:
        row = describe_row(rows, index, tokenizer)
        expected = _target_of(maker.__name__, row, targets)
        if row["row_id"].endswith("/action"):  # how arguments are written is the source's, and tested there
            assert row["target_text"].startswith(expected)
            assert row["target_text"].endswith(")" + END)
        else:
            assert row["target_text"] == expected + END
        mask = row["loss_mask"]
        assert mask == sorted(mask)  # one target, at the end: what is read before is never learnt


def _target_of(name: str, row: dict[str, Any], targets: Targets) -> str:
    if name == "snips":
        return targets[
            row["prompt_text"].rpartition("User: ")[2].partition("<|eot_id|><|start_header_id|>assistant")[0]
        ]
    return targets[row["row_id"]]


def _hammer_targets(source: HammerSource, seed: int) -> Iterator[tuple[str, str]]:
    """Masked names are the source's to draw; tests of the source show that they are a renaming of the record."""
    for block in source.blocks():
        for row in source.rows(block, seed):
            yield row.row_id, row.messages[-1]["content"]  # type: ignore[union-attr]
