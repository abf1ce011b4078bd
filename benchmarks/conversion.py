"""Speed and memory of `coalm convert` against `cp` of the same files, on a checkpoint with the shapes of Llama 405B.

    python benchmarks/conversion.py --dir /tmp/conversion            # 14.8 GB of weights, about 45 GB of disk
    python benchmarks/conversion.py --dir /tmp/conversion --vocab 8192 --ffn 8192 --hidden 4096   # small, to try it out
    python benchmarks/conversion.py --dir /tmp/conversion --bridge-python VENV/bin/python   # beside megatron-bridge

Every timed run starts with the files out of the page cache; copies and conversions take turns.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import coalm_nemo
from coalm_nemo.checkpoint.mapping import hf_tensors
from coalm_nemo.checkpoint.safetensors_io import PlannedTensor, header_bytes, plan_shards
from coalm_nemo.models.llama import load_llama_config

BLOCK_BYTES = 64 << 20
SAMPLE_SECONDS = 0.02
SETTLE_SECONDS = 3.0
"""After files were removed the disk is told so (discard); that is not the next run's work."""
CEILING = "2GiB"
KEPT_LIMIT_BYTES = 600 * 10**6
CAST_LIMIT_BYTES = (2 << 30) + 300 * 10**6


@dataclass(frozen=True)
class Run:
    """One timed command."""

    seconds: float
    peak_bytes: int
    """Resident memory of the command and all its children, the largest sum of any sample."""


def main() -> None:
    args = parse_arguments()
    place: Path = args.dir
    if args.bridge_python:
        beside_bridge(place, args)
        return
    source, ckpt, back, copy = (place / name for name in ("hf", "ckpt", "back", "copy"))
    place.mkdir(parents=True, exist_ok=True)
    if not source.exists():
        make_checkpoint(source, args)
    size = weights_bytes(source)
    print(f"{size / 1e9:.1f} GB of weights, {os.cpu_count()} cores, ceiling {CEILING}", flush=True)
    importing = coalm("import", "--hf", source, "--out", ckpt)
    exporting = coalm("export", "--ckpt", ckpt, "--out", back)
    rows: dict[str, list[Run]] = {}
    for turn in range(args.rounds):
        remove(ckpt, back)
        take(rows, "cp (HF files)", ["cp", "-r", str(source), str(copy)], source, copy, size)
        take(rows, "import", importing, source, None, size)
        take(rows, "cp (Megatron files)", ["cp", "-r", str(ckpt), str(copy)], ckpt, copy, size)
        take(rows, "export", exporting, ckpt, None, size)
        take(rows, "cp, then fsync", ["sh", "-c", f"cp -r {ckpt} {copy} && sync -f {copy}"], ckpt, copy, size)
        if turn == 0:
            print(f"round trip: {compare(source, back)}", flush=True)
    remove(back)
    take(rows, "export --dtype fp16", [*exporting, "--dtype", "fp16"], ckpt, None, size)
    with_limits(rows, importing, exporting, source, ckpt, back, size)
    print_table(rows, size)
    remove(ckpt, back, copy)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="Scratch directory on the disk to measure.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bridge-python", help="Python of an environment with megatron-bridge; nothing else is run.")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=16384)
    parser.add_argument("--ffn", type=int, default=53248)
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=128256)
    return parser.parse_args()


def coalm(*words: object) -> list[str]:
    return [sys.executable, "-m", "coalm_nemo.cli", "convert", *map(str, words), "--max-memory", CEILING]


def take(
    rows: dict[str, list[Run]], name: str, command: list[str], reads: Path, scratch: Path | None, size: int
) -> None:
    """Run a command on files that are not in the page cache; `scratch` is what it writes for nothing."""
    drop_from_cache(reads)
    run = timed(command)
    rows.setdefault(name, []).append(run)
    print(
        f"{name:34s} {run.seconds:7.1f} s {size / 1e9 / run.seconds:5.2f} GB/s {run.peak_bytes / 1e6:6.0f} MB",
        flush=True,
    )
    if scratch is not None:
        remove(scratch)


