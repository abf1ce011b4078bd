"""Blocks of records: nothing lost, nothing held, whatever the size of a block."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coalm_nemo.data.sources import readers
from coalm_nemo.data.sources.readers import data_files, iter_blocks, nested_json, records
from coalm_nemo.errors import UserError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
RECORDS = st.lists(st.dictionaries(TEXT, JSON, max_size=4), max_size=12)
SAME_DIRECTORY = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(file: Path, block_bytes: int = readers.BLOCK_BYTES) -> list[tuple[int, dict[str, Any]]]:
    """All records, through pickled blocks as worker processes get them."""
    blocks = [pickle.loads(pickle.dumps(block)) for block in iter_blocks(file, block_bytes)]
    return [record for block in blocks for record in records(block)]


@SAME_DIRECTORY
@given(rows=RECORDS, indent=st.sampled_from([None, 0, 3]), ascii_only=st.booleans(), size=st.integers(1, 200))
def test_an_array_is_read_as_json_reads_it(
    tmp_path: Path, rows: list[dict[str, Any]], indent: int | None, ascii_only: bool, size: int
) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "READ_CHARS", size)
        assert read(file, size) == list(enumerate(json.loads(file.read_text(encoding="utf-8")), 1))


@SAME_DIRECTORY
@given(rows=RECORDS.filter(bool), name=st.sampled_from(["rows.json", "rows.jsonl"]), size=st.integers(1, 200))
def test_lines_are_read_as_json_reads_them(tmp_path: Path, rows: list[dict[str, Any]], name: str, size: int) -> None:
    file = tmp_path / name
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert read(file, size) == list(enumerate(rows, 1))


def test_a_line_has_its_number_whatever_is_blank(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf\n{"a": 1}\r\n\r\n  \n{"a": "\xe2\x80\xa8"}\n')
    assert read(file) == read(file, 1) == [(2, {"a": 1}), (5, {"a": "\u2028"})]


def test_blocks_are_cut_by_the_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = tmp_path / "rows.json"
    array.write_text(json.dumps([{"text": "x" * (n % 50)} for n in range(300)]))
    cuts = []
    for size in (7, 4096):
        monkeypatch.setattr(readers, "READ_CHARS", size)
        cuts.append([(block.first, len(block.payload)) for block in iter_blocks(array, 500)])
    assert cuts[0] == cuts[1]
    assert len(cuts[0]) > 10


def test_parquet(tmp_path: Path) -> None:
    rows = [{"id": n, "turns": [{"from": "user", "value": "é" * n}], "more": None if n % 2 else "x"} for n in range(50)]
    file = write_parquet(tmp_path / "rows.parquet", rows)
    assert read(file) == read(file, 100) == list(enumerate(rows, 1))
    assert len(list(iter_blocks(file, 100))) > 3


def write_parquet(file: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


BROKEN = {
    "broken line": (b'{"a": 1}\n{"a": \n', "record 2 is not valid JSON"),
    "a line that is no object": (b'{"a": 1}\n3\n', "record 2 must be a JSON object, not int"),
    "a line in latin-1": (b'{"a": 1}\n{"a": "\xe9"}\n', "record 2 is not UTF-8"),
    "a line with half a surrogate pair": (b'{"a": "\\ud83d"}\n', "record 1 is not valid JSON"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "record 1 is not UTF-8"),
    "nesting without end": (b'{"a":' * 200_000, "record 1 is not valid JSON"),
    "an empty file": (b" \n", "is empty"),
    "an element that is no object": (b'[{"a": 1}, 3]', "record 2 must be a JSON object"),
    "a broken element": (b'[{"a": 1}, {"a" 3}]', "record 2 is not valid JSON"),
    "an element in latin-1": (b'[{"a": 1}, {"a": "\xe9"}]', "record 2 is not UTF-8"),
    "an element with half a surrogate pair": (b'[{"a": "\\uD83D"}]', "record 1 is not valid JSON"),
    "an array without end": (b'[{"a": 1}', "record 1 is followed by neither"),
    "an array that is cut off": (b'[{"a": 1}, {"a": [1', "record 2 is not valid JSON"),
    "an array without a comma": (b'[{"a": 1} {"a": 2}]', "record 1 is followed by neither"),
    "an array with a comma too many": (b'[{"a": 1}, ]', "record 2 must be a JSON object"),
    "an array and more": (b'[{"a": 1}] [', "more text after"),
    "an array of arrays without end": (b'[{"a":' + b"[" * 200_000, "record 1 is not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_named(tmp_path: Path, case: str) -> None:
    content, sentence = BROKEN[case]
    file = tmp_path / "rows.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"^{file}.*{sentence}"):
        read(file)


@pytest.mark.parametrize("content", [b'[{"a": 1}, {"b": "', b'{"a": 1}\n{"b": "'])
def test_a_record_without_end_is_not_read_to_the_end(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "MAX_RECORD_BYTES", 1 << 20)
    file = tmp_path / "rows.json"
    file.write_bytes(content + b"x" * (8 << 20))
    with pytest.raises(UserError, match="record 2 is not complete after 1 MB"):
        read(file, 4)


def test_a_parquet_file_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    file.write_bytes(b"PAR1 but nothing else")
    with pytest.raises(UserError, match=r"rows\.parquet"):
        read(file)


def test_data_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        data_files(tmp_path / "absent")
    with pytest.raises(UserError, match="holds no file"):
        data_files(tmp_path)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "deep").mkdir()
    for name in ("README.md", "dataset_infos.json", ".cache/x.json", "deep/b.json", "c.jsonl"):
        (tmp_path / name).write_text("{}")
    assert data_files(tmp_path) == [tmp_path / "c.jsonl", tmp_path / "deep/b.json"]
    with pytest.raises(UserError, match="must end in"):
        data_files(tmp_path / "README.md")
    (tmp_path / "a.parquet").write_text("")
    with pytest.raises(UserError, match="both parquet and JSON"):
        data_files(tmp_path)


def test_nested_json_is_strict() -> None:
    assert nested_json('{"NaN": "Infinity"}') == {"NaN": "Infinity"}
    for text in ('{"a": NaN}', "[-Infinity]", '["\\ud83d"]', "{"):
        with pytest.raises(ValueError):
            nested_json(text)


MEASURE = r"""
import re, sys
from pathlib import Path
import pyarrow.parquet
from coalm_nemo.data.sources.readers import iter_blocks, records
peak = lambda: int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) >> 10
before = peak()
count = sum(1 for block in iter_blocks(Path(sys.argv[1])) for _ in records(block))
print(count, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak is read from /proc")
@pytest.mark.parametrize("kind", ["array.json", "lines.jsonl", "table.parquet"])
def test_a_file_is_never_held(tmp_path: Path, kind: str) -> None:
    """60 MB in one array, and in one row group, cost a few blocks. Each is measured in a process of its own.

    By VmHWM: getrusage's ru_maxrss starts at what the parent held when it forked, which hides any growth. And with
    malloc for Arrow: its own pool keeps some 60 MB for reuse, whether the file has 60 MB or 240.
    """
    file = tmp_path / kind
    rows = ({"instruction": f"{n} " + "word " * 500, "output": f"answer {n}"} for n in range(24_000))
    if file.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(list(rows)), file, compression="none", use_dictionary=False)
    else:
        opening, between, closing = ("[", ",", "]") if file.suffix == ".json" else ("", "\n", "")
        with file.open("w") as out:
            out.write(opening + json.dumps(next(rows)))
            out.writelines(between + json.dumps(row) for row in rows)
            out.write(closing)
    assert file.stat().st_size > 58e6
    command = [sys.executable, "-c", MEASURE, str(file)]
    root = str(Path(__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": root, "ARROW_DEFAULT_MEMORY_POOL": "system"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    count, growth_mb = map(int, done.stdout.split())
    assert count == 24_000
    assert growth_mb < 40
