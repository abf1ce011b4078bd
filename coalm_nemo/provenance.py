"""Which code, which packages and which machines a run was started with. Environment variables are named one by one: a
key or a token can never be among them.
"""

from __future__ import annotations

import os
import platform
import re
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import coalm_nemo

PACKAGES = (
    "torch", "megatron-core", "transformer-engine", "apex", "nemo-toolkit", "transformers", "tokenizers", "safetensors",
    "numpy", "omegaconf", "wandb",
)  # fmt: skip
VARIABLES = (
    "SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_PARTITION", "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES",
    "SLURM_NTASKS", "SLURM_RESTART_COUNT", "SLURM_CLUSTER_NAME", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS",
    "OMP_NUM_THREADS", "NVIDIA_PYTORCH_VERSION", "NEMO_VERSION", "NCCL_DEBUG", "NCCL_IB_HCA", "NCCL_IB_DISABLE",
    "NCCL_SOCKET_IFNAME", "NVTE_FUSED_ATTN", "NVTE_FLASH_ATTN",
)  # fmt: skip
SECRET = re.compile(r"key|token(?!iz)|secret|passw|credential", re.IGNORECASE)
"""Names of variables that may hold what must not be written down."""


def environment() -> dict[str, Any]:
    """What this process runs on: {"coalm", "python", "platform", "host", "gpus", "packages", "variables"}."""
    return {
        "coalm": coalm_nemo.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "gpus": _gpus(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def code_version(root: Path | None = None) -> dict[str, Any]:
    """{"commit", "dirty"} of the checkout that this package runs from; commit is "" outside of one.

    Not the remote's address: it can hold a token.
    """
    root = root or Path(coalm_nemo.__file__).parent.parent
    commit = _git(root, "rev-parse", "HEAD")
    if not commit or not _git(root, "ls-files", "pyproject.toml"):  # a site-packages inside somebody's repository
        return {"commit": "", "dirty": False}
    return {"commit": commit, "dirty": bool(_git(root, "status", "--porcelain", "--untracked-files=no"))}


def data_summary(directory: str) -> dict[str, Any]:
    """What a set's manifest says, without its histograms; {} where `directory` is no set of `coalm data build`."""
    from coalm_nemo.data.shards import is_shard_set, read_manifest

    if not directory or not is_shard_set(Path(directory)):
        return {}
    manifest = read_manifest(Path(directory))
    kept = ("content_sha256", "tokenizer_sha256", "chat_template_sha256", "rows", "tokens", "supervised_tokens", "fill")
    return {**{k: manifest[k] for k in kept if k in manifest}, "blend": manifest.get("blend", {})}


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _gpus() -> list[str]:
    """Names of the GPUs that torch sees here, if the run has imported it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
