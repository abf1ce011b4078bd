"""`coalm report`: reads directories, writes one page."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coalm_nemo.errors import UserError
from coalm_nemo.report.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH
from coalm_nemo.report.html import esc, moment
from coalm_nemo.report.read_run import Run, is_run, read_run
from coalm_nemo.report.read_scores import Evaluated, find_scores, read_scores

PAGE = "report.html"
HERE = Path(__file__).parent


def report_command(directories: Sequence[Path], out: Path | None, as_json: bool) -> None:
    """Write the page, or print its figures. Raises UserError where a directory holds neither a run nor scores."""
    runs, scores = read_all(directories)
    if as_json:
        print(json.dumps(as_dict(runs, scores), indent=2))
        return
    target = Path(out) if out else Path(directories[0]) / PAGE
    write_page(target, page(runs, scores))
    print(f"{target}: {_counted(runs, 'run')}, {_counted(scores, 'evaluation')}, {target.stat().st_size / 1e6:.2f} MB")


def _counted(found: Sequence[object], what: str) -> str:
    return f"{len(found)} {what}{'' if len(found) == 1 else 's'}"


def read_all(directories: Sequence[Path]) -> tuple[list[Run], list[Evaluated]]:
    """Runs and evaluations in the order given; a run's own evaluations are those below it."""
    runs: list[Run] = []
    scores: dict[Path, Evaluated] = {}
    for directory in directories:
        if not Path(directory).is_dir():
            raise UserError(f"{directory} is no directory")
        run_dirs = [d for d in (Path(directory), Path(directory) / "run") if is_run(d)][
            :1
        ]  # `coalm demo` has run/ inside
        files = find_scores(Path(directory))
        if not run_dirs and not files:
            raise UserError(f"{directory} holds neither a run (metrics.jsonl) nor an evaluation (scores.json)")
        runs += [read_run(d, _free_name(d, runs)) for d in run_dirs]
        scores |= {f.resolve(): read_scores(f, Path(directory)) for f in files}
    return runs, list(scores.values())


def _free_name(directory: Path, runs: Sequence[Run]) -> str:
    """The shortest tail of the path that no other run has."""
    parts = [p for p in directory.resolve().parts if p != "run"] or ["run"]
    taken = {run.name for run in runs}
    for count in range(1, len(parts) + 1):
        if (name := "/".join(parts[-count:])) not in taken:
            return name
    return f"{parts[-1]} ({len(runs) + 1})"


def page(runs: Sequence[Run], scores: Sequence[Evaluated]) -> str:
    """The whole page."""
    from coalm_nemo.report import run_sections as parts
    from coalm_nemo.report.score_section import scores_section

    names = [run.name for run in runs] or list(dict.fromkeys(e.label for e in scores))
    title = " · ".join(names)
    sections = [
        part(runs)
        for part in (parts.run_cards, parts.curves, parts.speed, parts.time_line, parts.data_shares, parts.samples)
    ]
    sections += [scores_section(scores), parts.warnings(runs), parts.what_was_run(runs) if runs else ""]
    style = (HERE / "page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'\">"
        f"<title>{esc(title)}</title><style>{style}</style></head><body><main><h1>{esc(title)}</h1>"
        f'<p class="sub head">written {esc(moment(time.time()))}</p>{"".join(sections)}</main>'
        f"<script>{_script()}</script></body></html>\n"
    )


def _script() -> str:
    sizes = {"LEFT": LEFT, "RIGHT": RIGHT, "TOP": TOP, "BOTTOM": BOTTOM, "WIDTH": WIDTH, "HEIGHT": HEIGHT}
    numbers = "".join(f"const {name} = {value};" for name, value in sizes.items())
    return numbers + (HERE / "page.js").read_text(encoding="utf-8")


def write_page(target: Path, text: str) -> None:
    """Under another name, then renamed: who looks at it while it is made again sees the old one. Raises UserError."""
    aside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, target)
    except OSError as e:
        raise UserError(f"{target} cannot be written: {e.strerror}") from e
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def as_dict(runs: Sequence[Run], scores: Sequence[Evaluated]) -> dict[str, Any]:
    """The page's figures for a program."""
    from coalm_nemo.report.run_sections import differences
    from coalm_nemo.report.timeline import repeated_steps

    return {
        "runs": [
            {
                "name": run.name,
                "dir": str(run.path),
                "status": run.status,
                "step": run.step,
                "total_steps": run.total_steps,
                "last": {key: series.last for key, series in run.series.items()},
                "starts": [
                    {k: v for k, v in asdict(s).items() if k != "facts"} | {"repeated_steps": again}
                    for s, again in zip(run.starts, repeated_steps(run.starts), strict=False)
                ],
                **{k: run.facts.get(k) for k in ("code", "layout", "data")},
            }
            for run in runs
        ],
        "differences": dict(differences(runs)) if len(runs) > 1 else {},
        "evaluations": [
            {
                "dir": str(e.path),
                "benchmark": e.benchmark,
                "model": e.model,
                "scores": {k: asdict(v) for k, v in e.scores.items()},
            }
            for e in scores
        ],
    }
