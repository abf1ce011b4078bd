"""Runs a checkout's own tools, one call a line. Started as `python -I tool_worker.py CHECKOUT`; imports only the standard
library, so that an interpreter with the checkout's packages can run it.

The checkout has `apis/` (modules with subclasses of `apis.api.API`: `input_parameters`, `database_name`, `call`,
`check_api_call_correctness`) and `init_database/` (a JSON file a database). Requests and replies are JSON lines; whatever
the tools print goes to standard error.
"""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any


class Tools:
    """The classes of a checkout by name, and what could not be imported."""

    def __init__(self, checkout: Path) -> None:
        sys.path.insert(0, str(checkout))
        os.chdir(checkout)
        sys.dont_write_bytecode = True
        self.databases = {
            f.stem: f.read_text(encoding="utf-8") for f in sorted((checkout / "init_database").glob("*.json"))
        }
        base = importlib.import_module("apis.api").API
        self.classes: dict[str, Any] = {}
        self.broken: dict[str, str] = {}
        for file in sorted((checkout / "apis").glob("*.py")):
            if file.stem in ("__init__", "api"):
                continue
            try:
                module = importlib.import_module(f"apis.{file.stem}")
            except Exception as e:
                self.broken[file.stem] = f"{type(e).__name__}: {e}"
                continue
            for value in vars(module).values():
                if isinstance(value, type) and issubclass(value, base) and value is not base:
                    self.classes[value.__name__] = value

    def run(self, name: str, arguments: dict[str, str], recorded: Any) -> dict[str, Any]:
        """One call on fresh databases: {"result", "databases", "correct", "error"}."""
        databases = {key: json.loads(text) for key, text in self.databases.items()}
        try:
            tool = self._make(name, databases)
            result = tool.call(**self._typed(name, arguments))
            correct = bool(tool.check_api_call_correctness(result, recorded)) if recorded is not None else None
        except Exception as e:
            return {"error": f"{type(e).__name__}: {e}", "correct": False, "result": None, "databases": databases}
        return {"error": "", "correct": correct, "result": result, "databases": databases}

    def _make(self, name: str, databases: dict[str, Any]) -> Any:
        cls = self.classes[name]
        given = []
        if getattr(cls, "database_name", None) in databases:
            given.append(databases[cls.database_name])
        if name != "CheckToken" and "token" in cls.input_parameters:
            given.append(self._make("CheckToken", databases))
        return cls(*given)

    def _typed(self, name: str, arguments: dict[str, str]) -> dict[str, Any]:
        """Texts as the types that the tool declares, read as the benchmark reads them."""
        declared = self.classes[name].input_parameters
        unknown = [key for key in arguments if key not in declared]
        if unknown:
            raise ValueError(f"unknown parameter {unknown[0]}")
        return {key: typed(value, declared[key]["type"]) for key, value in arguments.items()}


def typed(text: str, kind: str) -> Any:
    if kind == "int" and text.isdigit():
        return int(text)
    if kind == "float" and text.replace(".", "", 1).isdigit():
        return float(text)
    if kind in ("list", "list(str)"):
        return json.loads(text.replace("'", '"'))
    if kind == "bool":
        return text == "True"
    if kind == "str":
        return text
    raise ValueError(f"{text!r} is no {kind}")


def same_effect(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Equal output and exception, and equal databases afterwards."""

    def seen(run: dict[str, Any]) -> tuple[str, ...]:
        result = run["result"] if isinstance(run["result"], dict) else {"output": run["result"]}
        parts = (result.get("output"), result.get("exception"), run["databases"], run["error"])
        return tuple(json.dumps(p, sort_keys=True, default=str) for p in parts)

    return seen(one) == seen(other)


def answer(tools: Tools, request: dict[str, Any]) -> dict[str, Any]:
    name, recorded = request["name"], request["recorded"]
    gold = tools.run(request["gold_name"], request["gold_arguments"], recorded)
    reply = {"gold": gold["correct"] is True, "gold_error": gold["error"], "same": False, "correct": False, "error": ""}
    if name not in tools.classes:
        return reply | {"error": "there is no such tool"}
    run = tools.run(name, request["arguments"], recorded if name == request["gold_name"] else None)
    return reply | {"correct": run["correct"] is True, "same": same_effect(run, gold), "error": run["error"]}


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a tool prints is no reply
    tools = Tools(Path(sys.argv[1]).resolve())
    print(json.dumps({"tools": sorted(tools.classes), "broken": tools.broken}), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(tools, json.loads(line)), default=str), file=replies, flush=True)


if __name__ == "__main__":
    main()
