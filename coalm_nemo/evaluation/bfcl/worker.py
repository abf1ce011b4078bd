"""Runs in the environment of `bfcl-eval`, not in ours, and imports nothing of ours: requests and replies as JSON lines.

The package's own handler for Llama models (the one it has registered for CoALM) walks through each item, with its system
prompt, its decoder, its tools and its limit of steps; only where it would ask a server, it hands the messages to whoever
reads our standard output. Each item under way has a thread that waits there for its answer.

Requests: {"op": "categories"}, {"op": "start", "key", "id"}, {"op": "answer", "key", "text"}, {"op": "score", ...}.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import os
import queue
import sys
import tempfile
import threading
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

Reply = dict[str, Any]
MODEL = "coalm"
REGISTERED = "uiuc-convai/CoALM-8B"
VERSION = version("bfcl-eval")
IS_V3 = VERSION.startswith("2025.") and tuple(int(part) for part in VERSION.split(".")[:3]) <= (2025, 7, 17)
PREFIX = "BFCL_v3" if IS_V3 else "BFCL_v4"
LEFT_OUT = ("web_search", "memory", "format_sensitivity")
"""V4 categories that need a search service with a key, or downloaded embeddings, or other prompts."""


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # the package prints as it goes; only replies may reach standard output
    from bfcl_eval.constants.model_config import MODEL_CONFIG_MAPPING

    MODEL_CONFIG_MAPPING[MODEL] = copy.copy(MODEL_CONFIG_MAPPING[REGISTERED])
    desk = Desk()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(desk, "do_" + request.pop("op"))(**request)
        except Exception as e:
            import traceback

            traceback.print_exc()
            reply = {"error": f"{type(e).__name__}: {e}"}
        replies.write(json.dumps(reply, default=str) + "\n")


class Desk:
    """Answers requests, one at a time."""

    def __init__(self) -> None:
        self.sets: dict[Any, Any] = {}
        self.walks: dict[str, Walk] = {}

    def do_categories(self) -> Reply:
        return {
            "version": VERSION,
            "v3": IS_V3,
            "categories": {c: [e["id"] for e in self.entries(c)[0]] for c in categories()},
        }

    def do_start(self, key: str, id: str, results: str) -> Reply:
        entry, _ = self.entry(id)
        self.walks[key] = Walk(entry, gold_answers(*self.entry(id, bare=True)), results)
        return self._reply(key)

    def do_answer(self, key: str, text: str) -> Reply:
        self.walks[key].answers.put(text)
        return self._reply(key)

    def _reply(self, key: str) -> Reply:
        reply = self.walks[key].asks.get()
        if "result" in reply:
            reply["verdict"] = self.judge(self.walks.pop(key).entry["id"], reply["result"])
        return reply

    def judge(self, id: str, result: Any) -> Reply:
        """The package's verdict on one item."""
        with tempfile.TemporaryDirectory() as directory:
            accuracy, faults = self.score(category_of(id), [{"id": id, "result": result}], Path(directory))
        fault = faults[0] if faults else {}
        error = fault.get("error", "")
        details = (
            error if isinstance(error, dict) else {"error_message": error, "error_type": fault.get("error_type", "")}
        )
        return {
            "valid": accuracy == 1,
            "error_type": details.get("error_type", ""),
            "error": details.get("error_message", ""),
        }

    def do_score(self, result_dir: str, score_dir: str) -> Reply:
        """Score result files as the package does, category by category: {category: [accuracy, count]}."""
        scores = {}
        for category in categories():
            for file in sorted(Path(result_dir, MODEL).rglob(f"{PREFIX}_{category}_result.json")):
                results = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
                accuracy, _ = self.score(category, results, Path(score_dir))
                scores[category] = [accuracy, len(results)]
        return {"scores": scores, "table": self.table(scores, score_dir)}

    def table(self, scores: dict[str, Any], score_dir: str) -> Reply:
        """The package's own summary: its name of a column -> value, N/A where a category is missing."""
        import csv

        from bfcl_eval.eval_checker.eval_runner_helper import generate_leaderboard_csv

        board = {MODEL: {c: {"accuracy": a, "total_count": n} for c, (a, n) in scores.items()}}
        generate_leaderboard_csv(board, Path(score_dir))
        with Path(score_dir, "data_overall.csv").open(encoding="utf-8") as file:
            return next(csv.DictReader(file), {})

    def score(self, category: str, results: list[Any], score_dir: Path) -> tuple[float, list[Any]]:
        """(accuracy, entries of the score file that are wrong) by the package's runner for that kind of category."""
        from bfcl_eval.eval_checker import eval_runner

        pairs = [self.entry(r["id"], bare=True) for r in results]
        entries, truths = [p[0] for p in pairs], [p[1] for p in pairs]
        forget_tools([r["id"] for r in results])
        common = {
            "handler": new_handler(), "model_result": results, "prompt": entries, "model_name": MODEL,
            "test_category": category, "score_dir": score_dir,
        }  # fmt: skip
        if "relevance" in category:
            run = eval_runner.relevance_file_runner
        else:
            common["possible_answer"] = truths
            run = eval_runner.multi_turn_runner if "multi_turn" in category else eval_runner.ast_file_runner
        if "language" in inspect.signature(run).parameters:
            common["language"] = {"java": "Java", "javascript": "JavaScript"}.get(category, "Python")
        accuracy, _ = run(**common)
        (file,) = Path(score_dir, MODEL).rglob(f"{PREFIX}_{category}_score.json")
        return accuracy, [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()][1:]

    def entry(self, id: str, bare: bool = False) -> tuple[Any, Any]:
        """(question, ground truth) of an item; `bare` is the question as it is scored, not as it is asked."""
        entries, truths = self.entries(category_of(id))
        at = next(i for i, e in enumerate(entries) if e["id"] == id)
        entry = copy.deepcopy(entries[at])
        if bare and not IS_V3:
            entry = next(copy.deepcopy(e) for e in self.bare(category_of(id)) if e["id"] == id)
        return entry, truths[at]

    def entries(self, category: str) -> Any:
        if category not in self.sets:
            self.sets[category] = load(category)
        return self.sets[category]

    def bare(self, category: str) -> Any:
        if ("bare", category) not in self.sets:
            from bfcl_eval.utils import load_dataset_entry

            self.sets["bare", category] = load_dataset_entry(category, include_language_specific_hint=False)
        return self.sets["bare", category]


