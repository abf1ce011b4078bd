"""Which rows a step trains on, without training: `python -m coalm_nemo.training.rows_of_step RUN_DIR STEP`.

For a step that fails again and again: the rows are named on the console and in RUN_DIR/failed_step_N.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from coalm_nemo.config import RunConfig, build_config
from coalm_nemo.errors import EXIT_USER_ERROR, UserError


def main(words: list[str]) -> int:
    """Returns the exit code."""
    from coalm_nemo.training.worker import quiet_libraries

    quiet_libraries()
    try:
        run_dir, step = Path(words[0]), int(words[1])
        row_ids = rows_of_step(run_dir, step)
    except UserError as e:
        print(f"rows_of_step: {e}", file=sys.stderr)
        return EXIT_USER_ERROR
    path = run_dir / f"failed_step_{step:08d}.json"
    path.write_text(json.dumps({"step": step, "row_ids": row_ids}, indent=1) + "\n")
    print(f"step {step} trains on {len(row_ids)} rows: {', '.join(row_ids)} (also in {path})")
    return 0


def rows_of_step(run_dir: Path, step: int) -> list[str]:
    """Ids of the rows of step `step` (from 1). Raises UserError where the run directory cannot say it."""
    from coalm_nemo.checkpoint import layout
    from coalm_nemo.data.batch import Shape
    from coalm_nemo.training.checkpointing import list_checkpoints
    from coalm_nemo.training.feed import Feed, total_steps
    from coalm_nemo.training.prepare import Prepared, prepare, read_llama
    from coalm_nemo.training.worker import open_rows

    if not (run_dir / "run.yaml").is_file():
        raise UserError(f"{run_dir}/run.yaml is missing: the run has not come as far as its first step")
    run = build_config(RunConfig(), [run_dir / "run.yaml"])
    prepared: Prepared = prepare(run, read_llama(run))
    rows, _ = open_rows(run, prepared)
    shape = Shape(run.train.seq_len_tokens, run.data.packing, 1, 0, 1)
    feed = Feed(rows, run, shape, shuffle=run.data.shuffle, data_rank=0, data_size=1)
    done, consumed = 0, 0
    for path in list_checkpoints(run_dir / "checkpoints"):
        info = layout.read_info(path)
        if info.step is not None and info.step < step:
            done, consumed = info.step, info.consumed_items
    _, end = total_steps(run, len(feed.items))
    batch = feed.global_batch(consumed + (step - 1 - done) * run.batch.global_size, end)
    return [rows.row_id(r) for r in batch.rows]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
