"""BFCL, generated through our runner and judged by the official package.

The package asks, executes and judges in its own process (worker.py); an item here only carries its messages to the model
and the answers back. When the last item is done, the answers are written as the package's result files, scored once more
by its runner as whole files, and the two have to agree.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coalm_nemo.errors import UserError
from coalm_nemo.evaluation.base import Benchmark, Item, Prompt, Verdict
from coalm_nemo.evaluation.bfcl.client import Worker
from coalm_nemo.evaluation.bfcl.environment import default_directory, find_python, prepare
from coalm_nemo.evaluation.bfcl.scores import overall_scores
from coalm_nemo.evaluation.options import EvalOptions

MODEL_DIR = "coalm"
"""The name under which the package sees whatever model it is."""
MAX_NEW_TOKENS = 1024
"""The package leaves a server 4,096; a call is far shorter, and greedy decoding that runs on never ends."""
NOT_RUN = {
    "v3": "exec_*, rest, sql, chatable and multi_turn_composite: the package's V3 release scores none of them",
    "v4": "web_search, memory and format_sensitivity: they need a search key, downloaded embeddings, other prompts; V4's "
    "overall score counts them, so it is not given",
}


def load(options: EvalOptions) -> Benchmark:
    """Options: release=v3|v4, env=DIR, prepare=no|yes, categories=a,b (default all), results=ipython|user,
    max_new_tokens=N. `--limit` is by category. Raises UserError where the package's environment is missing."""
    options.only(("release", "env", "prepare", "categories", "results", "max_new_tokens"))
    release = options.choice("release", ("v3", "v4"))
    directory = Path(options.text("env") or default_directory(release)).expanduser().absolute()
    if options.choice("prepare", ("no", "yes")) == "yes":
        prepare(directory, release)
    python = find_python(directory, release)
    worker = Worker(python, options.out / "bfcl" / "messages.txt")
    run = Run(
        worker,
        options.out / "bfcl",
        release,
        options.choice("results", ("ipython", "user")),
        new_tokens(options),
    )
    about = worker.ask("categories")
    if about["v3"] is not (release == "v3"):
        raise UserError(f"{directory} holds bfcl-eval {about['version']}, whose data is not BFCL {release}'s")
    ids = chosen(about["categories"], options.text("categories"), options.limit)
    run.expected = sum(map(len, ids.values()))
    return Benchmark(
        name=f"bfcl-{release}",
        items=[run.starter(category, id) for category in ids for id in ids[category]],
        protocol={
            "scored_by": f"bfcl-eval {about['version']}, its runner for each category",
            "prompt": "the package's prompt mode: its system prompt with the functions as JSON, its Llama handler",
            "rendered_by": "the checkpoint's own chat template; the package's handler writes the same turns without the "
            "template's dates, and results of calls without JSON's quotes",
            "results_of_calls": run.results,
            "steps_a_turn": "at most 20, by the package, which executes each call",
            "decoding": "as in settings; the published figures used temperature 0.001",
            "max_new_tokens": run.max_new_tokens,
            "items_by_category": {c: len(v) for c, v in ids.items()},
            "items_there_are": {c: len(v) for c, v in about["categories"].items()},
            "not_run": NOT_RUN[release],
            "overall": OVERALL[release],
        },
        corpus_scores=lambda verdicts: overall_scores(verdicts, release),
        headline=HEADLINE[release],
    )


OVERALL = {
    "v3": "mean of non_live, live and multi_turn; non_live: mean of simple (itself the mean of python, java and javascript), "
    "multiple, parallel, parallel_multiple and irrelevance; live: weighted by count; multi_turn: mean of four",
    "v4": "not given: see not_run",
}
HEADLINE = {"v3": ("overall", "non_live", "live", "multi_turn"), "v4": ("non_live", "live", "multi_turn")}


def new_tokens(options: EvalOptions) -> int:
    """Raises UserError where it is no whole number above 0."""
    asked = options.number("max_new_tokens", MAX_NEW_TOKENS)
    if asked < 1 or asked != int(asked):
        raise UserError(
            f"--option max_new_tokens={options.text('max_new_tokens')}: it must be a whole number, 1 or more"
        )
    return int(asked)


def chosen(there: Mapping[str, Sequence[str]], wanted: str, limit: int | None) -> dict[str, Sequence[str]]:
    """Ids by category. Raises UserError for an unknown category."""
    names = wanted.split(",") if wanted else list(there)
    for name in names:
        if name not in there:
            raise UserError(f"--option categories: BFCL has no category {name!r}; it has {', '.join(there)}")
    return {name: there[name][:limit] for name in there if name in names}


@dataclass
class Run:
    """The items of one evaluation, and what came of them."""

    worker: Worker
    directory: Path
    release: str
    results: str
    max_new_tokens: int
    expected: int = 0
    lines: dict[str, dict[str, Any]] = field(default_factory=lambda: defaultdict(dict))
    """category -> id -> line of the result file"""
    right: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    started: int = 0

    def starter(self, category: str, id: str) -> Callable[[], Item]:
        return lambda: self._item(category, id)

    def _item(self, category: str, id: str) -> Item:
        self.started += 1
        key = f"{id}#{self.started}"
        reply = self.worker.ask("start", key=key, id=id, results=self.results)
        while "messages" in reply:
            text = yield Prompt(reply["messages"], reply["gold"], max_new_tokens=self.max_new_tokens)
            reply = self.worker.ask("answer", key=key, text=text)
        return self._done(category, id, reply)

    def _done(self, category: str, id: str, reply: Mapping[str, Any]) -> Verdict:
        verdict, result = reply["verdict"], reply["result"]
        right = bool(verdict["valid"])
        self.lines[category][id] = {"id": id, "result": result}
        self.right[category] += right
        if sum(map(len, self.lines.values())) == self.expected:
            self._finish()
        faults = [] if right else [str(verdict["error_type"]).replace(":", "_") or "wrong"]
        return Verdict(id, id, {category: (float(right), 1.0)}, None, result, faults, {"error": verdict["error"]})

    def _finish(self) -> None:
        """Result files as the package writes them; its scores of them must be the sums of its verdicts."""
        results, scored = self.directory / "result", self.directory / "score"
        for category, lines in self.lines.items():
            write_lines(results / MODEL_DIR / f"BFCL_{self.release}_{category}_result.json", lines.values())
        official = self.worker.ask("score", result_dir=str(results.absolute()), score_dir=str(scored.absolute()))
        for category, lines in self.lines.items():
            accuracy, count = official["scores"][category]
            if round(accuracy * count) != self.right[category] or count != len(lines):
                raise RuntimeError(
                    f"{category}: the package scores {accuracy * count:g} of {count} in {results}, item by item it found "
                    f"{self.right[category]} of {len(lines)}"
                )
        write_lines(scored / "official.json", [official])
        self.worker.close()


def write_lines(path: Path, lines: Any) -> None:
    """JSON lines, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    aside.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n", encoding="utf-8")
    os.replace(aside, path)