class Walk:
    """One item under way: the handler's thread puts what it asks into `asks` and takes its answers from `answers`."""

    def __init__(self, entry: Any, gold: list[str], results: str) -> None:
        self.entry, self.gold, self.results = entry, iter(gold), results
        self.asks: queue.Queue[Reply] = queue.Queue()
        self.answers: queue.Queue[str] = queue.Queue()
        forget_tools([entry["id"]])
        threading.Thread(target=self._walk, daemon=True).start()

    def _walk(self) -> None:
        handler = new_handler(self)
        try:
            if "multi_turn" in self.entry["id"]:
                result, _ = handler.inference_multi_turn_prompting(copy.deepcopy(self.entry), False, True)
            else:
                result, _ = handler.inference_single_turn_prompting(copy.deepcopy(self.entry), False)
        except Exception as e:  # as the package does: the error is the result, and it is wrong
            result = f"Error during inference: {e}"
        self.asks.put({"result": result})

    def ask(self, messages: Any) -> str:
        self.asks.put({"messages": copy.deepcopy(messages), "gold": next(self.gold, "")})
        return self.answers.get()


def new_handler(walk: Walk | None = None) -> Any:
    """The package's Llama handler, which asks `walk` instead of a server."""
    handler = copy.copy(first_handler())
    if walk is not None:  # on the object: its class allows no method that does not say what it overrides
        handler._query_prompting = lambda data: (as_response(walk.ask(data["message"])), 0.0)
        if walk.results == "user":
            handler._add_execution_results_prompting = results_as_user_message
    return handler


@functools.cache
def first_handler() -> Any:
    """Made once: it opens a client for a server, which takes longer than everything else."""
    from bfcl_eval.model_handler.local_inference.llama import LlamaHandler

    if IS_V3:
        return LlamaHandler(MODEL, 0)
    return LlamaHandler(model_name=MODEL, temperature=0, registry_name=MODEL, is_fc_model=False)


def as_response(text: str) -> SimpleNamespace:
    usage = SimpleNamespace(prompt_tokens=0, completion_tokens=0)
    return SimpleNamespace(choices=[SimpleNamespace(text=text)], usage=usage)


def results_as_user_message(data: Any, results: list[str], response: Any) -> Any:
    """As the package does with servers that know no role for results."""
    from bfcl_eval.model_handler.utils import format_execution_results_prompting

    data["message"].append({"role": "user", "content": format_execution_results_prompting(data, results, response)})
    return data


def categories() -> list[str]:
    from bfcl_eval.constants import category_mapping

    names = category_mapping.TEST_FILE_MAPPING if IS_V3 else category_mapping.ALL_SCORING_CATEGORIES
    return [c for c in names if not c.startswith(LEFT_OUT)]


def category_of(id: str) -> str:
    return id.rsplit("_", 1)[0]


def load(category: str) -> tuple[Any, Any]:
    """(questions with their functions, ground truths or None), in the order of ids."""
    if IS_V3:
        from bfcl_eval._llm_response_generation import process_multi_turn_test_case
        from bfcl_eval.constants.category_mapping import TEST_FILE_MAPPING
        from bfcl_eval.constants.eval_config import POSSIBLE_ANSWER_PATH, PROMPT_PATH
        from bfcl_eval.utils import load_file, sort_key

        file = TEST_FILE_MAPPING[category]
        entries = process_multi_turn_test_case(load_file(PROMPT_PATH / file, sort_by_id=True))
        truths = load_file(POSSIBLE_ANSWER_PATH / file, sort_by_id=True) if "relevance" not in category else []
    else:
        from bfcl_eval.utils import load_dataset_entry, load_ground_truth_entry, sort_key

        entries = sorted(load_dataset_entry(category), key=sort_key)
        truths = sorted(load_ground_truth_entry(category), key=sort_key) if "relevance" not in category else []
    truths = truths or [None] * len(entries)
    if len(entries) != len(truths) or any(t and t["id"] != e["id"] for e, t in zip(entries, truths, strict=True)):
        raise ValueError(f"the questions and the ground truths of {category} are not of the same items")
    return entries, truths


