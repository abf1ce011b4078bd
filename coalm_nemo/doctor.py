"""`coalm doctor`: what is installed, what this machine can therefore run, and how to get the rest.

Packages are looked up by their metadata and their files, not imported: that is fast, and a broken one cannot take the
doctor down. Only torch is imported, for the GPU facts, and where it sees a GPU also the compiled packages, because
there it matters whether they load.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import netrc
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coalm_nemo.cluster_pieces import missing_pieces, report
from coalm_nemo.diagnosis import BROKEN, FOUND, MISSING, Ability, Diagnosis, Finding, Gpu, Torch, wrong_version
from coalm_nemo.platform import FP8_CAPABILITY

PYTHON_RANGE = ((3, 11), (3, 13))
SMALL_PACKAGES = ("safetensors", "tokenizers", "numpy", "omegaconf", "typer", "rich", "psutil", "pyarrow", "matplotlib")
INSTALL = "pip install -e . (in the clone), or make demo"
DEMO_DISK_GIB = 5.0


def doctor_command(as_json: bool, expect_cluster: bool = False, expect_gpus: int = 0) -> int:
    """Print the diagnosis; 0 if the project can run here (and what is expected is there), else 1."""
    diagnosis = diagnose()
    expected = expect_cluster or expect_gpus > 0
    missing = missing_pieces(diagnosis, expect_gpus) if expected else []
    ok = diagnosis.ok and not missing
    if as_json:
        print(json.dumps({"ok": ok, **asdict(diagnosis), **({"missing": missing} if expected else {})}, indent=2))
        return 0 if ok else 1
    _print(diagnosis)
    if expected:
        print(report(diagnosis, missing), file=sys.stderr)
    return 0 if ok else 1


def diagnose() -> Diagnosis:
    """Look at everything. Never raises: what cannot be looked at is reported as broken."""
    torch = look_at_torch()
    probes: dict[str, Callable[[], Finding]] = {
        "Python": _python,
        "torch": lambda: _torch(torch),
        "megatron-core": lambda: _package("megatron-core", "megatron/core", "the model and its parallelism"),
        "transformers": lambda: _package("transformers", "transformers", "tokenizers and chat templates"),
        "other packages": _small_packages,
        "Transformer Engine": lambda: _transformer_engine(torch),
        "Apex": lambda: _apex(torch),
        "flash-attn": lambda: _flash_attention(torch),
        "NeMo toolkit": _nemo,
        "NCCL": lambda: _nccl(torch),
        "GPUs": lambda: _gpus(torch),
        "SLURM": _slurm,
        "W&B": _wandb,
        "CPU, memory, disk": _machine,
    }
    findings = [_guarded(name, probe) for name, probe in probes.items()]
    return Diagnosis(findings, _abilities({f.name: f for f in findings}, torch))


def _guarded(name: str, probe: Callable[[], Finding]) -> Finding:
    try:
        return probe()
    except Exception as e:
        return Finding(name, BROKEN, "", f"could not be looked at: {first_line(e)}")


# What is there


def first_line(error: BaseException) -> str:
    """`ImportError: libcudart.so.12: cannot open ...`, cut to one line."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200].rstrip(": ")


def version_of(distribution: str) -> str:
    """Version by the package's metadata, without importing it; empty if it is not installed."""
    try:
        return importlib.metadata.version(distribution) or ""
    except importlib.metadata.PackageNotFoundError:
        return ""


def module_directory(name: str) -> Path | None:
    """Where a package's (`a/b`: a subpackage's) files are, without importing it; None if there are none."""
    top, _, rest = name.partition("/")
    spec = importlib.util.find_spec(top)
    if spec is None:
        return None
    places = [Path(p) for p in spec.submodule_search_locations or []]
    if not places:
        return Path(spec.origin).parent if spec.origin else None
    return next((p / rest for p in places if (p / rest).is_dir()), None)


def import_error(module: str) -> str:
    """First line of what importing `module` raises; empty if it loads."""
    try:
        importlib.import_module(module)
    except Exception as e:
        return first_line(e)
    return ""


def look_at_torch() -> Torch:
    """Import torch and ask it for the GPUs."""
    if importlib.util.find_spec("torch") is None:
        return Torch()
    try:
        import torch

        version = torch.__version__
        gpus = tuple(_gpu(torch.cuda.get_device_properties(i)) for i in range(torch.cuda.device_count()))
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else ""
        return Torch(version, "", torch.version.cuda or "", nccl, gpus)
    except Exception as e:
        return Torch(version_of("torch"), first_line(e))


def _gpu(properties: Any) -> Gpu:
    return Gpu(properties.name, round(properties.total_memory / 2**30, 1), (properties.major, properties.minor))


# One row each


def _python() -> Finding:
    (low, high), here = PYTHON_RANGE, sys.version_info[:2]
    version = platform.python_version()
    if low <= here < high:
        return Finding("Python", FOUND, version, "supported")
    return Finding("Python", BROKEN, version, "3.11 or 3.12 is needed", "make a virtual environment with one")


