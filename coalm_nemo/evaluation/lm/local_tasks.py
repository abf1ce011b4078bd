"""Tasks from a user's own files, for those without a network: JSON lines -> the harness's task configurations.

    {"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1}    the likeliest continuation is chosen
    {"prompt": "The capital of Norway is", "target": "Oslo"}       the first line that is generated is compared

`answer` is a place in `choices`, counted from 0, or one of them. One file is one task, named after it; all its rows are
of one form.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coalm_nemo.data.rows import parse_line
from coalm_nemo.errors import UserError

MAX_NEW_TOKENS = 64
_WITHOUT_SPACE = {"function": "regex", "regex_pattern": r"^\s*(.*?)\s*$"}


@dataclass(frozen=True)
class LocalTask:
    """One file as it was read."""

    name: str
    generates: bool
    rows: list[dict[str, Any]]
    """{"question", "choices", "gold"} or {"prompt", "target"}."""


def read_tasks(path: Path) -> list[LocalTask]:
    """The tasks of a file, or of a directory's *.jsonl files. Raises UserError naming file and line."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no *.jsonl files")
    return [read_task(file) for file in files]


def read_task(file: Path) -> LocalTask:
    """One file. Raises UserError naming file and line."""
    rows = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{file} cannot be read as UTF-8 text") from e
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows.append(_row(line, f"{file}:{number}"))
    if not rows:
        raise UserError(f"{file} holds no rows")
    generates = "prompt" in rows[0]
    for number, row in enumerate(rows, 1):
        if ("prompt" in row) is not generates:
            raise UserError(f"{file}: row {number} is of another form than the first; one file holds one kind of task")
    return LocalTask(file.stem, generates, rows)


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        raw = parse_line(line)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where} is not valid JSON ({e})") from e
    if not isinstance(raw, dict):
        raise UserError(f"{where}: a row must be a JSON object")
    if isinstance(raw.get("prompt"), str) and isinstance(raw.get("target"), str) and raw["target"].strip():
        return {"prompt": raw["prompt"], "target": raw["target"].strip()}
    question, choices, answer = raw.get("question"), raw.get("choices"), raw.get("answer")
    if not isinstance(question, str) or not isinstance(choices, list) or len(choices) < 2:
        raise UserError(
            f"{where}: a row needs 'question', 'choices' and 'answer', or 'prompt' and 'target'; found {sorted(raw)}"
        )
    if not all(isinstance(c, str) and c for c in choices):
        raise UserError(f"{where}: 'choices' must be texts")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise UserError(f"{where}: 'answer' must be a place in 'choices', counted from 0, or one of them")
    return {"question": question, "choices": choices, "gold": answer}


def task_config(task: LocalTask, directory: Path) -> dict[str, Any]:
    """The harness's configuration of a task, whose rows it finds in a file that this writes into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"{task.name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in task.rows), encoding="utf-8")
    common = {
        "task": task.name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(file.absolute())},
            "cache_dir": str(directory.absolute() / "cache"),
        },
        "test_split": "test",
        "num_fewshot": 0,
    }
    return common | (_generation() if task.generates else _choice())


def _choice() -> dict[str, Any]:
    """`acc_norm` divides a choice's log-likelihood by its length: choices of unequal length are fair then."""
    metrics = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")]
    return {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "target_delimiter": " ",
        "metric_list": metrics,
    }


def _generation() -> dict[str, Any]:
    exact = {
        "metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True,
        "ignore_punctuation": True,
    }  # fmt: skip
    return {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{target}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": MAX_NEW_TOKENS},
        "filter_list": [
            {"name": "first-line", "filter": [_WITHOUT_SPACE, {"function": "take_first"}]},
        ],
        "metric_list": [exact],
    }