def timed(command: list[str], limit: Callable[[], None] | None = None) -> Run:
    """Wall time, start-up included, and the peak of the whole process tree."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, preexec_fn=limit)
    with peak_of_tree(process.pid) as peak:
        code = process.wait()
    seconds = time.monotonic() - started
    if code:
        raise SystemExit(f"{' '.join(command)} ended with exit code {code}")
    return Run(seconds, peak[0])


@contextmanager
def peak_of_tree(pid: int) -> Iterator[list[int]]:
    """Samples /proc while the block runs; the result is in the list."""
    peak, stop = [0], threading.Event()

    def sample() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            peak[0] = max(peak[0], resident_bytes(pid))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def resident_bytes(pid: int) -> int:
    """Of a process and its descendants."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = [c for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()]
    except (OSError, IndexError):
        return 0
    return pages * resource.getpagesize() + sum(resident_bytes(int(child)) for child in children)


def with_limits(
    rows: dict[str, list[Run]],
    importing: list[str],
    exporting: list[str],
    source: Path,
    ckpt: Path,
    back: Path,
    size: int,
) -> None:
    """The same under a limit that the kernel enforces: an allocation beyond it fails."""
    for name, command, reads, out, limit in (
        ("import", importing, source, ckpt, KEPT_LIMIT_BYTES),
        ("export", exporting, ckpt, back, KEPT_LIMIT_BYTES),
        ("export --dtype fp16", [*exporting, "--dtype", "fp16"], ckpt, back, CAST_LIMIT_BYTES),
    ):
        remove(out)
        drop_from_cache(reads)
        name = f"{name}, {limit / 1e6:.0f} MB at most"
        with memory_limit(limit) as enter:
            rows[name] = [timed(command, enter)]
        print(f"{name:44s} {rows[name][0].seconds:7.1f} s", flush=True)
        if name.startswith("export,"):
            print(f"round trip: {compare(source, back)}", flush=True)


@contextmanager
def memory_limit(limit: int) -> Iterator[Callable[[], None]]:
    """A function for the child to call before it starts: a cgroup v2 of its own where one can be made (page cache
    counts there, and is reclaimed), else RLIMIT_DATA, which bounds all private writable memory."""
    group = Path(f"/sys/fs/cgroup/coalm-conversion-{os.getpid()}")
    try:
        if "memory" not in Path("/sys/fs/cgroup/cgroup.subtree_control").read_text().split():
            raise OSError("no memory controller")
        group.mkdir()
    except OSError:
        print("limit: RLIMIT_DATA", flush=True)
        yield lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        return
    try:
        (group / "memory.max").write_text(str(limit))
        print("limit: cgroup v2 memory.max", flush=True)
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid())) and None
    finally:
        group.rmdir()


def beside_bridge(place: Path, args: argparse.Namespace) -> None:
    """Both converters on models of about 1, 2 and 4 GB, taking turns."""
    args.hidden, args.ffn, args.heads, args.vocab = 2048, 8192, 32, 32000
    source, ckpt, back, theirs, their_back = (place / n for n in ("hf", "ckpt", "back", "bridge", "bridge_back"))
    worker = [args.bridge_python, str(Path(__file__).with_name("bridge_worker.py"))]
    print("| GB | | coalm s | bridge s | times | coalm peak MB | bridge peak MB |\n|---|---|---|---|---|---|---|")
    for args.layers in (6, 14, 31):
        remove(*(place / n for n in ("hf", "ckpt", "back", "bridge", "bridge_back")))
        place.mkdir(parents=True, exist_ok=True)
        make_checkpoint(source, args)
        pairs = {
            "import": (
                coalm("import", "--hf", source, "--out", ckpt),
                [*worker, "import", str(source), str(theirs)],
                source,
            ),
            "export": (
                coalm("export", "--ckpt", ckpt, "--out", back),
                [*worker, "export", str(source), str(theirs), str(their_back)],
                place,
            ),
        }
        for verb, (our_command, their_command, reads) in pairs.items():
            runs = []
            for command in (our_command, their_command):
                drop_from_cache(reads)
                runs.append(timed(command))
            ours, other = runs
            print(
                f"| {weights_bytes(source) / 1e9:.2f} | {verb} | {ours.seconds:.1f} | {other.seconds:.1f} | "
                f"{other.seconds / ours.seconds:.1f} | {ours.peak_bytes / 1e6:.0f} | {other.peak_bytes / 1e6:.0f} |",
                flush=True,
            )
        compare(source, back)
        compare(source, their_back)
    remove(source, ckpt, back, theirs, their_back)


