"""`coalm convert import --dry-run`: the plan of an import as a page or as JSON, with the time that it will take."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coalm_nemo.checkpoint.inspect_command import model_line
from coalm_nemo.checkpoint.plan import ConversionPlan, PlannedCopy, read_plan
from coalm_nemo.errors import UserError

MEASURED_BYTES = 256 << 20
_PIECE_BYTES = 8 << 20
_LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")


def plan_command(hf: Path, out: Path, gb_per_second: float | None, as_json: bool) -> int:
    """Print what importing `hf` to `out` would do; the speed is measured by a copy unless given.

    Returns 0, or 1 where the disk lacks room.
    """
    plan = read_plan(hf)
    if gb_per_second is not None and gb_per_second <= 0:
        raise UserError(f"a speed of {gb_per_second} GB/s is not possible; give a positive number")
    free = free_bytes(out)
    measured = gb_per_second is None
    count = min(MEASURED_BYTES, plan.weight_bytes, free // 4)
    speed = measured_gb_per_second(out, count) if gb_per_second is None else gb_per_second
    if as_json:
        print(json.dumps(plan_as_json(plan, out, free, speed), indent=1))
    else:
        print("\n".join(page(plan, out, free, speed, measured)))
    return 0 if free >= plan.needed_bytes else 1


def page(plan: ConversionPlan, out: Path, free: int, speed: float, measured: bool) -> Iterator[str]:
    """The plan as lines: totals, and a table of what goes where."""
    read = f"{plan.files} files" if plan.files else "config.json alone (no index)"
    yield f"model:      {model_line(plan.model)}"
    yield f"from:       {len(plan.copies):,} tensors, {read}"
    yield f"to:         {len(plan.keys)} Megatron tensors and {plan.objects:,} empty module states in {out}"
    yield f"parameters: {plan.parameters:,} of {plan.dtype}"
    yield f"bytes:      {plan.weight_bytes:,}"
    word = "enough" if free >= plan.needed_bytes else "NOT ENOUGH"
    yield f"disk:       {plan.needed_bytes / 1e9:,.4g} GB needed, {free / 1e9:,.4g} GB free: {word}"
    how = "as a copy on that disk just did" if measured else "as given"
    yield f"time:       {duration(plan.seconds(speed))} at {speed:.2f} GB/s, {how}"
    yield from (f"note:       {note}" for note in plan.notes)
    yield ""
    yield from _table(plan)


def _table(plan: ConversionPlan) -> Iterator[str]:
    groups: dict[str, list[PlannedCopy]] = {}
    for copy in plan.copies:
        groups.setdefault(_LAYER.sub("*", copy.name), []).append(copy)
    width = max(map(len, groups))
    yield f"{'Hugging Face':<{width}}  {'count':>5}  {'shape':<14}  {'bytes':>17}  Megatron"
    for name, copies in groups.items():
        first, size = copies[0], sum(copy.bytes for copy in copies)
        shape, blocks = "x".join(map(str, first.shape)), len(first.blocks)
        key = first.key + (f" (in {blocks} blocks of rows)" if blocks > 1 else "")
        yield f"{name:<{width}}  {len(copies):>5,}  {shape:<14}  {size:>17,}  {key}"
    yield f"{'all':<{width}}  {len(plan.copies):>5,}  {'':<14}  {plan.weight_bytes:>17,}"


def duration(seconds: float) -> str:
    """3725 -> `1 h 02 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def plan_as_json(plan: ConversionPlan, out: Path, free: int, speed: float) -> dict[str, Any]:
    """Everything, for programs."""
    return {
        **asdict(plan),
        "parameters": plan.parameters,
        "weight_bytes": plan.weight_bytes,
        "out": str(out),
        "needed_bytes": plan.needed_bytes,
        "free_bytes": free,
        "gb_per_second": speed,
        "seconds": plan.seconds(speed),
    }


def free_bytes(out: Path) -> int:
    """Free space on the file system that `out` would be on."""
    return shutil.disk_usage(_existing_parent(out)).free


def _existing_parent(out: Path) -> Path:
    where = Path(os.path.abspath(out))
    while not where.is_dir():
        where = where.parent
    return where


def measured_gb_per_second(out: Path, count: int = MEASURED_BYTES) -> float:
    """Speed of a plain copy of `count` bytes where `out` would be: read from disk, written, made durable.

    The files have no names and go with this call. Raises UserError where nothing can be written there.
    """
    where, piece = _existing_parent(out), os.urandom(max(1, min(count, _PIECE_BYTES)))
    try:
        with tempfile.TemporaryFile(dir=where) as source, tempfile.TemporaryFile(dir=where) as target:
            for _ in range(max(1, count // len(piece))):
                source.write(piece)
            source.flush()
            os.fsync(source.fileno())
            if hasattr(os, "posix_fadvise"):  # else it would be read from memory
                os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            source.seek(0)
            started = time.monotonic()
            shutil.copyfileobj(source, target, _PIECE_BYTES)
            target.flush()
            os.fsync(target.fileno())
            return source.tell() / 1e9 / max(time.monotonic() - started, 1e-9)
    except OSError as e:
        raise UserError(f"no copy could be timed in {where} ({e.strerror})") from e
