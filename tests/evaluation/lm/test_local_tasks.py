"""A user's own tasks: what is read, and what is refused with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coalm_nemo.errors import UserError
from coalm_nemo.evaluation.lm.local_tasks import read_tasks, task_config


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_both_forms_are_read_from_a_directory(tmp_path: Path) -> None:
    question = {"question": "q", "choices": ["x", "y"]}
    write(tmp_path / "b.jsonl", {**question, "answer": "y"}, "", {**question, "answer": 0})
    write(tmp_path / "a.jsonl", {"prompt": "p", "target": " t "})
    first, second = read_tasks(tmp_path)
    assert (first.name, first.generates, first.rows) == ("a", True, [{"prompt": "p", "target": "t"}])
    assert (second.name, second.generates) == ("b", False) and [r["gold"] for r in second.rows] == [1, 0]
    config = task_config(second, tmp_path / "out")
    written = [json.loads(x) for x in Path(config["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()]
    assert written == second.rows and config["output_type"] == "multiple_choice"


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("{", "t.jsonl:2 is not valid JSON"),
        ([1], "t.jsonl:2: a row must be a JSON object"),
        ({"question": "q"}, "t.jsonl:2: a row needs 'question', 'choices' and 'answer', or"),
        ({"question": "q", "choices": ["x"], "answer": 0}, "t.jsonl:2: a row needs"),
        ({"question": "q", "choices": ["x", 1], "answer": 0}, "t.jsonl:2: 'choices' must be texts"),
        ({"question": "q", "choices": ["x", "y"], "answer": 2}, "t.jsonl:2: 'answer' must be a place"),
        ({"question": "q", "choices": ["x", "y"], "answer": True}, "t.jsonl:2: 'answer' must be a place"),
        ({"question": "q", "choices": ["x", "y"], "answer": "z"}, "t.jsonl:2: 'answer' must be a place"),
        ({"prompt": "p", "target": " "}, "t.jsonl:2: a row needs"),
        ({"prompt": "p", "target": "t"}, "row 2 is of another form than the first"),
    ],
)
def test_a_bad_row_is_named(row: object, sentence: str, tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", {"question": "q", "choices": ["x", "y"], "answer": 0}, row)
    with pytest.raises(UserError) as error:
        read_tasks(file)
    assert sentence in str(error.value)


def test_nothing_to_ask_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no \\*.jsonl files"):
        read_tasks(tmp_path)
    with pytest.raises(UserError, match="holds no rows"):
        read_tasks(write(tmp_path / "t.jsonl"))
