"""How often each source's rows come in an epoch."""

from __future__ import annotations

import zlib

import numpy as np

from coalm_nemo.data.build_config import SourceEntry


def blended_order(entries: list[SourceEntry], sources: np.ndarray, seed: int) -> np.ndarray:
    """Stored rows of one epoch, int64, sorted; a row may come more than once.

    `sources` [rows] is each stored row's index into `entries`. With `epochs` every row comes floor(epochs) times and a
    seeded part of them once more. With `weight` the rows' shares are the weights', as many rows as there can be without
    any coming twice.
    """
    counts = np.bincount(sources, minlength=len(entries))
    chosen = [
        _repeat(np.flatnonzero(sources == i), epochs, seed, entry.name)
        for i, (entry, epochs) in enumerate(zip(entries, _epochs(entries, counts), strict=True))
    ]
    return np.sort(np.concatenate(chosen))


def _epochs(entries: list[SourceEntry], counts: np.ndarray) -> list[float]:
    if entries[0].weight is None:
        return [e.epochs for e in entries]
    weights = np.array([e.weight for e in entries], dtype=np.float64)
    total = float(np.min(counts / (weights / weights.sum())))  # the scarcest source is used whole
    return [float(total * w / weights.sum() / count) for w, count in zip(weights, counts, strict=True)]


def _repeat(rows: np.ndarray, epochs: float, seed: int, name: str) -> np.ndarray:
    whole, part = divmod(round(epochs * len(rows)), len(rows))
    generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    extra = generator.permutation(len(rows))[:part]
    return np.concatenate([np.tile(rows, whole), rows[extra]])
