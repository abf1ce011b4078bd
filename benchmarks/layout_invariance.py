"""Loss and gradient norm of every layout against plain transformers and torch's AdamW in fp32, as a table.

python -m benchmarks.layout_invariance > benchmarks/results/layout_invariance.md
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from coalm_nemo.training.callbacks.metrics_file import read_steps
from coalm_nemo.training.prepare import prepare, read_llama
from tests.conftest import write_rows
from tests.tiny_llama import make_tiny_llama
from tests.training.hf_reference import Reference, load_prepared, train_reference
from tests.training.ranks_pool import RanksPool
from tests.training.test_layout_invariance import LAYOUTS, STEPS, configure


def main() -> None:
    pool = RanksPool()
    print("| layout | ranks | embeddings | loss, largest difference | gradient norm, largest relative difference |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        rows = write_rows(Path(scratch) / "rows.jsonl", 48)
        for tied in (False, True):
            name = "tied" if tied else "untied"
            model = make_tiny_llama(Path(scratch) / name, num_layers=4, tied=tied)
            compare_layouts(pool, Path(scratch) / f"runs-{name}", model, rows, name)


def compare_layouts(pool: RanksPool, scratch: Path, model: Path, rows: Path, name: str) -> None:
    run = configure(model, rows, scratch / "reference")
    prepare(run, read_llama(run))
    reference = train_reference(run, load_prepared(scratch / "reference"), STEPS)
    for layout, (nproc, words) in LAYOUTS.items():
        codes = pool.train(configure(model, rows, scratch / layout, *words), nproc)
        assert codes == [0] * nproc, (layout, codes)
        loss, norm = differences(reference, read_steps(scratch / layout / "metrics.jsonl"))
        print(f"| {layout} | {nproc} | {name} | {loss:.1e} | {norm:.1e} |", flush=True)


def differences(reference: Reference, steps: Sequence[dict[str, float]]) -> tuple[float, float]:
    """(largest absolute difference of the loss, largest relative difference of the gradient norm) over the steps."""
    losses = [abs(s["lm_loss"] - r) for s, r in zip(steps, reference.losses, strict=True)]
    norms = [abs(s["grad_norm"] / r - 1) for s, r in zip(steps, reference.grad_norms, strict=True)]
    return max(losses), max(norms)


if __name__ == "__main__":
    main()
