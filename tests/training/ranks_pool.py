"""Ranks that live as long as the test session: torch and megatron-core are imported once, then forked.

`RanksPool.train(config)` runs `run_worker` in N of them, as `coalm train --nproc N` does, and returns the exit codes.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from coalm_nemo.config import RunConfig
from coalm_nemo.training.launch import import_once
from coalm_nemo.training.ranks import free_port

TIMEOUT_S = 240


class RanksPool:
    """Up to `size` ranks."""

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self.workers: list[tuple[Any, Connection]] = []

    def train(self, config: RunConfig, nproc: int) -> list[int]:
        """Exit code of each rank."""
        self._start()
        port = free_port()
        for rank, (_, pipe) in enumerate(self.workers[:nproc]):
            pipe.send((config, rank, nproc, port))
        codes = []
        for _, pipe in self.workers[:nproc]:
            try:
                if not pipe.poll(TIMEOUT_S):
                    raise EOFError("it hung")
                codes.append(pipe.recv())
            except EOFError as e:
                self.close()
                raise RuntimeError(f"a rank died: {e}\n{output(config)}") from e
        return codes

    def _start(self) -> None:
        if self.workers:
            return
        import_once()
        context = multiprocessing.get_context("fork")
        for _ in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=False)
            process.start()
            self.workers.append((process, ours))

    def close(self) -> None:
        """End the ranks."""
        for process, pipe in self.workers:
            pipe.close()
            process.join(2)
            if process.is_alive():
                process.kill()
        self.workers = []


def output(config: RunConfig) -> str:
    """What the ranks of a run printed."""
    return log_file(config).read_text()


def log_file(config: RunConfig) -> Path:
    directory = Path(config.run.dir)
    return directory.with_name(directory.name + ".log")


def _serve(pipe: Connection) -> None:
    from coalm_nemo.training.worker import run_worker

    while True:
        try:
            config, rank, nproc, port = pipe.recv()
        except EOFError:
            os._exit(0)
        sys.stdout = sys.stderr = log_file(config).open("a", buffering=1)
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": 4, "MASTER_PORT": port}
        os.environ.update({k: str(v) for k, v in env.items()}, MASTER_ADDR="127.0.0.1")
        pipe.send(run_worker(config))