def _torch(torch: Torch) -> Finding:
    if torch.error:
        return Finding("torch", BROKEN, torch.version, torch.error, "pip install --force-reinstall torch")
    if not torch.version:
        return Finding("torch", MISSING, "", "nothing can be trained", INSTALL)
    if asked := wrong_version("torch", torch.version):
        return Finding("torch", BROKEN, torch.version, f"coalm_nemo wants {asked}", INSTALL)
    return Finding("torch", FOUND, torch.version, f"built for CUDA {torch.cuda}" if torch.cuda else "a CPU build")


def _package(name: str, module: str, use: str) -> Finding:
    version, directory = version_of(name), module_directory(module)
    if not version and directory is None:
        return Finding(name, MISSING, "", f"needed for {use}", INSTALL)
    if directory is None or not any(directory.glob("*.py")):
        meaning = "its metadata is there, its files are not"
        return Finding(name, BROKEN, version, meaning, f"pip install --force-reinstall {name}")
    if version and (asked := wrong_version(name, version)):
        return Finding(name, BROKEN, version, f"coalm_nemo wants {asked}", f"pip install '{name}{asked}'")
    return Finding(name, FOUND, version or "unknown", use)


def _small_packages() -> Finding:
    if missing := [p for p in SMALL_PACKAGES if not version_of(p)]:
        return Finding("other packages", MISSING, "", f"missing: {', '.join(missing)}", INSTALL)
    return Finding("other packages", FOUND, "", f"{', '.join(SMALL_PACKAGES)}: all there")


def _transformer_engine(torch: Torch) -> Finding:
    name, remedy = "Transformer Engine", "pip install 'coalm_nemo[te]' (needs a CUDA toolkit), or use the NGC container"
    version, directory = version_of("transformer-engine"), module_directory("transformer_engine")
    if not torch.gpus:
        meaning = "FP8 and fused layers: no; training runs on CPU with plain torch layers"
        return Finding(
            name, FOUND if directory else MISSING, version, meaning, "" if directory else f"with a GPU: {remedy}"
        )
    if directory is None:
        return Finding(name, MISSING, "", "training on the GPU needs it; until then run.layers=torch (no FP8)", remedy)
    if error := import_error("transformer_engine.pytorch"):
        return Finding(name, BROKEN, version, error, f"reinstall it for torch {torch.version}: {remedy}")
    return Finding(name, FOUND, version, "fused layers and attention on the GPU")


def _apex(torch: Torch) -> Finding:
    directory, version = module_directory("apex"), version_of("apex")
    remedy = "pip install --no-build-isolation git+https://github.com/NVIDIA/apex (not PyPI's `apex`)"
    if directory is None:
        meaning = "not needed: Transformer Engine's or torch's AdamW takes its place"
        return Finding("Apex", MISSING, "", meaning, f"with a GPU: {remedy}")
    if not (directory / "multi_tensor_apply").is_dir():
        meaning = "not NVIDIA Apex but another package of that name on PyPI (it has no apex.multi_tensor_apply)"
        return Finding("Apex", BROKEN, version, meaning, "pip uninstall apex")
    if importlib.util.find_spec("amp_C") is None:
        meaning = "built without its CUDA extensions (no amp_C), so without its fused AdamW"
        return Finding("Apex", BROKEN, version, meaning, remedy)
    if torch.gpus and (error := import_error("amp_C")):
        return Finding("Apex", BROKEN, version, error, f"build it again for torch {torch.version}: {remedy}")
    return Finding("Apex", FOUND, version, "fused AdamW on the GPU" if torch.gpus else "unused without a GPU")


def _flash_attention(torch: Torch) -> Finding:
    name, version, remedy = "flash-attn", version_of("flash-attn"), "pip install --no-build-isolation flash-attn"
    if module_directory("flash_attn") is None:
        instead = "cuDNN's, through Transformer Engine" if torch.gpus else "torch's"
        return Finding(name, MISSING, version, f"not needed: attention is {instead}", f"with a GPU: {remedy}")
    if torch.gpus and (error := import_error("flash_attn")):
        return Finding(name, BROKEN, version, error, f"for torch {torch.version}: {remedy} --force-reinstall")
    return Finding(name, FOUND, version, "used by Transformer Engine" if torch.gpus else "unused without a GPU")


def _nemo() -> Finding:
    name, version = "NeMo toolkit", version_of("nemo-toolkit")
    if not version:
        remedy = "in an environment of its own: pip install 'nemo-toolkit>=2.7,<3'"
        return Finding(name, MISSING, "", "not needed: coalm trains through megatron-core itself", remedy)
    if version.split(".")[0] != "2":
        return Finding(name, FOUND, version, "not needed; only 2.x has the LLM collection, this one has none")
    return Finding(name, FOUND, version, "not needed; its LLM collection is there")


def _nccl(torch: Torch) -> Finding:
    if torch.nccl:
        return Finding(
            "NCCL", FOUND, torch.nccl, "ranks talk over NCCL" if torch.gpus else "no GPU: ranks talk over gloo"
        )
    return Finding("NCCL", MISSING, "", "ranks talk over gloo", "comes with a CUDA build of torch")


