"""API-Bank's questions, from its own sample folders and from Hammer's prompt-form JSON.

Both count a call twice where it follows another call directly: the benchmark's reader takes each call, and the turn after
each call, as a question. `Question.times` keeps that count; every question is asked once.
"""

from __future__ import annotations

import ast
import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coalm_nemo.errors import UserError
from coalm_nemo.evaluation.calls import Call, parse_calls

LEVEL_FOLDERS = {1: "level-1-given-desc", 2: "level-2-toolsearcher"}
SAMPLES_FOLDER = "lv1-lv2-samples"
API_LIST = "all_apis.csv"
TOOL_SEARCHER: dict[str, Any] = {
    "name": "ToolSearcher",
    "description": "Finds the function that fits a few keywords, and describes it.",
    "parameters": {"keywords": {"type": "str", "description": "What to look for."}},
    "returns": {"best_matchs": {"type": "Union[List[dict], dict]", "description": "The function or functions found."}},
}
"""Level 2 gives this function alone; all_apis.csv does not list it."""
_LEVEL_IN_NAME = re.compile(r"(?:l|lv|level)[-_]?([12])(?!\d)", re.IGNORECASE)

Turn = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """What a model is to write next in a dialogue: a call, or (in the sample folders) the response after one."""

    id: str
    group: str
    """The dialogue."""
    level: int
    form: str
    """samples or hammer."""
    gold: str
    """The text that a perfect model writes."""
    call: Call | None
    """The gold call; None where a response is due."""
    prompt: str = ""
    """The whole prompt, in Hammer's form."""
    history: Sequence[Turn] = ()
    """The turns before, in the samples' form."""
    tools: Sequence[Mapping[str, Any]] = ()
    recorded: Mapping[str, Any] | None = None
    """What the benchmark's own tools gave for the gold call."""
    times: int = 1
    """How often the benchmark's own count has it."""


def sample_folder(data: Path, level: int) -> Path | None:
    """The folder of one level below a checkout, `lv1-lv2-samples`, or `data` itself; None where it is not there."""
    name = LEVEL_FOLDERS[level]
    places = [data / SAMPLES_FOLDER / name, data / name] + ([data] if data.name == name else [])
    return next((p for p in places if p.is_dir()), None)


def find_api_list(data: Path) -> Path:
    """all_apis.csv in `data` or up to two directories above. Raises UserError."""
    for place in (data, *data.absolute().parents[:2]):
        if (place / API_LIST).is_file():
            return place / API_LIST
    raise UserError(f"{API_LIST} is neither in {data} nor above it; it comes with API-Bank and describes its functions")


def read_api_list(path: Path) -> dict[str, dict[str, Any]]:
    """Function -> {"name", "description", "parameters", "returns"}. Raises UserError."""
    apis: dict[str, dict[str, Any]] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as rows:
            for number, row in enumerate(csv.DictReader(rows), 2):
                try:
                    if row["类名"]:  # the class; the file's headers are Chinese
                        apis[row["类名"]] = _describe(row["类名"], row["api_info"], row["input_parameters"])
                except (KeyError, ValueError, SyntaxError, TypeError, AttributeError) as e:
                    raise UserError(
                        f"{path}:{number} does not describe a function as API-Bank's list does ({e})"
                    ) from e
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{path} cannot be read ({e})") from e
    if not apis:
        raise UserError(f"{path} describes no functions")
    return apis


