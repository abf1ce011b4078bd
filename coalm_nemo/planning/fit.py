"""Fit the constants to published figures, print the errors, and cross-validate by leaving each model out.

    python -m coalm_nemo.planning.fit [CSV] [--write]

Least squares on log(predicted / published), with Huber weights, so that rows that contradict each other do not drag the
rest, and each constant drawn towards its prior as one observation of stated width. No term belongs to a row.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from statistics import median

from coalm_nemo.planning.constants import CONSTANTS_FILE, PRIOR, RANGES, WIDTHS, Constants
from coalm_nemo.planning.costs import step_time
from coalm_nemo.planning.published import PUBLISHED_FILE, Published, read_published

NAMES = tuple(f.name for f in fields(Constants))
NOISE = 0.03
"""Expected error of a row, in log units; beyond 1.5 times it a row counts less."""
ROUNDS = 40


def log_error(row: Published, constants: Constants) -> float:
    """log(predicted / published) of tokens/s/GPU."""
    job = row.job
    predicted = job.global_batch * job.seq_len_tokens / step_time(job, row.layout, constants).total / job.gpus
    return math.log(predicted / row.tokens_per_s_per_gpu)


def relative_error(row: Published, constants: Constants) -> float:
    """predicted / published - 1."""
    return math.expm1(log_error(row, constants))


def fit(rows: Sequence[Published], start: Constants = PRIOR) -> Constants:
    """The constants that explain the rows best, within their ranges (Gauss-Newton with damping)."""
    current, cost, damping = start, _cost(rows, start), 1e-3
    for _ in range(ROUNDS):
        proposal = _step(rows, current, damping)
        new_cost = _cost(rows, proposal)
        if new_cost < cost:
            if cost - new_cost < 1e-9:
                return proposal
            current, cost, damping = proposal, new_cost, damping / 3
        else:
            damping *= 5
            if damping > 1e6:
                break
    return current


def _scaled(name: str, value: float) -> float:
    """Distance of a constant from its prior, in widths of the prior."""
    return (value - getattr(PRIOR, name)) / WIDTHS[name]


def _cost(rows: Sequence[Published], constants: Constants) -> float:
    """Huber cost of the rows and the squared distance from the prior."""
    edge = 1.5
    total = sum(_scaled(n, getattr(constants, n)) ** 2 for n in NAMES)
    for row in rows:
        e = abs(log_error(row, constants)) / NOISE
        total += e * e if e < edge else edge * (2 * e - edge)
    return total


def _step(rows: Sequence[Published], at: Constants, damping: float) -> Constants:
    """One damped Gauss-Newton step, clipped to the ranges."""
    import numpy as np

    base = np.array([log_error(r, at) for r in rows]) / NOISE
    weight = np.sqrt(np.minimum(1.0, 1.5 / np.maximum(np.abs(base), 1e-12)))
    columns = []
    for name in NAMES:
        nudge = 1e-4 * WIDTHS[name]
        moved = replace(at, **{name: getattr(at, name) + nudge})
        columns.append((np.array([log_error(r, moved) for r in rows]) / NOISE - base) / 1e-4 * weight)
    jacobian = np.vstack([np.array(columns).T, np.eye(len(NAMES)), math.sqrt(damping) * np.eye(len(NAMES))])
    prior = np.array([_scaled(n, getattr(at, n)) for n in NAMES])
    target = -np.concatenate([base * weight, prior, np.zeros(len(NAMES))])
    move = np.linalg.lstsq(jacobian, target, rcond=None)[0]
    values = {n: getattr(at, n) + float(d) * WIDTHS[n] for n, d in zip(NAMES, move, strict=True)}
    return Constants(**{n: min(max(v, RANGES[n][0]), RANGES[n][1]) for n, v in values.items()})


def leave_one_model_out(rows: Sequence[Published]) -> list[float]:
    """Error of each row with constants fitted on the other models' rows only."""
    without = {m: fit([r for r in rows if r.model != m]) for m in {r.model for r in rows}}
    return [relative_error(r, without[r.model]) for r in rows]


def summary(errors: Sequence[float]) -> dict[str, float]:
    """Median, worst and root mean square of absolute errors."""
    sizes = [abs(e) for e in errors]
    return {
        "median": median(sizes),
        "worst": max(sizes),
        "rms": math.sqrt(sum(e * e for e in sizes) / len(sizes)),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Fit, print, and with --write keep the values."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", nargs="?", type=Path, default=PUBLISHED_FILE)
    parser.add_argument("--write", action="store_true", help="write constants.json")
    args = parser.parse_args(argv)
    rows = read_published(args.csv)
    constants = fit(rows)
    errors = [relative_error(r, constants) for r in rows]
    crossed = leave_one_model_out(rows)
    print(f"{'row':<58}{'published':>10}{'error':>9}{'left out':>10}")
    for row, error, left in zip(rows, errors, crossed, strict=True):
        print(f"{row.label():<58}{row.tokens_per_s_per_gpu:>10g}{error:>+9.1%}{left:>+10.1%}")
    for what, found in (("fitted", summary(errors)), ("leave one model out", summary(crossed))):
        print(f"{what}: " + ", ".join(f"{k} {v:.1%}" for k, v in found.items()))
    for name in NAMES:
        low, high = RANGES[name]
        print(f"{name:<18}{getattr(constants, name):.4g}  (prior {getattr(PRIOR, name):g}, range {low:g} to {high:g})")
    if args.write:
        write(constants, errors, crossed, args.csv.name, len(rows))


def write(
    constants: Constants,
    errors: Sequence[float],
    crossed: Sequence[float],
    source: str,
    rows: int,
    path: Path | None = None,
) -> None:
    """Write `constants.json`: values, when and on what they were fitted, and what errors are left."""
    kept = {
        "fitted_on": f"{source}, {rows} rows",
        "date": datetime.date.today().isoformat(),
        "values": {k: round(v, 6) for k, v in asdict(constants).items()},
        "errors": {k: round(v, 4) for k, v in summary(errors).items()},
        "leave_one_model_out": {k: round(v, 4) for k, v in summary(crossed).items()},
    }
    (path or CONSTANTS_FILE).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
