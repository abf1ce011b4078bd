"""Our packing against first-fit decreasing, TRL's "bfd" and Megatron-Bridge's packers, on one set of lengths.

The lengths have CoALM-IT's row counts and mean lengths; the spread about each mean is assumed (`coalm_it_lengths`).
TRL and Megatron-Bridge are not needed otherwise: where they are installed, or unpacked in a directory that is given, the
one module that packs is loaded by itself. A packer that scans every bin for every row runs on a sample of rows.

    python -m benchmarks.packing [--trl DIR] [--megatron-bridge DIR] [--sample 20000]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from coalm_nemo.data.packing import pack_rows_flat

CAPACITY = 4096
DATASETS_MAP_BATCH = 1000
"""Rows that `datasets.map(batched=True)`, and so TRL's `pack_dataset` by default, hands over at a time."""


@dataclass(frozen=True)
class Result:
    """One line of the table; `note` alone where nothing was run."""

    packer: str
    rows: int = 0
    tokens: int = 0
    packs: int = 0
    seconds: float = 0.0
    note: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, help="directory in which TRL lies, if it is not installed")
    parser.add_argument("--megatron-bridge", type=Path, help="the same for Megatron-Bridge")
    parser.add_argument("--sample", type=int, default=20_000, help="rows for packers of quadratic time")
    args = parser.parse_args()
    lengths = coalm_it_lengths()
    sample = np.random.default_rng(1).choice(lengths, args.sample, replace=False)
    print(
        f"{len(lengths)} rows, {lengths.sum()} tokens, mean {lengths.mean():.1f}, {lengths.min()} to {lengths.max()}\n"
    )
    every_row = [ours(lengths), first_fit_decreasing(lengths), *trl(lengths, args.trl)]
    report(f"all {len(lengths)} rows", every_row)
    report(f"{args.sample} rows drawn from them", [ours(sample), *megatron_bridge(sample, args.megatron_bridge)])


def coalm_it_lengths() -> np.ndarray:
    """Row lengths [311639] with the published counts and means: 677.8 tokens a row over all, cut at 4096.

    Published: rows of each part, SNIPS' mean of 938.5, CRA's of 726.0, and the mean over all. Assumed: each row is a fixed
    prompt and a log-normal rest; ToolACE's conversations average 900; CRA's rows are half actions (with the tool list)
    and half responses.
    """
    draw = np.random.default_rng(0)

    def part(rows: int, prompt: float, mean: float, sigma: float) -> np.ndarray:
        rest = draw.lognormal(0, sigma, rows)
        return np.minimum(np.rint(prompt + rest * (mean - prompt) / rest.mean()), CAPACITY).astype(np.int64)

    parts = [
        part(13_084, 900, 938.5, 0.35),  # SNIPS
        part(202_500, 260, 626.3, 0.5),  # Hammer
        part(13_819, 250, 900, 0.6),  # ToolACE
        part(41_118, 600, 900, 0.4),  # CRA, actions
        part(41_118, 200, 552, 0.5),  # CRA, responses
    ]
    return draw.permutation(np.concatenate(parts))


def ours(lengths: np.ndarray) -> Result:
    """The median of three runs."""
    runs = [timed("coalm_nemo", lengths, lambda: len(pack_rows_flat(lengths, CAPACITY))) for _ in range(3)]
    return sorted(runs, key=lambda r: r.seconds)[1]


def timed(packer: str, lengths: np.ndarray, pack: Callable[[], int], note: str = "") -> Result:
    """Runs a packer that returns how many packs it made."""
    started = time.perf_counter()
    packs = pack()
    return Result(packer, len(lengths), int(lengths.sum()), packs, time.perf_counter() - started, note)


