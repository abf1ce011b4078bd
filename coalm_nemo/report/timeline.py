"""Starts over time: a bar a start, with its cause where it ended, for every run on one scale."""

from __future__ import annotations

from collections.abc import Sequence

from coalm_nemo.report.html import duration, esc, moment
from coalm_nemo.report.read_run import Run, Start

WIDTH, ROW, TOP = 800, 26, 4
GOOD = ("finished", "stopped", "time limit", "preempted", "signal", "")
WORDS = {
    "": "goes on",
    "finished": "finished",
    "stopped": "stopped by a signal, with a checkpoint",
    "signal": "stopped by a signal, with a checkpoint",
    "non-finite": "the loss was not finite",
    "killed": "ended without a word: killed, or its machine failed",
    "silent": "silent",
}


def cause_words(cause: str) -> str:
    """The run's own words for why a start ended; a scheduler's as they are."""
    return WORDS.get(cause, cause)


def timeline(runs: Sequence[Run]) -> str:
    """SVG; "" where no run has said when it started."""
    runs = [run for run in runs if run.starts]
    if not runs:
        return ""
    low = min(s.began for run in runs for s in run.starts)
    high = max(max(s.ended for run in runs for s in run.starts), low + 1.0)
    rows = "".join(_row(run, i, low, high) for i, run in enumerate(runs))
    height = TOP + ROW * len(runs)
    ends = f"<span>{esc(moment(low))}</span><span>{esc(duration(high - low))}</span><span>{esc(moment(high))}</span>"
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="starts over time" preserveAspectRatio="none" '
        f'style="height:{height}px">{rows}</svg>'
    )
    return f'<div class="card time">{svg}<div class="legend ends">{ends}</div></div>'


def _row(run: Run, index: int, low: float, high: float) -> str:
    def at(when: float) -> float:
        return (when - low) / (high - low) * WIDTH

    parts, top = [], TOP + ROW * index
    for start in run.starts:
        left, right = at(start.began), at(start.ended)
        told = f"{run.name}: {moment(start.began)}, from step {start.step} to {start.last_step}, {cause_words(start.cause)}"
        parts.append(
            f'<rect class="f{index % 8}" x="{left:.2f}" y="{top}" width="{max(right - left, 1.0):.2f}" height="{ROW - 8}" '
            f'opacity="0.75"><title>{esc(told)}</title></rect>'
        )
        if start.cause not in GOOD:
            parts.append(
                f'<rect x="{min(right, WIDTH - 3):.2f}" y="{top - 2}" width="3" height="{ROW - 4}" fill="var(--bad)"/>'
            )
    return "".join(parts)


def repeated_steps(starts: Sequence[Start]) -> list[int]:
    """For each start, how many steps it trained again because the one before had gone further than its checkpoint."""
    return [0] + [max(0, a.last_step - b.step) for a, b in zip(starts[:-1], starts[1:], strict=True)]
