"""`coalm eval lm`: the harness asks and scores, the figures come out as those of every other benchmark."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coalm_nemo.errors import UserError
from coalm_nemo.evaluation.base import Benchmark, Prompt, Step, Verdict
from coalm_nemo.evaluation.lm.local_tasks import LocalTask, read_tasks, task_config
from coalm_nemo.evaluation.model_source import ModelSource
from coalm_nemo.evaluation.options import EvalOptions
from coalm_nemo.evaluation.runner import Outcome

PUBLIC_TASKS = ("mmlu", "gsm8k", "ifeval", "hellaswag", "arc_challenge")
"""Knowledge, arithmetic in steps, instructions that can be checked, everyday sense, science questions."""
WRITTEN = ("gsm8k", "ifeval")
"""Tasks of the default set that are answered in text; with `chat_template=auto` they go through the chat template."""
SHOWN_CHARS = 4000


def run(options: EvalOptions, source: ModelSource) -> int:
    """Options: tasks=a,b (names of the harness; default the public set, or --data's files), chat_template=auto|yes|no,
    fewshot=N. `--limit` is by task. Raises UserError."""
    from coalm_nemo.evaluation.command import print_scores
    from coalm_nemo.evaluation.scores import make_scores, write_results

    options.only(("tasks", "chat_template", "fewshot"))
    need_harness()
    local = read_tasks(options.data) if options.data else []
    refuse(options, source, local)
    samples, versions = ask(options, source, local)
    outcomes = [outcome for task in samples for outcome in outcomes_of(task, samples[task])]
    benchmark = Benchmark("lm", [], protocol(options, local, versions), headline=headline(outcomes))
    settings = {"limit": options.limit, "dtype": source.dtype, **options.extra}
    about = {"name": source.name, "fingerprint": fingerprint(source)}
    scores = make_scores(benchmark, outcomes, about, settings)
    write_results(options.out, scores, outcomes)
    print_scores(scores, options.out)
    return 0


def need_harness() -> None:
    """Raises UserError with the command that installs it."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as e:
        raise UserError(f"the lm benchmark needs lm-eval ({e}); install it with: pip install 'coalm_nemo[eval]'") from e


def refuse(options: EvalOptions, source: ModelSource, local: Sequence[LocalTask]) -> None:
    """Raises UserError for what cannot be asked."""
    if source.kind == "endpoint":
        raise UserError("the lm benchmark compares likelihoods, which a server does not give; use --model DIR")
    if source.kind == "gold" and (not local or options.text("tasks")):
        raise UserError(
            "--model gold of the lm benchmark needs --data: only local tasks carry their answers in their rows"
        )
    if local and options.text("tasks"):
        raise UserError("give either --data with local tasks or --option tasks=..., not both")
    if options.number("fewshot", 0) != int(options.number("fewshot", 0)) or options.number("fewshot", 0) < 0:
        raise UserError(f"--option fewshot={options.text('fewshot')}: it must be a whole number, 0 or more")
    if options.number("fewshot", 0) and local:
        raise UserError(
            "local tasks have no examples to show; leave --option fewshot away, or write them into the prompts"
        )


def fingerprint(source: ModelSource) -> str:
    from coalm_nemo.evaluation.fingerprint import directory_fingerprint

    return "gold" if source.kind == "gold" else directory_fingerprint(Path(source.model))


def task_groups(options: EvalOptions, local: Sequence[LocalTask]) -> dict[bool, list[Any]]:
    """Whether the chat template is used -> the tasks that are asked so."""
    mode = options.choice("chat_template", ("auto", "yes", "no"))
    configs: list[tuple[Any, bool]]
    if local:
        configs = [(task_config(task, options.out / "tasks"), False) for task in local]
    else:
        names = options.text("tasks").split(",") if options.text("tasks") else list(PUBLIC_TASKS)
        configs = [(name, name in WRITTEN) for name in names]
    groups: dict[bool, list[Any]] = {}
    for config, written in configs:
        groups.setdefault(written if mode == "auto" else mode == "yes", []).append(config)
    return groups


def ask(
    options: EvalOptions, source: ModelSource, local: Sequence[LocalTask]
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """(task -> the harness's samples, task -> its version). Raises UserError where a task cannot be had."""
    if local:
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from coalm_nemo.evaluation.lm.models import gold_model, hf_model

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    model = gold_model() if source.kind == "gold" else hf_model(source)
    manager = TaskManager(include_defaults=not local)
    samples: dict[str, list[dict[str, Any]]] = {}
    versions: dict[str, Any] = {}
    for chat, tasks in task_groups(options, local).items():
        try:
            result = simple_evaluate(
                model=model, tasks=tasks, limit=options.limit, task_manager=manager, apply_chat_template=chat,
                num_fewshot=int(options.number("fewshot", 0)) if options.text("fewshot") else None,
                bootstrap_iters=0, log_samples=True, random_seed=options.seed, numpy_random_seed=options.seed,
                torch_random_seed=options.seed, fewshot_random_seed=options.seed,
            )  # fmt: skip
        except Exception as e:  # the harness passes on whatever a download or a data set raises
            names = ", ".join(t if isinstance(t, str) else t["task"] for t in tasks)
            raise UserError(
                f"the harness could not run {names} ({type(e).__name__}: {_first_line(e)}); public tasks are downloaded, "
                "local ones are given with --data"
            ) from e
        assert result is not None
        samples |= result["samples"]
        versions |= result.get("versions", {})
    return samples, versions


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or ["no message"])[0][:200]


def outcomes_of(task: str, samples: Sequence[Mapping[str, Any]]) -> list[Outcome]:
    """One item a question; where a task has several filters, each is a metric of its own."""
    by_question: dict[Any, list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_question.setdefault(sample["doc_id"], []).append(sample)
    filters = {s["filter"] for s in samples}
    return [_outcome(task, id, group, len(filters) > 1) for id, group in by_question.items()]


def _outcome(task: str, id: Any, group: Sequence[Mapping[str, Any]], several: bool) -> Outcome:
    counts: dict[str, tuple[float, float]] = {}
    for sample in group:
        for metric in sample["metrics"]:
            value = points(sample[metric])
            if value is not None:
                name = f"{metric},{sample['filter']}" if several else metric
                counts |= {f"{over}/{name}": value for over in owners(task)}
    first = group[0]
    prompt = Prompt([{"role": "user", "content": str(first["arguments"][0][0])[-SHOWN_CHARS:]}], str(first["target"]))
    verdict = Verdict(f"{task}/{id}", f"{task}/{id}", counts, first["target"], first["filtered_resps"])
    return Outcome(verdict, [Step(prompt, json.dumps(first["resps"], default=str)[:SHOWN_CHARS])])


def points(value: Any) -> tuple[float, float] | None:
    """(points, out of) of one question's figure: a number, or a list of verdicts (IFEval's instructions)."""
    if isinstance(value, list) and value and all(isinstance(v, bool | int | float) for v in value):
        return float(sum(value)), float(len(value))
    return (float(value), 1.0) if isinstance(value, bool | int | float) else None


def owners(task: str) -> tuple[str, ...]:
    """A subtask of MMLU counts for MMLU too, which is the mean over all its questions."""
    return (task, "mmlu") if task.startswith("mmlu_") else (task,)


def headline(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """MMLU as a whole, not its 57 subjects."""
    names = dict.fromkeys(name for o in outcomes for name in o.verdict.counts)
    return tuple(n for n in names if not n.startswith("mmlu_"))


def protocol(options: EvalOptions, local: Sequence[LocalTask], versions: Mapping[str, Any]) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "scored_by": f"lm-eval {version('lm-eval')}",
        "tasks": {t.name: f"{len(t.rows)} local rows" for t in local} or dict(versions),
        "chat_template": options.choice("chat_template", ("auto", "yes", "no"))
        + (": for gsm8k and ifeval, the others continue plain text" if not options.text("chat_template") else ""),
        "few_shot_examples": options.text("fewshot") or "as each task has it",
        "seed": options.seed,
    }
