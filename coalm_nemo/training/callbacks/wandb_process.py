"""The process that talks to W&B, told what to log on its standard input: a JSON object a line, the first one for `start`.

It is apart from the training so that nothing W&B does (wait for a server, fill a disk, crash, wait at exit) is felt there.
It says {"ready": url}, or {"failed": why} and ends. Whoever starts it decides what then.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LEFT_ALONE_S = 120.0
"""How long it may take to finish when the training has died without a word."""


def main() -> int:
    """Log until standard input ends. Exit code 0: W&B has (or, offline, the disk has) everything."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # SLURM signals every process of a step; the end of input ends this one
    messages = _messages()
    try:
        run = start(next(messages))
    except BaseException as e:
        say({"failed": _one_line(e)})
        return 1
    say({"ready": getattr(run, "url", None) or ""})
    try:
        exit_code = follow(run, messages)
        _end_in_time(LEFT_ALONE_S)
        run.finish(exit_code=exit_code)
        return 0
    except BaseException as e:
        say({"failed": _one_line(e)})
        return 1


def start(message: dict[str, Any]) -> Any:
    """wandb.init as told: {"mode", "dir", "id", "project", "entity", "name", "config", "timeout_s", "earlier"}."""
    import wandb

    if message["earlier"]:  # of starts that were offline: one run, in the order of its steps
        from coalm_nemo.training.wandb_sync import sync_pieces

        sync_pieces([Path(p) for p in message["earlier"]], message["id"])
    settings = wandb.Settings(
        console="off",  # the ranks' output is not this process's
        disable_git=True,  # a remote's address can hold a token; commit and dirty are in the config
        save_code=False,
        silent=True,
        init_timeout=message["timeout_s"],
        x_stats_pid=os.getppid(),
    )
    return wandb.init(
        project=message["project"],
        entity=message["entity"] or None,
        name=message["name"],
        id=message["id"],
        resume="allow",
        mode=message["mode"],
        dir=message["dir"],
        config=message["config"],
        settings=settings,
    )


def follow(run: Any, messages: Iterator[dict[str, Any]]) -> int:
    """Log each message; the exit code that the last one gives, 1 if none does."""
    import wandb

    for message in messages:
        if "finish" in message:
            return int(message["finish"])
        values = dict(message["values"])
        for name, table in message.get("tables", {}).items():
            values[name] = wandb.Table(columns=table["columns"], data=table["rows"])
        run.log(values, step=message["step"])
    return 1


def say(message: dict[str, Any]) -> None:
    """To whoever started this."""
    try:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()
    except OSError:
        pass


def _messages() -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        yield json.loads(line)


def _one_line(e: BaseException) -> str:
    return ": ".join(filter(None, (type(e).__name__, " ".join(str(e).split()))))[:500]


def _end_in_time(seconds: float) -> None:
    """The training may be gone: then nobody else ends this process when W&B never answers."""
    timer = threading.Timer(seconds, lambda: os._exit(1))
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="coalm-wandb-", ignore_cleanup_errors=True) as place:
        os.environ["TMPDIR"] = tempfile.tempdir = place  # wandb's own leftovers go with it
        code = main()
    sys.stdout.flush()
    os._exit(code)  # wandb's own exit hooks would wait for its service