def _describe(name: str, info: str, signature: str) -> dict[str, Any]:
    """The three assignments of literals that the list has for each class; read, not run.

    One class (ImageCaption) has a full stop instead: its parameters are those of the signature.
    """
    if not info.strip(" ."):
        named = re.findall(r"(\w+)\s*:\s*(\w+)", signature)
        parameters = {key: {"type": kind, "description": ""} for key, kind in named}
        return {"name": name, "description": "", "parameters": parameters, "returns": {}}
    values = {
        target.id: ast.literal_eval(node.value)
        for node in ast.parse(info).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    described = {
        "name": name,
        "description": values["description"],
        "parameters": values["input_parameters"],
        "returns": values["output_parameters"],
    }
    # Some returns are spelt as sets, which have no order and no JSON.
    return dict(json.loads(json.dumps(described, default=lambda many: sorted(map(str, many)))))


def read_samples(folder: Path, level: int, apis: Mapping[str, Mapping[str, Any]]) -> Iterator[Question]:
    """Every call and every response of a folder, dialogue by dialogue. Raises UserError."""
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise UserError(f"{folder} holds no .jsonl files; it must be API-Bank's own sample folder")
    for file in files:
        turns = read_turns(file)
        names = sorted({t["api_name"] for t in turns if t["role"] == "API"})
        missing = [n for n in names if n not in apis and n != TOOL_SEARCHER["name"]]
        if level == 1 and missing:
            raise UserError(f"{file} calls {missing[0]}, which {API_LIST} does not describe")
        tools = [TOOL_SEARCHER] if level == 2 else [apis.get(n, TOOL_SEARCHER) for n in names]
        yield from _dialogue_questions(file.stem, turns, level, tools)


def _dialogue_questions(
    name: str, turns: Sequence[Turn], level: int, tools: Sequence[Mapping[str, Any]]
) -> Iterator[Question]:
    for at, turn in enumerate(turns):
        after_call = at > 0 and turns[at - 1]["role"] == "API"
        given: dict[str, Any] = {"history": turns[:at], "tools": tools}
        place = (f"l{level}/{name}/{at}", f"l{level}/{name}", level, "samples")
        if turn["role"] == "API":
            call = Call(turn["api_name"], turn["param_dict"])
            given |= {"recorded": turn.get("result"), "times": 2 if after_call else 1}
            yield Question(*place, gold=render_sample_call(call), call=call, **given)
        elif turn["role"] == "AI" and after_call:
            yield Question(*place, gold=turn["text"], call=None, **given)


def render_sample_call(call: Call) -> str:
    """`[Name(key='value', ...)]`, as the benchmark asks for it."""
    return f"[{call.name}({', '.join(f'{k}={v!r}' for k, v in call.arguments.items())})]"


def read_turns(file: Path) -> list[Turn]:
    """One dialogue. Raises UserError naming file and line."""
    turns: list[Turn] = []
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            turn = json.loads(line)
            role = turn["role"]
            sound = role in ("User", "AI") and isinstance(turn["text"], str)
            sound = (
                sound or role == "API" and isinstance(turn["api_name"], str) and isinstance(turn["param_dict"], dict)
            )
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise UserError(f"{file}:{number} is not a turn of API-Bank ({e})") from e
        if not sound:
            raise UserError(f"{file}:{number} is not a turn of API-Bank (role {role!r})")
        turns.append(turn)
    return turns


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{file} cannot be read ({e})") from e


def level_of_name(file: Path) -> int | None:
    """1 or 2 where the file's name says so (..._l1.json, level-2-...)."""
    found = _LEVEL_IN_NAME.search(file.stem)
    return int(found.group(1)) if found else None


def read_hammer(file: Path, level: int) -> list[Question]:
    """The items of a JSON list of {"instruction", "input", "output"}; equal ones once, with their count."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        items = [("\n\n".join(t for t in (r["instruction"], r["input"]) if t), r["output"]) for r in rows]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(
            f"{file} is not API-Bank in Hammer's form, a JSON list of instruction, input, output ({e})"
        ) from e
    questions: dict[tuple[str, str], Question] = {}
    for number, (prompt, output) in enumerate(items):
        known = questions.get((prompt, output))
        if known is not None:
            questions[prompt, output] = replace(known, times=known.times + 1)
            continue
        calls = parse_calls(output).calls
        if len(calls) != 1:
            raise UserError(f"{file}: item {number} has {len(calls)} gold calls instead of one")
        group = f"l{level}/hammer/{_first_words(prompt)}"
        place = (f"l{level}/hammer/{number}", group, level, "hammer")
        questions[prompt, output] = Question(*place, gold=output, call=calls[0], prompt=prompt)
    return list(questions.values())


def _first_words(prompt: str) -> str:
    """What the user says first: the form does not say which items are of one dialogue, but these words tell."""
    query = prompt.rpartition("[BEGIN OF QUERY]")[2].strip()
    return query.split("\n", 1)[0]
