"""`coalm train --nproc N`: N ranks on this machine, without torchrun."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from coalm_nemo.config import RunConfig
from coalm_nemo.platform import Platform
from coalm_nemo.training.ranks import free_port
from coalm_nemo.training.stop import STOP_SIGNALS

GRACE_S = 15.0
"""How long the others may live once a rank has failed: time to print why, not to hang in a collective."""


def launch(run: RunConfig, nproc: int, platform: Platform, worker: Callable[[RunConfig], int] | None = None) -> int:
    """Start the ranks, pass signals on to them, wait; the exit code of the first rank that failed, else 0.

    A rank runs `worker` (training, if None), which gives its exit code.

    On CPU the ranks are forked from this process after its imports, which saves each of them the import of torch and
    megatron-core. CUDA does not survive a fork, so there they are started afresh.
    """
    if not platform.is_cuda:
        import_once()
    context: Any = multiprocessing.get_context("spawn" if platform.is_cuda else "fork")
    port = free_port()
    ranks = [context.Process(target=_rank_main, args=(run, rank, nproc, port, worker)) for rank in range(nproc)]
    for process in ranks:
        process.start()
    _pass_signals_on(ranks)
    return _wait(ranks)


def import_once() -> None:
    """The slow imports of a rank, before it is forked."""
    from coalm_nemo.training.worker import quiet_libraries

    quiet_libraries()
    import coalm_nemo.training.loop  # noqa: F401


def _rank_main(run: RunConfig, rank: int, nproc: int, port: int, worker: Callable[[RunConfig], int] | None) -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc, "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in env.items()}, MASTER_ADDR="127.0.0.1")
    from coalm_nemo.training.worker import run_worker

    code = (worker or run_worker)(run)
    os._exit(code) if code else None  # a failed rank must not wait for others in a destructor


def _pass_signals_on(ranks: list[BaseProcess]) -> None:
    def forward(number: int, frame: FrameType | None) -> None:
        for process in ranks:
            if process.is_alive() and process.pid:
                os.kill(process.pid, number)

    for number in STOP_SIGNALS:
        signal.signal(number, forward)


def _wait(ranks: list[BaseProcess]) -> int:
    failed = 0
    deadline = float("inf")
    while any(p.is_alive() for p in ranks):
        codes = [p.exitcode for p in ranks if p.exitcode]
        if codes and not failed:
            failed, deadline = codes[0], time.monotonic() + GRACE_S
        if time.monotonic() > deadline:
            for process in ranks:
                process.kill()
        time.sleep(0.02)
    failed = failed or next((p.exitcode for p in ranks if p.exitcode), 0)
    return 128 - failed if failed < 0 else failed
