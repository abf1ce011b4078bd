"""`coalm eval BENCHMARK`: every benchmark is asked the same way."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from coalm_nemo.errors import UserError
from coalm_nemo.evaluation.model_source import ModelSource
from coalm_nemo.evaluation.options import EvalOptions, parse_extra
from coalm_nemo.evaluation.registry import BENCHMARKS, find_benchmark

RUN_FILE = "run.json"

HELP = {
    "multiwoz": "MultiWOZ 2.1 to 2.4 (data.json) or 2.2: joint goal accuracy, Inform, Success, BLEU.",
    "sgd": "Schema-Guided Dialogue: the metrics of multiwoz on SGD files.",
    "api-bank": "API-Bank levels 1 and 2: call accuracy, execution, ROUGE and BLEU-4 of the text.",
    "bfcl": "BFCL V3, scored by the official package.",
    "lm": "What was forgotten: lm-evaluation-harness tasks.",
    "demo": "The demo world's held-out dialogues; needs no files.",
}

eval_app = typer.Typer(help="Score a checkpoint or an endpoint on a benchmark.", no_args_is_help=True)


def evaluate(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(help="Directory for scores.json, items.jsonl and the kept answers.")],
    model: Annotated[str, typer.Option(help="Hugging Face directory, or gold: the gold answers replayed.")] = "",
    endpoint: Annotated[str, typer.Option(help="OpenAI-compatible base URL; key in OPENAI_API_KEY.")] = "",
    model_name: Annotated[str, typer.Option(help="The model's name at the endpoint.")] = "",
    data: Annotated[Path | None, typer.Option(help="The benchmark's files.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many dialogues or questions.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="KEY=VALUE of the benchmark; may be given again.")] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts at once on this machine.")] = 16,
    dtype: Annotated[str, typer.Option(help="bf16 | fp32; auto: bf16 on a GPU.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu | cuda | cuda:N; auto: a GPU if there is one.")] = "auto",
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling, and of whatever a benchmark draws.")] = 0,
    concurrency: Annotated[int, typer.Option(help="Requests at once to the endpoint.")] = 16,
    requests_per_minute: Annotated[float, typer.Option(help="Of the endpoint; 0: no limit.")] = 0.0,
    retries: Annotated[int, typer.Option(help="Of a request that failed.")] = 5,
    timeout_s: Annotated[float, typer.Option(help="Of one request.")] = 120.0,
    cache: Annotated[Path | None, typer.Option(help="Directory of kept answers, for several --out.")] = None,
    rescore: Annotated[bool, typer.Option("--rescore", help="Score kept answers again, without the model.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print scores.json.")] = False,
) -> None:
    """Run one benchmark; the command's own name says which."""
    options = EvalOptions(out, data, limit, seed, parse_extra(option or []))
    if rescore:
        refuse_model_with_rescore(model, endpoint, model_name)
        source = None
    else:
        source = ModelSource(
            model, endpoint, model_name, batch_size, cast(Any, dtype), device, temperature, seed, concurrency,
            requests_per_minute, retries, timeout_s,
        )  # fmt: skip
    sys.exit(run_command(str(ctx.info_name), options, source, cache, as_json))


for _name in BENCHMARKS:
    _example = f"\n\nExample: coalm eval {_name} --model coalm-8b --data DIR --out scores/{_name}"
    eval_app.command(_name, help=HELP[_name] + _example)(evaluate)


@eval_app.command("compare")
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="A [B]", help="Directories of evaluations.")],
    published: Annotated[str, typer.Option(help="Instead of B: a model of the published table.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the differences as JSON.")] = False,
) -> None:
    """What B changes against A, metric by metric, with 95 % intervals; or A against a published row.

    Items are paired by id, so that what makes both evaluations hard cancels out.

    Example: coalm eval compare scores/base scores/tuned
    """
    from coalm_nemo.evaluation.compare import compare_command

    compare_command(runs, published, as_json)