def forget_tools(ids: list[str]) -> None:
    """The package keeps each item's tools, with whatever was done to them, for as long as the process lives."""
    from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_utils

    held = vars(multi_turn_utils)
    for name in [n for n in held if n.endswith("_instance") and any(f"_{id}_" in n for id in ids)]:
        del held[name]


def gold_answers(entry: Any, truth: Any) -> list[str]:
    """What a perfect model writes, ask by ask."""
    if truth is None:
        call = "[" + entry["function"][0]["name"] + "()]" if entry["function"] else "[f()]"
        return ["None of the functions fits." if "irrelevance" in entry["id"] else call]
    if "multi_turn" not in entry["id"]:
        return ["[" + ", ".join(gold_call(entry, call) for call in truth["ground_truth"]) + "]"]
    asks = []
    for turn in truth["ground_truth"]:
        asks += ["[" + ", ".join(with_keywords(entry, c) for c in turn) + "]"] if turn else []
        asks.append("Done." if turn else "That cannot be done with what is known and at hand.")
    return asks


def gold_call(entry: Any, call: Any) -> str:
    """{name: {argument: values of which any is right}} -> a call with the first of each, optional ones left out."""
    ((name, arguments),) = call.items()
    function = next((f for f in entry["function"] if f["name"] == name), entry["function"][0])
    name, properties = (
        function["name"],
        function["parameters"]["properties"],
    )  # where they differ, this one is asked for
    language = {"java": java_literal, "javascript": javascript_literal}.get(
        category_of(entry["id"]).removeprefix("simple_"), python_literal
    )
    asked = {k: v for k, v in arguments.items() if k in properties or "" not in v}
    given = {k: first(v) for k, v in asked.items() if first(v) is not None}
    return name + "(" + ", ".join(f"{k}={language(v, properties.get(k, {}))}" for k, v in given.items()) + ")"


def first(values: list[Any]) -> Any:
    """The first that is given; "" stands for an argument that may be left out."""
    return next((choose(v) for v in values if v != ""), None)


def choose(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            k: first(v) if isinstance(v, list) else v
            for k, v in value.items()
            if not isinstance(v, list) or first(v) is not None
        }
    return [choose(v) for v in value] if isinstance(value, list) else value


def python_literal(value: Any, schema: Any) -> str:
    return repr(value)


def java_literal(value: Any, schema: Any) -> str:
    kind = schema["type"]
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{value}" + {"long": "L", "float": "f"}.get(kind, "")
    if isinstance(value, str):
        return f'"{value}"' if '"' not in value else value
    if isinstance(value, list):
        item = schema.get("items", {}).get("type", "Object")
        texts = [java_literal(v, {"type": item}).replace('"', "'" if kind == "ArrayList" else "") for v in value]
        inner = ", ".join(texts)
        # Within a string literal, because the package's Java parser takes expressions apart and loses some of them.
        return (
            f'"new ArrayList<{item}>(Arrays.asList({inner}))"' if kind == "ArrayList" else f'"new {item}[]{{{inner}}}"'
        )
    inner = " ".join(f'put("{k}", {java_literal(v, {"type": "any"})});' for k, v in value.items())
    return "'new HashMap<String, Object>() {{ " + inner + " }}'"


def javascript_literal(value: Any, schema: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"' if '"' not in value else f"'{value}'"
    if isinstance(value, list):
        item = (
            {"type": schema.get("items", {}).get("type", "any")}
            if isinstance(schema.get("items"), dict)
            else {"type": "any"}
        )
        return "[" + ", ".join(javascript_literal(v, item) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"'{k}': {javascript_literal(v, {'type': 'any'})}" for k, v in value.items()) + "}"
    return f"{value}" + ("n" if schema["type"] == "Bigint" else "")


def with_keywords(entry: Any, text: str) -> str:
    """A ground-truth call with every argument named: the package's decoder passes over those without a name."""
    import ast

    call: Any = ast.parse(text, mode="eval").body
    if not call.args:
        return text
    held_back = [f for functions in entry.get("missed_function", {}).values() for f in functions]
    names = next(
        list(f["parameters"]["properties"]) for f in entry["function"] + held_back if f["name"] == call.func.id
    )
    call.keywords = [ast.keyword(n, v) for n, v in zip(names, call.args, strict=False)] + call.keywords
    call.args = []
    return ast.unparse(call)


if __name__ == "__main__":
    main()
