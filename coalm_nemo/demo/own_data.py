"""`coalm demo --base HF_DIR --data FILE.jsonl`: the main job on a user's own checkpoint and rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from coalm_nemo.data.rows import Row, read_rows, split_validation
from coalm_nemo.demo.pipeline import prepare_directory, run_main_job
from coalm_nemo.errors import UserError

HELD_OUT_FRACTION = 0.1
ANSWERED_ROWS = 32


def run_own_demo(base: Path, data: Path, out: Path, nproc: int, overrides: list[str]) -> dict[str, Any]:
    """Hold out a tenth of the rows, run the job, answer held-out prompts before and after; writes `out/demo.json`."""
    rows = read_rows(data)
    train, held_out = split_validation(rows, HELD_OUT_FRACTION)
    if not train or not held_out:
        raise UserError(f"{data} has {len(rows)} rows, too few to hold some out; give at least 20")
    paths, console = prepare_directory(out), Console(highlight=False)
    prompts = [r for r in held_out if r.messages and r.messages[-1]["role"] == "assistant"][:ANSWERED_ROWS]
    console.print(f"{len(rows)} rows: {len(train)} to train on, {len(held_out)} held out, {len(prompts)} to answer")
    before = answers(base, prompts)
    words = [
        "--recipe",
        "coalm_tiny",
        f"data.train={Path(data).absolute()}",
        f"data.validation_fraction={HELD_OUT_FRACTION}",
    ]
    run_main_job(console, Path(base).absolute(), paths, [*words, *overrides], nproc)
    after = answers(paths.tuned, prompts)
    items = [
        {"id": r.row_id, "gold": gold(r), "before": old, "after": new}
        for r, old, new in zip(prompts, before, after, strict=True)
    ]
    result = {"exact_before": share(items, "before"), "exact_after": share(items, "after"), "items": items}
    (paths.out / "demo.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(
        f"answers equal to the held-out ones: {result['exact_before']:.1%} before, {result['exact_after']:.1%} after; "
        f"all answers are in {paths.out / 'demo.json'}, the validation loss in {paths.run / 'metrics.jsonl'}"
    )
    return result


def answers(hf_dir: Path, rows: list[Row]) -> list[str]:
    """Greedy answers of a Hugging Face directory to each row's last prompt."""
    from coalm_nemo.demo.score import answer_rows

    return answer_rows(hf_dir, [r.messages[:-1] for r in rows], batch_size=8)


def gold(row: Row) -> str:
    return str(row.messages[-1].get("content", "")).strip()


def share(items: list[dict[str, str]], key: str) -> float:
    """Part of the items whose answer is the gold one."""
    return sum(i[key] == i["gold"] for i in items) / max(1, len(items))