def run_command(name: str, options: EvalOptions, source: ModelSource | None, cache: Path | None, as_json: bool) -> int:
    """Load, ask, score, write, print; `source` None: kept answers only. Raises UserError."""
    load, run = find_benchmark(name)
    make_out(options.out)
    if load is None:
        if run is None or source is None or cache is not None:
            raise UserError(f"{name} is scored by another program: --rescore and --cache do not apply")
        return run(options, source)

    from coalm_nemo.evaluation.runner import run_benchmark
    from coalm_nemo.evaluation.scores import make_scores, write_results

    benchmark = load(options)
    if not benchmark.items:
        raise UserError(f"{name} has no items in {options.data}; check --data and its options")
    model, about, settings = open_model(name, options.out, source, cache)
    outcomes = run_benchmark(benchmark, model, quiet=as_json)
    asked = {"limit": options.limit, "seed": options.seed, **options.extra}
    scores = make_scores(benchmark, outcomes, about, settings | asked)
    write_results(options.out, scores, outcomes)
    print(json.dumps(scores, ensure_ascii=False)) if as_json else print_scores(scores, options.out)
    return 0


def open_model(
    name: str, out: Path, source: ModelSource | None, cache: Path | None
) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """(model behind its kept answers, {"name", "fingerprint"}, settings). Raises UserError."""
    from coalm_nemo.evaluation.cache import FILE_NAME, CachedModel, GenerationCache, KeptAnswersOnly
    from coalm_nemo.evaluation.gold_model import GoldModel
    from coalm_nemo.evaluation.scores import write_whole

    before = read_run(out)
    if source is None:
        if not before:
            raise UserError(f"{out} holds no evaluation to score again; run it first, without --rescore")
        about, settings = before["model"], before["settings"]
        inner: Any = KeptAnswersOnly(about["name"], about["fingerprint"])
    else:
        inner = source.open()
        settings = source.settings(inner)
        about = {"name": source.name, "fingerprint": inner.fingerprint}
    run = {"benchmark": name, "model": about, "settings": settings}
    if before and before != run:
        raise UserError(f"{out} holds {described(before)}, and this is {described(run)}; choose another --out")
    write_whole(out / RUN_FILE, json.dumps(run, indent=1) + "\n")
    if about["fingerprint"] == GoldModel.fingerprint:  # never kept: the answers are in the prompts
        return GoldModel(), about, settings
    file = (cache / f"{about['fingerprint']}.jsonl") if cache else out / FILE_NAME
    return CachedModel(inner, GenerationCache(file), settings), about, settings


def described(run: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{k} {v}" for k, v in run["settings"].items())
    about = run["model"]
    return f"{run['benchmark']} of {about['name']} ({about['fingerprint'][:8]}{', ' if settings else ''}{settings})"


def read_run(out: Path) -> dict[str, Any]:
    """What the directory's evaluation is of; {} where there is none. Raises UserError where that cannot be read."""
    file = out / RUN_FILE
    if not file.exists():
        return {}
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
        described(run)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{file} is damaged; remove it, or choose another --out") from e
    return cast(dict[str, Any], run)


def make_out(out: Path) -> None:
    """Raises UserError where nothing could be written there: said before the model works for hours."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.write_text("", encoding="utf-8")
        probe.unlink()
    except OSError as e:
        raise UserError(f"--out {out} cannot be written ({e.strerror})") from e


def refuse_model_with_rescore(model: str, endpoint: str, model_name: str) -> None:
    if model or endpoint or model_name:
        raise UserError("--rescore takes the model from --out; leave --model, --endpoint and --model-name away")


def print_scores(scores: Mapping[str, Any], out: Path) -> None:
    """The table a person reads; the headline's metrics first."""
    from rich.console import Console
    from rich.table import Table

    counts = scores["counts"]
    table = Table(title=f"{scores['benchmark']}: {scores['model']['name']}", caption=scores["interval"])
    for column in ("metric", "score", "95 %", "points", "of"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    names = [*scores["headline"], *(n for n in scores["scores"] if n not in scores["headline"])]
    for name in names:
        row = scores["scores"][name]
        table.add_row(name, _figure(row["value"]), _range(row), _count(row["points"]), _count(row["of"]))
    console = Console(highlight=False)
    console.print(table)
    faults = ", ".join(f"{reason} {n}" for reason, n in scores["faults"].items()) or "none"
    console.print(
        f"{counts['items']} items in {counts['groups']} groups, {counts['answers']} answers; faults: {faults}"
    )
    console.print(f"{out}: scores.json, items.jsonl")


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _range(row: Mapping[str, float | None]) -> str:
    return "-" if row["low"] is None else f"{row['low']:.2f} to {row['high']:.2f}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"