def _gpus(torch: Torch) -> Finding:
    if not torch.gpus:
        why = "torch sees none (driver, CUDA_VISIBLE_DEVICES?)" if torch.cuda else "torch is a CPU build"
        return Finding("GPUs", MISSING, "", f"training runs on the CPU: {why}", "nvidia-smi lists what there is")
    return Finding("GPUs", FOUND, str(len(torch.gpus)), "; ".join(dict.fromkeys(map(_describe, torch.gpus))))


def _describe(gpu: Gpu) -> str:
    fp8 = "FP8 capable" if gpu.capability >= FP8_CAPABILITY else "no FP8 (needs 8.9)"
    return f"{gpu.name}, {gpu.memory_gib} GiB, compute capability {gpu.capability[0]}.{gpu.capability[1]}: {fp8}"


def _slurm() -> Finding:
    job = os.environ.get("SLURM_JOB_ID")
    where = f"inside allocation {job}" if job else "outside an allocation"
    if missing := [tool for tool in ("sbatch", "srun") if not shutil.which(tool)]:
        meaning = f"{' and '.join(missing)} not on PATH: start runs with --nproc or torchrun; {where}"
        return Finding("SLURM", MISSING, "", meaning, "a cluster's login node has it")
    return Finding("SLURM", FOUND, _slurm_version(), f"jobs can be submitted; {where}")


def _slurm_version() -> str:
    try:
        done = subprocess.run(["sbatch", "--version"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip().removeprefix("slurm ") or "unknown"


def _wandb() -> Finding:
    version = version_of("wandb")
    if not version:
        return Finding("W&B", MISSING, "", "logging.wandb must stay disabled", "pip install wandb")
    if _wandb_logged_in():
        return Finding("W&B", FOUND, version, "logged in: logging.wandb=online works")
    return Finding("W&B", FOUND, version, "not logged in: logging.wandb=offline works", "for online: wandb login")


def _wandb_logged_in() -> bool:
    """Whether there is a key for the server; the key itself is not looked at."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0]
    try:
        return host in netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False


def _machine() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory, free = _memory_bytes() / 2**30, shutil.disk_usage(".").free / 2**30
    what = f"{cores} cores, {memory:.0f} GiB of memory, {free:.0f} GiB free on this directory's disk"
    return Finding("CPU, memory, disk", FOUND, "", what, "" if free > DEMO_DISK_GIB else "make room for checkpoints")


def _memory_bytes() -> int:
    """Physical memory, or the container's limit where that is lower."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(physical, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no such limit, or "max"
        return physical


# What follows from it


def _abilities(found: dict[str, Finding], torch: Torch) -> list[Ability]:
    unmet = [f.name for f in found.values() if f.stops_us]
    here = Ability("", not unmet, f"mend first: {', '.join(unmet)}" if unmet else "")
    gpu = _gpu_training(here, found, torch)
    return [
        Ability("demo", here.can, here.why or "make demo"),
        Ability("conversion", here.can, here.why or "coalm convert import | export | verify"),
        Ability("CPU training", here.can, here.why or "coalm train --nproc N run.platform=cpu"),
        gpu,
        _fp8(gpu, torch),
        Ability("SLURM submission", found["SLURM"].state == FOUND, found["SLURM"].meaning),
    ]


def _gpu_training(here: Ability, found: dict[str, Finding], torch: Torch) -> Ability:
    engine = found["Transformer Engine"]
    if not torch.gpus:
        return Ability("GPU training", False, "torch sees no GPU")
    if not here.can:
        return Ability("GPU training", False, here.why)
    if engine.state != FOUND:
        return Ability("GPU training", False, f"Transformer Engine is {engine.state}")
    return Ability("GPU training", True, f"{len(torch.gpus)} x {torch.gpus[0].name}")


def _fp8(gpu: Ability, torch: Torch) -> Ability:
    if not torch.gpus:
        return Ability("FP8", False, gpu.why)
    if any(g.capability < FP8_CAPABILITY for g in torch.gpus):
        return Ability("FP8", False, "a GPU's compute capability is below 8.9")
    if not gpu.can:
        return Ability("FP8", False, f"{gpu.why}; torch's own: run.layers=torch precision.dtype=fp8_scaled_mm")
    return Ability("FP8", True, "precision.dtype=fp8_current (or fp8_blockwise, fp8_delayed)")


def _print(diagnosis: Diagnosis) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colour = {FOUND: "green", MISSING: "yellow", BROKEN: "red"}
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("", "version", "", "for this machine"):
        table.add_column(heading, overflow="fold")
    for f in diagnosis.findings:
        shade = "red" if f.stops_us else colour[f.state]
        remedy = f"\n[dim]-> {escape(f.remedy)}[/dim]" if f.remedy else ""
        table.add_row(f.name, escape(f.version), f"[{shade}]{f.state}[/{shade}]", escape(f.meaning) + remedy)
    out = Console()
    out.print(table)
    for a in diagnosis.abilities:
        word = "[green]yes[/green]" if a.can else "[yellow]no [/yellow]"
        out.print(f"  {a.name:<17} {word}  {escape(a.why)}", soft_wrap=True)
