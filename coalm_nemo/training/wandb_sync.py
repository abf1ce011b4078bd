"""Sends what a run logged offline to W&B, with W&B's own `wandb sync`. All starts of a run directory are one W&B run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from coalm_nemo.errors import UserError

SYNC_S = 3600.0
NEW_SYNC = (0, 30)
"""From this version on `wandb sync` takes several pieces of one run in order, and --yes."""


def sync_command(run_dirs: Sequence[Path], include_online: bool = False) -> None:
    """`coalm wandb sync`: every unsent piece of each run. Raises UserError where there is no run, or W&B refuses."""
    for run_dir in run_dirs:
        id_file = Path(run_dir) / "wandb_run_id.txt"
        if not id_file.is_file():
            raise UserError(
                f"{run_dir} has nothing for W&B: no run with logging.wandb=offline or online was started in it"
            )
        pieces = unsent_pieces(run_dir, include_online)
        if not pieces:
            print(f"{run_dir}: everything is sent")
            continue
        try:
            sync_pieces(pieces, id_file.read_text().strip())
        except RuntimeError as e:
            raise UserError(f"W&B did not take {run_dir} ({e}); WANDB_API_KEY, or `wandb login`, gives access") from e
        print(
            f"{run_dir}: {len(pieces)} piece{'s' if len(pieces) > 1 else ''} sent as run {id_file.read_text().strip()}"
        )


def unsent_pieces(run_dir: Path, include_online: bool = False) -> list[Path]:
    """Directories of a run's starts that W&B has not been sent, oldest first.

    A start that was online sent what it logged as it went; it is only asked for where it was cut off.
    """
    kinds = ("offline-run", "run") if include_online else ("offline-run",)
    found = [p for kind in kinds for p in Path(run_dir).glob(f"wandb/{kind}-*") if _logs(p) and not _sent(p)]
    return sorted(found, key=lambda p: p.name.partition("run-")[2])  # run-DATE_TIME-ID


def sync_pieces(pieces: Sequence[Path], wandb_id: str, timeout_s: float = SYNC_S) -> None:
    """Send them in their order as the one run `wandb_id`. Raises RuntimeError with W&B's own last words."""
    wandb = [sys.executable, "-m", "wandb", "sync", "--id", wandb_id, "--include-online"]
    if tuple(int(n) for n in version("wandb").split(".")[:2]) >= NEW_SYNC:
        commands = [[*wandb, "--yes", *map(str, pieces)]]
    else:
        commands = [[*wandb, *(["--append"] if i else []), str(piece)] for i, piece in enumerate(pieces)]
    for command in commands:
        _run(command, timeout_s)
    if left := [p for p in pieces if not _sent(p)]:
        raise RuntimeError(f"{left[0].name} is not marked as sent")


def _run(command: list[str], timeout_s: float) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise RuntimeError(str(e)) from e
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise RuntimeError(lines[-1].strip()[:300] if lines else f"exit code {done.returncode}")


def _logs(piece: Path) -> list[Path]:
    return [p for p in piece.glob("run-*.wandb") if p.stat().st_size]


def _sent(piece: Path) -> bool:
    return all(p.with_suffix(".wandb.synced").exists() for p in _logs(piece))
