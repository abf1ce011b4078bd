"""Turns the CPU image's Python packages into a cluster image's: python3 ngc_like.py [PIECE TO LEAVE OUT]."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

TORCH, MEGATRON, ENGINE = "2.10.0a0+b4e4ee81d3.nv25.12", "0.16.0", "2.12.0+5671fd36"
ABSENT = ("coalm_nemo", "typer")
TOO_OLD = {"omegaconf": "2.2.0"}


def relabel(name: str, version: str) -> Path:
    """Give an installed package another version number; returns the folder that packages lie in."""
    distribution = importlib.metadata.distribution(name)
    place = Path(str(distribution.locate_file("")))
    old = next(place.glob(f"{name.replace('-', '_')}-*.dist-info"))
    new = place / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata = old / "METADATA"
    metadata.write_text(metadata.read_text().replace(f"\nVersion: {distribution.version}\n", f"\nVersion: {version}\n"))
    (old / "RECORD").write_text((old / "RECORD").read_text().replace(old.name, new.name))
    old.rename(new)
    return place


def make(place: Path, name: str, version: str, *modules: str) -> None:
    """An empty package with metadata."""
    info = place / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").touch()
    for module in modules:
        (place / module).mkdir(parents=True)
        (place / module / "__init__.py").touch()


def main(left_out: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "uninstall", "-y", "--break-system-packages", *ABSENT], check=True)
    place = relabel("torch", TORCH)
    relabel("megatron-core", MEGATRON)
    for name, version in TOO_OLD.items():
        relabel(name, version)
    version, nccl = place / "torch" / "version.py", place / "torch" / "cuda" / "nccl.py"
    version.write_text(version.read_text() + f"\n__version__ = '{TORCH}'\ncuda = '13.1'\n")
    nccl.write_text(nccl.read_text() + "\n\ndef version():\n    return (2, 28, 9)\n")
    pieces = {
        "transformer_engine": (ENGINE, "transformer_engine", "transformer_engine/pytorch"),
        "apex": ("0.1", "apex", "apex/multi_tensor_apply", "amp_C"),
    }
    for name, (version, *modules) in pieces.items():
        if name != left_out:
            make(place, name, version, *modules)
    Path("/etc/pip").mkdir()
    Path("/etc/pip/constraint.txt").write_text("typer==0.9.0\nomegaconf==2.2.0\ntransformers==4.40.0\ntorch==2.10.0\n")


if __name__ == "__main__":
    main(sys.argv[1])
