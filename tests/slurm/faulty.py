"""`python` for jobs under test: the run as it is, but steps may take longer, crash on a row, or hang.

STEP_S: least seconds of a step. CRASH_ON_ROW: the rank that meets this row dies of a signal. HANG_AT: at this step rank 1
sleeps for ever, once a run directory.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """`faulty.py -m MODULE WORDS`, as `python -m MODULE WORDS`."""
    _, _, module, *words = sys.argv
    sys.argv = [module, *words]
    if "train" in words:
        from coalm_nemo.training import loop

        usual = loop.Loop._step

        def step(self: Any, number: int, prepared: Any, stop: bool) -> Any:
            if os.environ.get("CRASH_ON_ROW") in [self.feed.rows.row_id(r) for r in prepared.batch.rows]:
                os.kill(os.getpid(), signal.SIGSEGV)
            if number == int(os.environ.get("HANG_AT", "-1")) and os.environ.get("SLURM_PROCID") == "1":
                once = Path(self.run_config.run.dir) / "hung_once"
                if not once.exists():
                    once.touch()
                    time.sleep(1000)
            time.sleep(float(os.environ.get("STEP_S", "0")))
            return usual(self, number, prepared, stop)

        loop.Loop._step = step  # type: ignore[method-assign]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
