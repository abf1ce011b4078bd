"""What `coalm convert` prints around a conversion: a bar on a terminal, one line of result, what differs."""

from __future__ import annotations

import json
import math
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coalm_nemo.checkpoint.convert import ConversionReport, export_checkpoint, import_checkpoint
from coalm_nemo.checkpoint.layout import HF_MANIFEST_FILE, MANIFEST_FILE, manifest_problems, read_manifest
from coalm_nemo.checkpoint.lora import export_adapter, is_adapter
from coalm_nemo.checkpoint.streams import Progress
from coalm_nemo.checkpoint.verify import VerifyReport, verify_checkpoint
from coalm_nemo.errors import EXIT_STOPPED, UserError

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_LISTED = 20
"""Differences printed one by one; the rest is counted (--json lists all)."""


def import_command(hf: Path, out: Path, max_memory: str, workers: int) -> None:
    """Hugging Face -> Megatron."""
    memory = parse_size(max_memory)
    with _stoppable(), _bar("import") as progress:
        report = import_checkpoint(
            hf, out, max_memory_bytes=memory, workers=workers, progress=progress, notice=print_notice
        )
    print(result_line(report))


def export_command(
    ckpt: Path,
    out: Path,
    hf_base: Path | None,
    dtype: str | None,
    max_memory: str,
    workers: int,
    merge_lora: bool = False,
    quantize: str | None = None,
) -> None:
    """Megatron -> Hugging Face: a model, or of a LoRA run without `merge_lora` the adapter as PEFT keeps it."""
    memory = parse_size(max_memory)
    if is_adapter(ckpt) and not merge_lora:
        if dtype or quantize:
            raise UserError("--dtype and --quantize go with a whole model; merge the adapters with --merge-lora")
        print(f"{out}: {export_adapter(ckpt, out, str(hf_base or ''))} tensors of a LoRA adapter, as PEFT loads it")
        return
    with _stoppable(), _bar("export") as progress:
        report = export_checkpoint(
            ckpt,
            out,
            hf_base=hf_base,
            dtype=dtype,
            merge_lora=merge_lora,
            quantize=quantize,
            max_memory_bytes=memory,
            workers=workers,
            progress=progress,
            notice=print_notice,
        )
    print(result_line(report))


def verify_command(hf: Path | None, ckpt: Path | None, logits: bool, as_json: bool) -> int:
    """Compare two directories, or one with its own manifest; returns 0 for equal and 1 for different."""
    if hf is not None and ckpt is not None:
        return _verify_pair(hf, ckpt, logits, as_json)
    if ckpt is not None:
        return _verify_manifest(ckpt, MANIFEST_FILE, as_json)
    if hf is not None:
        return _verify_manifest(hf, HF_MANIFEST_FILE, as_json)
    raise UserError("give --hf and --ckpt to compare them, or one of them to check its files against its checksums")


def _verify_pair(hf: Path, ckpt: Path, logits: bool, as_json: bool) -> int:
    """The tensors, and the logits where asked."""
    with _bar("verify") as progress:
        report = verify_checkpoint(hf, ckpt, progress=progress)
    compared = _compare_logits(hf, ckpt) if logits and not report.missing else None
    ok = report.ok and (compared is None or compared.ok)
    if as_json:
        print(json.dumps(_as_json(ok, report, compared), indent=2))
    else:
        _print_report(report)
        if logits:
            print(_logits_line(report, compared))
    return 0 if ok else 1


def _verify_manifest(directory: Path, file: str, as_json: bool) -> int:
    """Every file's SHA-256 against what was recorded when it was written."""
    if not (directory / file).is_file():
        raise UserError(f"{directory} has no {file} to check it against; give both --hf and --ckpt to compare the two")
    entries = read_manifest(directory, file)
    with _bar("verify") as progress:
        problems = manifest_problems(directory, file=file, progress=progress)
    size = sum(entry["bytes"] for entry in entries.values())
    if as_json:
        print(json.dumps({"ok": not problems, "files": len(entries), "bytes": size, "problems": problems}, indent=2))
        return 1 if problems else 0
    for problem in problems:
        print(problem)
    if not problems:
        print(f"{directory}: all {len(entries)} files ({size / 1e9:.3g} GB) have the SHA-256 that {file} lists")
    return 1 if problems else 0


def print_notice(sentence: str) -> None:
    """Something to know that is no error."""
    print(f"coalm: {sentence}", file=sys.stderr)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Ctrl-C and SIGTERM stop in an orderly way: one sentence, and the exit code that says the command can go on."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        print_notice("stopped; the same command goes on from here")
        sys.exit(EXIT_STOPPED)
    finally:
        signal.signal(signal.SIGTERM, before)


def parse_size(text: str) -> int:
    """`4GiB`, `500 MB` or `1048576` -> bytes. Raises UserError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT]?)(I?)B?)?", text.strip().upper())
    if not match or (match[3] and not match[2]):
        raise UserError(f"'{text}' is not a size; write a number and a unit, for example 4GiB or 500MB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2] or ""])


def result_line(report: ConversionReport) -> str:
    """What was written, how much of it, and how fast."""
    found = f", {report.found_bytes / 1e9:.3g} GB of it found finished and checked" if report.found_bytes else ""
    return (
        f"{report.destination}: {report.tensors} tensors, {report.weight_bytes / 1e9:.3g} GB of {report.dtype} "
        f"in {report.seconds:.2f} s ({report.gb_per_second:.2f} GB/s){found}"
    )


@contextmanager
def _bar(verb: str) -> Iterator[Progress | None]:
    """A progress bar on standard error; nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (verb, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(verb, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _compare_logits(hf: Path, ckpt: Path) -> Any:
    """A report with `max_abs_difference`, `prompts` and `ok`; None where the model does not fit into memory."""
    from coalm_nemo.checkpoint.logits import compare_logits

    return compare_logits(hf, ckpt)


def _print_report(report: VerifyReport) -> None:
    lines = [f"different: {d.name}: {d.reason} (by up to {d.max_abs_difference:.3g})" for d in report.different]
    lines += [f"missing: {name}" for name in report.missing]
    for line in lines[:_LISTED]:
        print(line)
    if len(lines) > _LISTED:
        print(f"... and {len(lines) - _LISTED} more (--json lists all)")
    counts = f"{len(report.equal)} equal, {len(report.different)} different, {len(report.missing)} missing"
    print(f"tensors: {counts}" if lines else f"tensors: all {len(report.equal)} equal bit for bit")


def _logits_line(report: VerifyReport, compared: Any) -> str:
    if report.missing:
        return "logits: not compared, tensors are missing"
    if compared is None:
        return "logits: not compared, both models do not fit into this machine's memory (--no-logits skips this)"
    word = "the same to rounding" if compared.ok else "different"
    return f"logits: {word} on {compared.prompts} prompts (by up to {compared.max_abs_difference:.3g})"


def _as_json(ok: bool, report: VerifyReport, compared: Any) -> dict[str, Any]:
    logits = None
    if compared is not None:
        logits = {
            "ok": compared.ok,
            "prompts": compared.prompts,
            "max_abs_difference": _finite(compared.max_abs_difference),
        }
    return {
        "ok": ok,
        "equal": len(report.equal),
        "different": [asdict(d) | {"max_abs_difference": _finite(d.max_abs_difference)} for d in report.different],
        "missing": list(report.missing),
        "logits": logits,
    }


def _finite(value: float) -> float | None:
    """JSON knows neither NaN nor infinity."""
    return value if math.isfinite(value) else None
