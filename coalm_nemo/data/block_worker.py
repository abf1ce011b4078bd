"""What a worker process does with one block: rows, contamination guard, tokens, and the check against the template."""

from __future__ import annotations

import gc
import multiprocessing
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from coalm_nemo.data.build_config import BuildConfig
from coalm_nemo.data.encoding import TOKEN_CHECK_INTERVAL, EncodedRow, RowEncoder
from coalm_nemo.data.rows import Row
from coalm_nemo.data.shards import EncodedBlock
from coalm_nemo.data.sources.base import Block, Dropped
from coalm_nemo.errors import UserError

if TYPE_CHECKING:
    from coalm_nemo.data.build_config import SourceEntry
    from coalm_nemo.data.contamination import EvaluationItems


@dataclass(frozen=True)
class BlockResult:
    """What a worker sends back."""

    encoded: EncodedBlock
    dropped: Counter[str]
    parts: Counter[str]
    counts: dict[str, int]
    overlaps: list[dict[str, str]]


class BlockWorker:
    """Everything a worker needs, made once in the parent and inherited."""

    def __init__(self, config: BuildConfig) -> None:
        self.config = config
        self.entries: list[SourceEntry] = config.entries()
        self.encoder = RowEncoder(Path(config.tokenizer), config.template)
        self.items = _read_items(config.against)

    def encode(self, index: int, block: Block) -> BlockResult:
        """One block of source `index`. Raises UserError naming the file and record of bad input."""
        entry = self.entries[index]
        dropped: Counter[str] = Counter()
        overlaps: list[dict[str, str]] = []
        rows: list[Row] = []
        for row in entry.source.rows(block, self.config.seed):
            if isinstance(row, Dropped):
                dropped[row.reason] += 1
            elif (overlap := self._overlap(row)) is not None:
                dropped["overlaps_evaluation"] += 1
                overlaps.append({"source": entry.name, "row": row.row_id, **overlap})
            else:
                rows.append(row)
        encoded = self._encode_rows(rows, entry.loss, dropped)
        parts = Counter(e.row.part for e in encoded if e.row.part)
        return BlockResult(EncodedBlock.of(encoded), dropped, parts, entry.source.counts(block), overlaps)

    def _encode_rows(self, rows: list[Row], loss: str, dropped: Counter[str]) -> list[EncodedRow]:
        encoded: list[EncodedRow] = []
        for entry in self.encoder.encode(rows, loss=loss, max_tokens=self.config.seq_len_tokens + 1):
            if isinstance(entry, Dropped):
                dropped[entry.reason] += 1
                continue
            if not 0 < entry.supervised < len(entry.tokens):
                raise UserError(f"{entry.row.row_id}: {entry.supervised} of {len(entry.tokens)} tokens are supervised")
            self.encoder.check_rendering(entry, tokens_too=len(encoded) % TOKEN_CHECK_INTERVAL == 0)
            encoded.append(entry)
        return encoded

    def _overlap(self, row: Row) -> dict[str, str] | None:
        if self.items is None:
            return None
        texts = [m["content"] for m in row.messages if m["role"] in ("user", "assistant") and m.get("content")]
        overlap = self.items.overlap(texts)
        return {"kind": overlap.kind, "item": overlap.item_id, "words": overlap.words} if overlap else None

    def contamination_figures(self) -> dict[str, int]:
        """For the manifest."""
        return self.items.figures() if self.items else {}


def _read_items(against: list[str]) -> EvaluationItems | None:
    if not against:
        return None
    from coalm_nemo.data.contamination import EvaluationItems

    return EvaluationItems.read([Path(f) for f in against])


_worker: BlockWorker | None = None


def start_pool(worker: BlockWorker, workers: int) -> ProcessPoolExecutor:
    """Processes that hold `worker`: forked ones inherit it, elsewhere each makes its own."""
    global _worker
    _worker = worker
    gc.freeze()  # what is loaded stays: collecting it again and again costs workers a tenth of their time
    if sys.platform == "linux":
        return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork"))
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start, initargs=(worker.config,))


def _start(config: BuildConfig) -> None:
    global _worker
    _worker = BlockWorker(config)


def encode(index: int, block: Block) -> BlockResult:
    """`BlockWorker.encode` in a worker process."""
    assert _worker is not None
    return _worker.encode(index, block)
