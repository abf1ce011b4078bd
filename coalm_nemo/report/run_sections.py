"""The parts of the page that are about runs. Each gives HTML, or "" where its runs have nothing to show."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

from coalm_nemo.report.chart import Line, chart
from coalm_nemo.report.html import details, duration, esc, moment, number, section, size, swatch, table
from coalm_nemo.report.read_run import Run, number_or_none
from coalm_nemo.report.series import Series
from coalm_nemo.report.timeline import GOOD, cause_words, repeated_steps, timeline

CURVES = (
    ("lm_loss", "Loss", ""), ("validation_loss", "Validation loss", ""), ("learning_rate", "Learning rate", ""),
    ("grad_norm", "Gradient norm", ""),
)  # fmt: skip
LOGARITHMIC = ("lm_loss", "validation_loss", "grad_norm")
SPEED = (
    ("tokens_per_s", "Tokens per second", "all devices", "predicted_tokens_per_s"),
    ("supervised_tokens_per_s", "Supervised tokens per second", "all devices", ""),
    ("step_time_s", "Time of a step", "s", ""),
    ("tflops_per_device", "TFLOP/s per device", "attention causal", ""),
    ("mfu_causal", "MFU", "attention causal", ""),
    ("mfu_full", "MFU", "attention in full", ""),
    ("fill", "Fill", "real tokens a position", ""),
    ("supervised_tokens", "Supervised tokens", "a step", ""),
)
MEMORY = ("memory_allocated_bytes", "memory_reserved_bytes", "predicted_memory_bytes")
GIB = 2.0**30


def percent(value: float) -> str:
    return f"{value * 100:.3g} %"


FORMS: Mapping[str, Callable[[float], str]] = {"mfu_causal": percent, "mfu_full": percent, "fill": percent}


def run_cards(runs: Sequence[Run]) -> str:
    cards = "".join(_card(run, i) for i, run in enumerate(runs))
    return f'<div class="grid-of">{cards}</div>' if len(runs) > 1 else cards


def _card(run: Run, color: int) -> str:
    share = min(1.0, run.step / run.total_steps) if run.total_steps else 0.0
    tone = (
        "good" if run.status in ("finished", "running") else "soft" if run.status in ("stopped", "not known") else "bad"
    )
    facts = "".join(f"<div><small>{esc(name)}</small>{esc(value)}</div>" for name, value in card_facts(run).items())
    return (
        f'<div class="card"><h3>{swatch(color)}{esc(run.name)} <span class="state {tone}">{esc(run.status)}</span></h3>'
        f'<p class="sub">{esc(run.path)}</p>'
        f'<div class="bar"><i class="c{color % 8}" style="width:{share * 100:.1f}%"></i></div>'
        f'<div class="facts">{facts}</div></div>'
    )


def card_facts(run: Run) -> dict[str, str]:
    """What one wants to know first."""
    seconds = run.series.get("step_time_s", Series()).recent()
    facts = {"step": f"{run.step} of {run.total_steps}"}
    for key, name in (("lm_loss", "loss"), ("validation_loss", "validation loss")):
        if key in run.series:
            facts[name] = number(run.series[key].last)
    for key, name in (("tokens_per_s", "tokens/s"), ("tflops_per_device", "TFLOP/s/device"), ("mfu_causal", "MFU")):
        if recent := run.series.get(key, Series()).recent():
            facts[name] = FORMS.get(key, number)(statistics.median(recent))
    if "supervised_tokens" in run.series:
        facts["supervised tokens"] = number(sum(run.series["supervised_tokens"].values))
    if run.starts:
        facts["starts"] = str(len(run.starts))
        facts["time"] = duration(sum(s.ended - s.began for s in run.starts))
    if run.status == "running" and seconds and run.step < run.total_steps:
        facts["time left"] = duration(statistics.median(seconds) * (run.total_steps - run.step))
    return facts


def curves(runs: Sequence[Run]) -> str:
    """Loss, validation, learning rate, gradient norm; losses by source; scores in training."""
    charts = [_chart(runs, key, title, unit) for key, title, unit in CURVES]
    charts += _grouped(runs, "loss_by_source/", "Loss by source")
    charts += [_chart(runs, key, f"In training: {key.removeprefix('eval/')}", "") for key in _keys(runs, "eval/")]
    return _charts("Curves", charts)


def _grouped(runs: Sequence[Run], prefix: str, title: str) -> list[str]:
    """One run: one chart with a line a source. Several: a chart a source with a line a run."""
    keys = _keys(runs, prefix)
    if len(runs) > 1:
        return [_chart(runs, key, f"{title}: {key.removeprefix(prefix)}", "") for key in keys]
    found = [(key.removeprefix(prefix), runs[0].series[key]) for key in keys]
    lines = [Line(name, series.points(), i, mean=series.mean()) for i, (name, series) in enumerate(found)]
    return [chart(title, lines, log=True)]


def _keys(runs: Sequence[Run], prefix: str) -> list[str]:
    return list(dict.fromkeys(k for run in runs for k in run.series if k.startswith(prefix)))


def _chart(runs: Sequence[Run], key: str, title: str, unit: str, planned: str = "") -> str:
    many, lines = len(runs) > 1, []
    for color, run in enumerate(runs):
        series = run.series.get(key, Series())
        points, plan = series.points(), run.series.get(planned, Series()).points(1)
        name = run.name if many else "measured" if plan else ""
        lines.append(Line(name, points, color, dots=len(points) < 40, mean=series.mean()))
        lines.append(Line(f"{run.name}, planned" if many else "planned", plan, color if many else 1, dashed=True))
    return chart(title, lines, unit=unit, form=FORMS.get(key, number), log=key in LOGARITHMIC)


def _charts(title: str, charts: Sequence[str], more: str = "", note: str = "") -> str:
    shown = "".join(c for c in charts if c)
    return section(title, (f'<div class="grid-of">{shown}</div>' if shown else "") + more, note)


def speed(runs: Sequence[Run]) -> str:
    """Throughput and memory, beside the plan where there is one."""
    charts = [_chart(runs, key, title, unit, planned) for key, title, unit, planned in SPEED]
    charts.append(_memory(runs))
    plans = [(run, run.facts.get("plan") or []) for run in runs]
    told = "".join(
        details(
            f"The plan{' of ' + run.name if len(runs) > 1 else ''}",
            "".join(f'<p class="note">{esc(p)}</p>' for p in plan),
        )
        for run, plan in plans
        if plan
    )
    return _charts("Throughput and memory", charts, _against_plan(runs) + told)


def _memory(runs: Sequence[Run]) -> str:
    lines, many = [], len(runs) > 1
    for color, run in enumerate(runs):
        for i, key in enumerate(MEMORY):
            points = [(x, y / GIB) for x, y in run.series.get(key, Series()).points(60)]
            words = key.split("_")[1] if i < 2 else "planned"
            if points:
                lines.append(
                    Line(f"{run.name}, {words}" if many else words, points, color if many else i, dashed=i > 0)
                )
    return chart("Peak memory, rank 0", lines, unit="GiB")


def _against_plan(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        for key, planned, name, form in (
            ("tokens_per_s", "predicted_tokens_per_s", "tokens/s (median of the last 50 steps)", number),
            ("memory_allocated_bytes", "predicted_memory_bytes", "peak memory, rank 0", size),
        ):
            ours, plan = run.series.get(key, Series()).recent(), run.series.get(planned, Series()).last
            if ours and plan:
                measured = statistics.median(ours)
                rows.append([esc(run.name), esc(name), form(measured), form(plan), f"{measured / plan - 1:+.1%}"])
    return table(["run", "measure", "measured", "planned", "difference"], rows, numbers=(2, 3, 4))


def time_line(runs: Sequence[Run]) -> str:
    """Starts, why they ended, what was trained again, and saves."""
    body = timeline(runs) + "".join(_starts_table(run, len(runs) > 1) for run in runs) + _saves(runs)
    return section("Starts and saves", body, "A red mark ends a start that did not end by itself or by a signal.")


def _starts_table(run: Run, named: bool) -> str:
    rows, again = [], repeated_steps(run.starts)
    for i, start in enumerate(run.starts):
        gap = start.began - run.starts[i - 1].ended if i else 0.0
        cause = cause_words(start.cause or ("" if run.status == "running" else run.status))
        tone = "" if start.cause in GOOD else ' class="bad"'
        where = " ".join(filter(None, (f"job {start.job}" if start.job else "", start.nodes)))
        rows.append([
            esc(moment(start.began)) + (f"<small>{esc(where)}</small>" if where else ""),
            f"{start.step} → {start.last_step}", str(again[i]) if i else "", duration(gap) if i else "",
            duration(start.ended - start.began), f"<span{tone}>{esc(cause)}</span>",
        ])  # fmt: skip
    shown = table(
        ["start", "steps", "repeated", "pause before", "ran for", "ended"], rows[-50:], numbers=(1, 2, 3, 4), wide=True
    )
    title = f"<h3>{esc(run.name)}</h3>" if named and rows else ""
    return title + shown + (f'<p class="note">The last 50 of {len(rows)} starts.</p>' if len(rows) > 50 else "")


def _saves(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        saves = [(e["seconds"], e["size_bytes"]) for e in run.of("save") if e.get("seconds") and e.get("size_bytes")]
        if saves:
            rate = statistics.median(b / 1e9 / s for s, b in saves)
            median = statistics.median(s for s, _ in saves)
            rows.append([
                esc(run.name), str(len(saves)), size(saves[-1][1]), f"{median:.3g} s", f"{max(s for s, _ in saves):.3g} s",
                f"{rate:.3g} GB/s",
            ])  # fmt: skip
    return table(["saves of", "count", "size", "median", "longest", "median rate"], rows, numbers=(1, 2, 3, 4, 5))


def data_shares(runs: Sequence[Run]) -> str:
    """What the set is made of, as its manifest says."""
    return section("Data", "".join(_shares(run, len(runs) > 1) for run in runs))


def _shares(run: Run, named: bool) -> str:
    data = run.facts.get("data")
    blend = data.get("blend") if isinstance(data, Mapping) else None
    if not isinstance(data, Mapping) or not isinstance(blend, Mapping) or not blend:
        return ""
    tokens = {str(k): _amount(v, "tokens") for k, v in blend.items() if isinstance(v, Mapping)}
    whole = sum(tokens.values()) or 1.0
    bar = "".join(
        f'<i class="c{i % 8}" style="width:{n / whole * 100:.3f}%" title="{esc(name)} {n / whole:.1%}"></i>'
        for i, (name, n) in enumerate(tokens.items())
    )
    rows = []
    for i, (name, count) in enumerate(tokens.items()):
        part = blend[name]
        amounts = [number(_amount(part, k)) for k in ("rows", "tokens", "supervised_tokens")]
        shares = [f"{count / whole:.1%}", f"{_amount(part, 'share_of_supervised'):.1%}"]
        rows.append([f'<span class="named">{swatch(i)}{esc(name)}</span>', *amounts, *shares])
    head = ["source", "rows", "tokens", "supervised", "of tokens", "of supervised"]
    fill = f"{data['fill']:.1%} full packs, " if isinstance(data.get("fill"), float) else ""
    note = f'<p class="note">{fill}content sha256 {esc(str(data.get("content_sha256", ""))[:16])}</p>'
    title = f"<h3>{esc(run.name)}</h3>" if named else ""
    return f'{title}<div class="shares">{bar}</div>{table(head, rows, numbers=range(1, 6))}{note}'


def _amount(part: Mapping[str, object], key: str) -> float:
    return number_or_none(part.get(key)) or 0.0


def samples(runs: Sequence[Run]) -> str:
    """Answers to the fixed prompts: the newest in full, earlier ones folded."""
    parts = [f"<h3>{esc(run.name)}</h3>{body}" if len(runs) > 1 else body for run in runs if (body := _samples(run))]
    return section("Samples", "".join(parts))


def _samples(run: Run) -> str:
    by_prompt: dict[str, list[tuple[int, str]]] = {}
    for event in run.of("samples"):
        for sample in event.get("samples") or []:
            if isinstance(sample, Mapping):
                answers = by_prompt.setdefault(str(sample.get("prompt", "")), [])
                answers.append((int(event.get("step") or 0), str(sample.get("answer", ""))))
    return "".join(_sample(prompt, answers) for prompt, answers in by_prompt.items())


def _sample(prompt: str, answers: list[tuple[int, str]]) -> str:
    step, newest = answers[-1]
    earlier = "".join(f'<p class="sub">step {s}</p><pre>{esc(a)}</pre>' for s, a in answers[:-1][-8:])
    return (
        f'<div class="card sample"><pre class="soft">{esc(prompt)}</pre><div class="answer"><p class="sub">step {step}</p>'
        f"<pre>{esc(newest)}</pre></div>{details('Earlier answers', earlier)}</div>"
    )


def warnings(runs: Sequence[Run]) -> str:
    """What the runs complained of, the newest last."""
    parts = []
    for run in runs:
        told = run.of("warning")
        lines = "".join(f"<li>{esc(moment(e['time']))}: {esc(e.get('sentence', ''))}</li>" for e in told[-50:])
        if lines:
            more = f"<li>and {len(told) - 50} before</li>" if len(told) > 50 else ""
            parts.append(
                (f"<h3>{esc(run.name)}</h3>" if len(runs) > 1 else "") + f'<ul class="warnings">{more}{lines}</ul>'
            )
    return section("Warnings", "".join(parts))


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Keys of the configurations whose values are not all equal; paths of the run itself aside."""
    keys = dict.fromkeys(k for run in runs for k in run.config)
    found = [(key, [run.config.get(key, "-") for run in runs]) for key in keys if key != "run.dir"]
    return [(key, values) for key, values in found if len(set(values)) > 1]


