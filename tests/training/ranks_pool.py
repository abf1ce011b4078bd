"""Ranks forked from the test process: torch and megatron-core are imported once a session, each run gets fresh ranks.

`RanksPool.train(config, N)` runs `run_worker` in N of them, as `coalm train --nproc N` does, and returns the exit codes.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from coalm_nemo.config import RunConfig
from coalm_nemo.training.launch import import_once
from coalm_nemo.training.ranks import free_port

TIMEOUT_S = 240


class RanksPool:
    """Starts ranks; ends those that hang."""

    def __init__(self) -> None:
        import_once()
        self.context = multiprocessing.get_context("fork")

    def train(
        self,
        config: RunConfig,
        nproc: int,
        worker: Callable[[RunConfig], int] | None = None,
        fine: tuple[int, ...] = (),
    ) -> list[int]:
        """Exit code of each rank. Raises RuntimeError with what they printed if one dies or hangs.

        A rank runs `worker` (training, if None); 1 is a crash unless it is among the codes that are `fine`.
        """
        port = free_port()
        ranks: list[BaseProcess] = [
            self.context.Process(target=_rank_main, args=(config, rank, nproc, port, worker)) for rank in range(nproc)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(TIMEOUT_S)
        codes = [p.exitcode for p in ranks]
        for process in ranks:
            if process.is_alive():
                process.kill()
        if None in codes or (1 in codes and 1 not in fine) or any(c is not None and c < 0 for c in codes):
            raise RuntimeError(f"ranks ended with {codes}; they printed:\n{output(config)}")
        return [int(c) for c in codes if c is not None]


def output(config: RunConfig) -> str:
    """What the ranks of a run printed."""
    return log_file(config).read_text()


def log_file(config: RunConfig) -> Path:
    directory = Path(config.run.dir)
    return directory.with_name(directory.name + ".log")


def _rank_main(config: RunConfig, rank: int, nproc: int, port: int, worker: Callable[[RunConfig], int] | None) -> None:
    sys.stdout = sys.stderr = log_file(config).open("a", buffering=1)
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc, "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in env.items()}, MASTER_ADDR="127.0.0.1")
    from coalm_nemo.training.worker import run_worker

    code = 1
    try:
        code = (worker or run_worker)(config)
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)
