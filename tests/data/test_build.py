"""Sets as a whole: the same bytes whatever the workers, whole or not at all, and refused where they do not fit a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coalm_nemo.data.blend import blended_order
from coalm_nemo.data.build import Built, build
from coalm_nemo.data.build_config import SourceEntry, load_build_config
from coalm_nemo.data.chat import load_tokenizer
from coalm_nemo.data.set_check import check_set
from coalm_nemo.data.shards import ShardSet, read_manifest
from coalm_nemo.data.show import describe_row, draw_rows
from coalm_nemo.data.sources.chat import ChatSource
from coalm_nemo.errors import UserError
from coalm_nemo.models.llama import load_llama_config

END = "<|eot_id|>"


def chat_rows(count: int, tag: str = "") -> list[dict[str, Any]]:
    """Conversations of different lengths; every answer is different."""
    rows = []
    for i in range(count):
        messages = [{"role": "user", "content": f"{tag}question {i} " * (1 + i % 5)}]
        messages += [{"role": "assistant", "content": f"{tag}answer {i}"}]
        rows.append({"id": f"{tag}{i}", "messages": messages})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("rows")
    return write_rows(directory / "a.jsonl", chat_rows(60, "a")), write_rows(directory / "b.jsonl", chat_rows(30, "b"))


Builder = Callable[..., Built]


@pytest.fixture
def build_two(two_sources: tuple[Path, Path], tiny_llama: Path, tmp_path: Path) -> Builder:
    def run(name: str = "set", workers: int = 1, words: tuple[str, ...] = (), **given: Any) -> Built:
        a, b = two_sources
        values = {"tokenizer": str(tiny_llama), "seq_len_tokens": 128} | given
        config = load_build_config(None, [f"chat={a}", f"chat={b}"], words, **values)
        return build(config, tmp_path / name, workers=workers)

    return run


def tree(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_manifest_and_rows(build_two: Builder, tiny_llama: Path) -> None:
    built = build_two()
    manifest, rows = built.manifest, ShardSet.load(built.directory)
    assert manifest["sources"]["chat"]["rows"] == 60
    assert manifest["sources"]["chat_2"]["dropped"] == {}
    assert manifest["rows"] == len(rows) == 90
    assert manifest["tokens"] == len(rows.tokens) == sum(len(rows.row(i)[0]) for i in range(90))
    assert manifest["supervised_tokens"] == int(rows.loss_mask.sum()) == int(rows.supervised().sum())
    assert manifest["sum_of_squared_lengths"] == sum(len(rows.row(i)[0]) ** 2 for i in range(90))
    tokenizer = load_tokenizer(tiny_llama)
    for index in draw_rows(rows, 90, 0, None):
        row = describe_row(rows, index, tokenizer)
        assert row["target_text"] == f"{row['row_id'][0]}answer {row['row_id'][1:]}{END}"
        assert row["source"] == ("chat" if row["row_id"][0] == "a" else "chat_2")
        assert row["prompt_text"].startswith("<|begin_of_text|><|start_header_id|>user")


def test_the_same_bytes_from_any_number_of_workers(build_two: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coalm_nemo.data.sources.readers.BLOCK_BYTES", 700)
    one, three = build_two("one", 1), build_two("three", 3)
    assert tree(one.directory) == tree(three.directory)


def test_a_finished_set_is_used_again_and_another_is_not_overwritten(build_two: Builder) -> None:
    first = build_two()
    before = tree(first.directory)
    assert build_two().reused
    with pytest.raises(UserError, match="exists and is not empty"):
        build_two(seed=7)
    assert tree(first.directory) == before


def test_the_key_knows_every_input(build_two: Builder, two_sources: tuple[Path, Path]) -> None:
    keys = {
        build_two("0").manifest["key"],
        build_two("1", seed=1).manifest["key"],
        build_two("2", loss="all").manifest["key"],
    }
    keys.add(build_two("3", words=("sources.chat.epochs=2",)).manifest["key"])
    text = two_sources[0].read_text()
    two_sources[0].write_text(text.replace("question 3 ", "question 4 "))
    keys.add(build_two("4").manifest["key"])
    two_sources[0].write_text(text)
    assert len(keys) == 5
    assert build_two("5").manifest["key"] in keys


def test_bad_input_leaves_nothing_behind(build_two: Builder, two_sources: tuple[Path, Path], tmp_path: Path) -> None:
    text = two_sources[1].read_text()
    two_sources[1].write_text(text + "{half\n")
    try:
        for workers in (1, 2):
            with pytest.raises(UserError, match=r"b\.jsonl.* 31 is not valid JSON"):
                build_two("broken", workers)
    finally:
        two_sources[1].write_text(text)
    assert list(tmp_path.iterdir()) == []


def test_packs_hold_each_row_once(build_two: Builder) -> None:
    rows = ShardSet.load(build_two().directory)
    packs = rows.packs(128, 4)
    assert packs is not None
    assert sorted(packs.rows.tolist()) == list(range(90))
    padded = -(-rows.positions() // 4) * 4
    assert all(padded[packs.pack(i)].sum() <= 128 for i in range(len(packs)))
    assert rows.packs(128, 8) is None
    assert rows.manifest["fill"] == round(rows.positions().sum() / (len(packs) * 128), 6)


def test_a_split_is_by_content_and_covers_the_set(build_two: Builder) -> None:
    rows = ShardSet.load(build_two().directory)
    train, validation = rows.split(0.3)
    assert validation is not None
    ids = [{part.row_id(i) for i in range(len(part))} for part in (train, validation)]
    assert not ids[0] & ids[1]
    assert ids[0] | ids[1] == {rows.row_id(i) for i in range(len(rows))}
    assert len({rows.fingerprint, train.fingerprint, validation.fingerprint}) == 3
    assert train.packs(128, 4) is None


def test_weights_and_epochs(build_two: Builder) -> None:
    weighted = build_two("w", words=("sources.chat.weight=1", "sources.chat_2.weight=3")).manifest
    assert [weighted["blend"][n]["rows"] for n in ("chat", "chat_2")] == [10, 30]
    epochs = build_two("e", words=("sources.chat.epochs=0.5", "sources.chat_2.epochs=2.1")).manifest
    assert [epochs["blend"][n]["rows"] for n in ("chat", "chat_2")] == [30, 63]
    assert epochs["blend"]["chat"]["share_of_rows"] == round(30 / 93, 6)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    numbers=st.lists(st.floats(0.05, 5), min_size=4, max_size=4),
    weighted=st.booleans(),
    seed=st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_any_blend(sizes: list[int], numbers: list[float], weighted: bool, seed: int) -> None:
    """Rows of a source come equally often, to one; weights give their shares without repeats."""
    entries = [
        SourceEntry(str(i), ChatSource("x"), "last", 1.0 if weighted else n, n if weighted else None)
        for i, n in zip(range(len(sizes)), numbers, strict=False)
    ]
    sources = np.repeat(np.arange(len(sizes), dtype=np.uint8), sizes)
    order = blended_order(entries, sources, seed)
    counts = np.bincount(order, minlength=len(sources))
    for i, entry in enumerate(entries):
        mine = counts[sources == i]
        assert mine.max() - mine.min() <= 1
        if not weighted:
            assert mine.sum() == round(entry.epochs * sizes[i])
    if weighted:
        assert counts.max() == 1
        assert any(counts[sources == i].all() for i in range(len(sizes)))


def test_a_run_refuses_a_set_that_is_not_its_own(build_two: Builder, tiny_llama: Path, tmp_path: Path) -> None:
    directory = build_two().directory
    llama = load_llama_config(tiny_llama)
    check_set(directory, tiny_llama, 128, llama)
    with pytest.raises(UserError, match=r"sequences of 128 tokens and train\.seq_len_tokens is 256"):
        check_set(directory, tiny_llama, 256, llama)
    other = tmp_path / "other"
    other.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (other / name).write_bytes((tiny_llama / name).read_bytes())
    (other / "chat_template.jinja").write_text("{{ bos_token }}" + (other / "chat_template.jinja").read_text())
    with pytest.raises(UserError, match="another chat template"):
        check_set(directory, other, 128, llama)
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
    with pytest.raises(UserError, match="another tokenizer"):
        check_set(directory, other, 128, llama)


@pytest.mark.parametrize("name", ["tokens.bin", "loss_mask.bin", "offsets.npy", "manifest.json"])
def test_a_torn_set_is_refused(build_two: Builder, name: str) -> None:
    directory = build_two().directory
    (directory / name).write_bytes((directory / name).read_bytes()[:-4])
    with pytest.raises(UserError, match="torn"):
        ShardSet.load(directory)


def test_our_template_goes_where_the_base_has_none(
    two_sources: tuple[Path, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).write_bytes((tiny_llama / name).read_bytes())
    config = load_build_config(None, [f"chat={two_sources[0]}"], [], tokenizer=str(bare), seq_len_tokens=512)
    built = build(config, tmp_path / "set", workers=1)
    assert built.manifest["template"] == "llama3.1"
    rows = ShardSet.load(built.directory)
    tokenizer = load_tokenizer(built.directory / "tokenizer")
    conversation = chat_rows(1, "a")[0]["messages"]
    assert tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=False) == rows.row(0)[0].tolist()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["sources.chat.epoch=2"], "unknown key 'epoch'; did you mean"),
        (["sources.chat.epochs=0"], "epochs is 0; it must be a number above 0"),
        (["sources.chat.weight=2"], "source chat_2 has no weight"),
        (["sources.chat.loss=some"], "loss is 'some'; use one of last, all"),
        (["sources.chat.kind=sdg"], "there is no kind 'sdg'; did you mean 'sgd'"),
        (["sead=3"], "unknown key 'sead'; did you mean 'seed'"),
        (["pack_multiple=many"], "pack_multiple"),
        (["template=chatml"], "template is 'chatml'; use one of auto, llama3.1, llama3"),
        (["=3"], "is not of the form key=value"),
        (["sources.chat.path=nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["against=[nowhere.json]"], "nowhere.json does not exist"),
    ],
)
def test_bad_options(build_two: Builder, words: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        build_two(words=tuple(words))
    assert sentence in str(refused.value)
    assert not (tmp_path / "set").exists()


def test_a_yaml_extends_another(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "tokenizer: t\nseed: 5\nsources:\n  a: {kind: chat, path: a.jsonl}\n  b: {kind: chat, path: b.jsonl, epochs: 2}\n"
    )
    (tmp_path / "ablation.yaml").write_text("extends: base.yaml\nloss: all\nsources:\n  a: null\n")
    config = load_build_config(tmp_path / "ablation.yaml", [], [])
    assert (config.seed, config.loss, list(config.sources)) == (5, "all", ["b"])


def test_every_manifest_is_read_back(build_two: Builder) -> None:
    built = build_two()
    assert read_manifest(built.directory) == built.manifest