def report(title: str, results: list[Result]) -> None:
    """A table; the last column is how many times as long a packer took as ours, the first line."""
    fewest = -(-results[0].tokens // CAPACITY)
    print(f"{title}; no packing can take fewer than {fewest} packs\n")
    print(f"| packer | packs | fill | padding tokens | seconds | times ours |\n|---|{'---:|' * 5}")
    for r in results:
        name = f"{r.packer} ({r.note})" if r.note else r.packer
        if not r.packs:
            print(f"| {name} | | | | | |")
            continue
        fill, padding = r.tokens / (r.packs * CAPACITY), r.packs * CAPACITY - r.tokens
        ratio = r.seconds / results[0].seconds
        print(f"| {name} | {r.packs} | {fill:.3%} | {padding} | {r.seconds:.2f} | {ratio:.3g} |")
    print(flush=True)


def first_fit_decreasing(lengths: np.ndarray) -> Result:
    """The textbook's packs, found with a tree in O(N log N): its scan over all bins would take hours."""

    def pack() -> int:
        tree = _FirstFit(len(lengths))
        return 1 + max(tree.place(length) for length in np.sort(lengths)[::-1].tolist())

    return timed("first-fit decreasing", lengths, pack, "plain Python, tree")


class _FirstFit:
    """Finds the first bin with enough room: a tree of the largest room below each node."""

    def __init__(self, bins: int) -> None:
        self.leaves = 1 << max(0, bins - 1).bit_length()
        self.room = [CAPACITY] * (2 * self.leaves)

    def place(self, size: int) -> int:
        node = 1
        while node < self.leaves:
            node = 2 * node if self.room[2 * node] >= size else 2 * node + 1
        bin_index = node - self.leaves
        self.room[node] -= size
        while node > 1:
            node //= 2
            self.room[node] = max(self.room[2 * node], self.room[2 * node + 1])
        return bin_index


def trl(lengths: np.ndarray, directory: Path | None) -> list[Result]:
    """`strategy="bfd"` on the whole set, and in the batches in which `pack_dataset` sees it by default."""
    found = find_file("trl", "data_utils.py", directory)
    if found is None:
        return [Result("TRL bfd", note="not installed")]
    import pyarrow as pa

    module = load(found, stand_ins=("datasets",))
    column = pa.ListArray.from_arrays(
        pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32()), pa.array(np.zeros(lengths.sum(), np.int8))
    )
    table = pa.table({"input_ids": column})

    def batches() -> int:
        starts = range(0, len(lengths), DATASETS_MAP_BATCH)
        return sum(len(module._pack_bfd(table.slice(s, DATASETS_MAP_BATCH), CAPACITY)) for s in starts)

    name = f"TRL {version('trl', found)} bfd"
    return [
        timed(name, lengths, lambda: len(module._pack_bfd(table, CAPACITY)), "all rows at once"),
        timed(name, lengths, batches, f"{DATASETS_MAP_BATCH} rows at a time, the default"),
    ]


def megatron_bridge(lengths: np.ndarray, directory: Path | None) -> list[Result]:
    """Both packers, as its dataset preparation calls them: with a histogram."""
    found = find_file("megatron/bridge", "data/datasets/packing_utils.py", directory)
    if found is None:
        return [Result("Megatron-Bridge", note="not installed")]
    module = load(found, stand_ins=())
    np.random.seed(0)
    histogram = np.bincount(lengths, minlength=CAPACITY + 1).tolist()

    def pack(algorithm: str) -> Callable[[], int]:
        return lambda: len(module.create_packing_strategy(histogram, CAPACITY, algorithm)[0])

    name = f"Megatron-Bridge {version('megatron-bridge', found)}"
    return [timed(f"{name} {a}", lengths, pack(a)) for a in module.PACKING_ALGOS]


def find_file(package: str, module: str, directory: Path | None) -> Path | None:
    """A module's file in the given directory, else on Python's path. The package itself is not imported."""
    places = [directory] if directory else [Path(p or ".") for p in sys.path]
    return next((p / package / module for p in places if (p / package / module).is_file()), None)


def load(file: Path, stand_ins: tuple[str, ...]) -> ModuleType:
    """A module by itself. A library that it names in annotations only may be missing: an empty one stands in."""
    for name in stand_ins:
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = _StandIn(name)
    spec = importlib.util.spec_from_file_location(f"benchmarked_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def version(distribution: str, file: Path) -> str:
    """Of the distribution that lies beside the file's package."""
    for parent in file.parents:
        for found in importlib.metadata.distributions(path=[str(parent)]):
            if (found.metadata["Name"] or "").lower().replace("_", "-") == distribution:
                return found.version
    return "?"


if __name__ == "__main__":
    main()
