"""One piece of benchmarks/h100.py in a process of its own: `python -m benchmarks.h100_task TASK OUT ANSWER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(task: dict[str, object], out: Path, answer: Path) -> None:
    from benchmarks.h100 import find_platform
    from benchmarks.h100_cases import Case
    from coalm_nemo.training.worker import quiet_libraries

    quiet_libraries()
    platform, _ = find_platform(bool(task["smoke"]))
    if task.get("numerics"):
        from benchmarks.h100_numerics import check

        found: object = {"rows": check(platform, out, smoke=bool(task["smoke"]))}
    else:
        from benchmarks.h100_speed import measure

        found = measure(Case(**task["case"]), platform, out)  # type: ignore[arg-type]
    answer.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
