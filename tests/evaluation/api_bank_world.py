"""A small API-Bank of our own: a function list, dialogues of levels 1 and 2, Hammer's form, and a checkout with tools."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

SHARED = Path(os.environ.get("COALM_SHARED_DATA") or Path(__file__).parents[3] / "shared/data") / "api-bank"

FUNCTIONS: dict[str, dict[str, str]] = {
    "GetUserToken": {"username": "str", "password": "str"},
    "AddAlarm": {"token": "str", "time": "str", "rings": "int"},
    "Calculator": {"formula": "str"},
    "GetToday": {},
}
ACCOUNTS = {f"user{n}": {"password": f"pw{n}", "token": f"token{n}xyz"} for n in range(20)}

Turn = dict[str, Any]


def write_world(directory: Path, dialogues: int = 40, seed: int = 0) -> Path:
    """all_apis.csv, lv1-lv2-samples/ with both levels, hammer_apibank_l1.json, apis/ and init_database/."""
    directory.mkdir(parents=True, exist_ok=True)
    write_api_list(directory / "all_apis.csv")
    rng = random.Random(seed)
    for level, folder in ((1, "level-1-given-desc"), (2, "level-2-toolsearcher")):
        (directory / "lv1-lv2-samples" / folder).mkdir(parents=True)
        for number in range(dialogues):
            turns = dialogue(rng, level)
            text = "".join(json.dumps(t) + "\n" for t in turns) + ("\n" if number % 3 == 0 else "")
            (directory / "lv1-lv2-samples" / folder / f"d{number:03d}.jsonl").write_text(text)
    write_hammer(directory / "hammer_apibank_l1.json", read_all(directory, 1))
    write_checkout(directory)
    return directory


def read_all(directory: Path, level: int) -> list[list[Turn]]:
    """The dialogues of a level as lists of turns, read without the package."""
    folder = {1: "level-1-given-desc", 2: "level-2-toolsearcher"}[level]
    files = sorted((directory / "lv1-lv2-samples" / folder).glob("*.jsonl"))
    return [[json.loads(line) for line in f.read_text().splitlines() if line.strip()] for f in files]


def times_of(dialogues: list[list[Turn]]) -> list[int]:
    """How often the benchmark counts each call: once, and once more where it follows a call."""
    return [
        1 + (at > 0 and turns[at - 1]["role"] == "API")
        for turns in dialogues for at, turn in enumerate(turns) if turn["role"] == "API"
    ]  # fmt: skip


def write_api_list(path: Path) -> None:
    names = ["id", "类名", "input_parameters", "api_info"]
    with path.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, names)
        writer.writeheader()
        for number, (name, parameters) in enumerate(FUNCTIONS.items()):
            described = {k: {"type": t, "description": f"the {k}"} for k, t in parameters.items()}
            info = f'description = "Does {name}."\ninput_parameters = {described!r}\noutput_parameters = {{"status"}}'
            signature = f"({', '.join(f'{k}: {t}' for k, t in parameters.items())})"
            info = "." if name == "GetToday" else info
            writer.writerow({"id": number, "类名": name, "input_parameters": signature, "api_info": info})


def call(name: str, arguments: dict[str, str], output: Any) -> Turn:
    result = {"api_name": name, "input": arguments, "output": output, "exception": None}
    return {"role": "API", "api_name": name, "param_dict": arguments, "result": result}


def dialogue(rng: random.Random, level: int) -> list[Turn]:
    """One to four calls, some directly after another, each other with a response."""
    user = rng.choice(list(ACCOUNTS))
    turns: list[Turn] = [{"role": "User", "text": f"I am {user}, {rng.random():.6f}. Wake me, please."}]
    if level == 2:
        found = {"name": "AddAlarm", "input_parameters": FUNCTIONS["AddAlarm"]}
        turns.append(call("ToolSearcher", {"keywords": "add alarm"}, found))
    turns.append(
        call(
            "GetUserToken",
            {"username": user, "password": ACCOUNTS[user]["password"]},
            {"token": ACCOUNTS[user]["token"]},
        )
    )
    if rng.random() < 0.6:
        turns.append({"role": "AI", "text": "You are signed in."})
    time = f"2023-04-{rng.randint(10, 28)} 0{rng.randint(5, 9)}:30:00"
    arguments = {"token": ACCOUNTS[user]["token"], "time": time, "rings": str(rng.randint(1, 9))}
    turns += [call("AddAlarm", arguments, "success"), {"role": "AI", "text": f"The alarm is set for {time}."}]
    if rng.random() < 0.4:
        a, b = rng.randint(1, 99), rng.randint(1, 99)
        turns += [{"role": "User", "text": f"And {a} plus {b}?"}, call("Calculator", {"formula": f"{a}+{b}"}, a + b)]
        turns += [{"role": "AI", "text": f"It's {a + b}."}]
    return turns


def write_hammer(path: Path, dialogues: list[list[Turn]]) -> None:
    """One item a question of the benchmark's own count."""
    items = []
    for turns in dialogues:
        for at, turn in enumerate(turns):
            if turn["role"] == "API":
                said = "\n".join(f"{t['role']}: {t.get('text') or t['api_name']}" for t in turns[:at])
                prompt = f"[BEGIN OF QUERY]\n{said}\nGenerate API Request:\n\n[END OF QUERY]\n\n"
                gold = json.dumps([{"name": turn["api_name"], "arguments": turn["param_dict"]}])
                item = {"instruction": prompt, "input": "", "output": f"```\n{gold}\n```"}
                items += [item] * (1 + (at > 0 and turns[at - 1]["role"] == "API"))
    path.write_text(json.dumps(items))


def write_checkout(directory: Path) -> None:
    """`apis/` is tests/evaluation/api_bank_tools: the layout of the benchmark's own tools, with tools of ours."""
    shutil.copytree(Path(__file__).with_name("api_bank_tools"), directory / "apis")
    (directory / "init_database").mkdir()
    (directory / "init_database" / "Account.json").write_text(json.dumps(ACCOUNTS))
    (directory / "init_database" / "Alarm.json").write_text(json.dumps({"1": {"time": "2023-01-01 07:00:00"}}))