def drop_from_cache(path: Path) -> None:
    """The next read comes from the disk."""
    for file in path.rglob("*") if path.is_dir() else (path,):
        if file.is_file():
            fd = os.open(file, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
    os.sync()
    time.sleep(SETTLE_SECONDS)


def remove(*paths: Path) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)


def make_checkpoint(directory: Path, args: argparse.Namespace) -> None:
    """A Hugging Face Llama directory of random BF16 weights that differ everywhere and fit FP16."""
    directory.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "dtype": "bfloat16",
        "num_hidden_layers": args.layers, "hidden_size": args.hidden, "intermediate_size": args.ffn,
        "num_attention_heads": args.heads, "num_key_value_heads": 8, "vocab_size": args.vocab,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    for file in (Path(coalm_nemo.__file__).parent / "demo/nano_base").glob("*token*"):
        shutil.copyfile(file, directory / file.name)
    tensors = [PlannedTensor(t.name, "bfloat16", t.shape) for t in hf_tensors(load_llama_config(directory))]
    shards = plan_shards(tensors, 5 * 10**9)
    draw = Draw()
    for name, members in shards.items():
        with (directory / name).open("wb", buffering=0) as file:
            file.write(header_bytes(members))
            for member in members:
                for part in draw.bytes(member.bytes):
                    file.write(part)
    if len(shards) > 1:
        weight_map = {t.name: name for name, members in shards.items() for t in members}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


class Draw:
    """Random BF16 numbers between 2**-7 and 2**-5, fast: one block, each time from another place on."""

    def __init__(self) -> None:
        import numpy as np

        drawn = np.random.default_rng(0).integers(0, 1 << 16, BLOCK_BYTES // 2, dtype=np.uint16)
        block = memoryview(((drawn & 0x80FF) | 0x3C00).tobytes())
        self._doubled = memoryview(bytes(block) * 2)
        self._at = 0

    def bytes(self, count: int) -> Iterator[memoryview]:
        while count:
            self._at = (self._at + 2 * 4_999_999) % BLOCK_BYTES
            part = self._doubled[self._at : self._at + min(count, BLOCK_BYTES)]
            count -= len(part)
            yield part


def compare(one: Path, other: Path) -> str:
    """Every tensor by name, dtype, shape and SHA-256, read by other code than the converter's."""
    ours, theirs = tensor_digests(one), tensor_digests(other)
    if ours != theirs:
        raise SystemExit(f"{one} and {other} differ")
    return f"all {len(ours)} tensors have equal SHA-256"


def tensor_digests(directory: Path) -> dict[str, tuple[str, str]]:
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                file.seek(8 + length + begin)
                digest = hashlib.sha256()
                for at in range(begin, end, BLOCK_BYTES):
                    digest.update(file.read(min(BLOCK_BYTES, end - at)))
                found[name] = (f"{entry['dtype']}{entry['shape']}", digest.hexdigest())
    return found


def weights_bytes(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.glob("*.safetensors"))


def print_table(rows: dict[str, list[Run]], size: int) -> None:
    """Medians, and every turn's ratio to the copy just before it."""
    print("\n| | seconds (median; all) | GB/s | peak MB | speed against cp, turn by turn |\n|---|---|---|---|---|")
    copies = {"import": "cp (HF files)", "export": "cp (Megatron files)"}
    for name, runs in rows.items():
        middle = statistics.median(run.seconds for run in runs)
        each = ", ".join(f"{run.seconds:.1f}" for run in runs)
        ratios = ""
        if name in copies:
            values = [c.seconds / r.seconds for c, r in zip(rows[copies[name]], runs, strict=True)]
            ratios = f"{statistics.median(values):.2f} ({', '.join(f'{v:.2f}' for v in values)})"
        peak = max(run.peak_bytes for run in runs) / 1e6
        print(f"| {name} | {middle:.1f}; {each} | {size / 1e9 / middle:.2f} | {peak:.0f} | {ratios} |")


if __name__ == "__main__":
    main()