def what_was_run(runs: Sequence[Run]) -> str:
    """Differences first; then code, machines, packages, and every setting."""
    body = ""
    if len(runs) > 1:
        rows = [[esc(key), *map(esc, values)] for key, values in differences(runs)]
        head = ["setting", *(run.name for run in runs)]
        body = table(head, rows, wide=len(runs) > 2) or '<p class="note">The configurations are equal.</p>'
    facts = [[esc(run.name), *_origin(run)] for run in runs if run.facts]
    body += table(["run", "code", "ranks", "machine", "packages"], facts, wide=True)
    for run in runs:
        settings = [[esc(k), esc(v)] for k, v in run.config.items()]
        body += details(f"Every setting of {run.name}", table(["setting", "value"], settings))
    return section("What was run", body)


def _origin(run: Run) -> Iterator[str]:
    code, machine, layout = (_mapping(run.facts.get(k)) for k in ("code", "environment", "layout"))
    commit = str(code.get("commit", ""))[:12] or "no checkout"
    yield esc(f"{machine.get('coalm', '')} {commit}") + (
        "<small>with uncommitted changes</small>" if code.get("dirty") else ""
    )
    yield esc(layout.get("world_size", "-"))
    found = machine.get("gpus")
    gpus = found if isinstance(found, list) else []
    yield esc(machine.get("host", "-")) + (f"<small>{len(gpus)} x {esc(gpus[0])} a node</small>" if gpus else "")
    packages = {"Python": machine.get("python", "-"), **_mapping(machine.get("packages"))}
    yield esc(", ".join(f"{k} {v}" for k, v in packages.items()))


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}
