"""The console: one line a step, with the time left."""

from __future__ import annotations

from rich.console import Console as RichConsole

from coalm_nemo.training.callbacks.base import (
    Callback,
    EvalReport,
    RunEnd,
    RunStart,
    SaveNote,
    ScoresReport,
    StepReport,
)


class Console(Callback):
    """Prints to standard output. On a terminal in colour, in a log file as plain text."""

    def __init__(self, interval_steps: int) -> None:
        self.interval_steps = interval_steps
        self.total_steps = 0
        self.mean_step_s = 0.0
        self.out = RichConsole(highlight=False, soft_wrap=True)

    def on_start(self, start: RunStart) -> None:
        self.total_steps = start.total_steps
        for note in start.layout.derived:
            self.out.print(f"  {note.name}: [bold]{note.value}[/bold]  ({note.why})")
        for sentence in start.plan:
            self.out.print(f"  {sentence}")
        packs = f" in {start.items} packs, {start.fill:.1%} full" if start.config.data.packing else ""
        self.out.print(f"  rows: [bold]{start.rows}[/bold]{packs}")
        begin = f"resuming after step {start.first_step}" if start.first_step else "starting"
        self.out.print(f"{begin}: {start.total_steps} steps, {start.warmup_steps} of warm-up")

    def on_step(self, report: StepReport) -> None:
        # A running mean forgets the slow first steps; ten steps are enough for an honest time left.
        self.mean_step_s = (
            report.step_time_s if not self.mean_step_s else 0.9 * self.mean_step_s + 0.1 * report.step_time_s
        )
        if report.step % self.interval_steps and report.step != self.total_steps:
            return
        mfu = "" if report.mfu_causal is None else f"MFU {report.mfu_causal:.1%}  "
        left = duration(self.mean_step_s * (self.total_steps - report.step))
        self.out.print(
            f"step {report.step:>6}/{self.total_steps}  loss [bold]{report.lm_loss:.4f}[/bold]  "
            f"lr {report.learning_rate:.2e}  grad norm {report.grad_norm:.3f}  {report.tokens_per_s:,.0f} tokens/s  "
            f"{report.supervised_tokens_per_s:,.0f} supervised/s  {mfu}left {left}"
        )

    def on_eval(self, report: EvalReport) -> None:
        self.out.print(f"step {report.step:>6}  validation loss [bold]{report.validation_loss:.4f}[/bold]")

    def on_scores(self, report: ScoresReport) -> None:
        values = "  ".join(f"{name} [bold]{value:.4g}[/bold]" for name, value in report.scores.items())
        self.out.print(f"step {report.step:>6}  {values}")

    def on_save(self, note: SaveNote) -> None:
        rate = note.size_bytes / 1e9 / max(note.seconds, 1e-9)
        size = f"{note.size_bytes / 1e9:.3g} GB in {note.seconds:.1f} s ({rate:.2f} GB/s)"
        self.out.print(f"saved {note.path}: {size}")

    def on_warning(self, sentence: str) -> None:
        self.out.print(f"[yellow]warning:[/yellow] {sentence}")

    def on_end(self, end: RunEnd) -> None:
        self.out.print(f"{end.status} after step {end.step}, {duration(end.seconds)}")


def duration(seconds: float) -> str:
    """3725 -> `1:02:05`."""
    total = int(round(seconds))
    hours, rest = divmod(total, 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"
