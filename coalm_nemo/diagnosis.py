"""What the doctor finds, in words; and whether a version is one that this project asks for."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

FOUND, MISSING, BROKEN = "found", "missing", "broken"
REQUIRED = ("Python", "torch", "megatron-core", "transformers", "other packages")


@dataclass(frozen=True)
class Gpu:
    """One device as torch sees it."""

    name: str
    memory_gib: float
    capability: tuple[int, int]


@dataclass(frozen=True)
class Torch:
    """What importing torch told."""

    version: str = ""
    error: str = ""
    """First line of what the import raised; empty where it went well."""
    cuda: str = ""
    """CUDA version that torch was built for; empty for a CPU build."""
    nccl: str = ""
    gpus: tuple[Gpu, ...] = ()


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    name: str
    state: str
    """found | missing | broken"""
    version: str
    meaning: str
    """What it means for this machine."""
    remedy: str = ""
    """How to get or mend it; empty where nothing is to be done."""

    @property
    def stops_us(self) -> bool:
        """Without this the project does not run."""
        return self.name in REQUIRED and self.state != FOUND


@dataclass(frozen=True)
class Ability:
    """Something this machine can or cannot run."""

    name: str
    can: bool
    why: str


@dataclass(frozen=True)
class Diagnosis:
    """The whole answer."""

    findings: list[Finding]
    abilities: list[Ability]

    @property
    def ok(self) -> bool:
        """Nothing required is missing or broken."""
        return not any(f.stops_us for f in self.findings)


def wanted(distribution: str) -> str:
    """The versions that coalm_nemo asks for, as in its own metadata (`==0.16.*`); empty if it does not say."""
    from packaging.requirements import Requirement

    for text in importlib.metadata.requires("coalm_nemo") or []:
        requirement = Requirement(text)
        if requirement.name.lower() == distribution:
            return str(requirement.specifier)
    return ""


def wrong_version(distribution: str, version: str) -> str:
    """The versions that coalm_nemo asks for, if `version` is none of them, else empty. A pre-release is as good as its
    number says: NVIDIA's torch is one (2.10.0a0+...).
    """
    from packaging.specifiers import SpecifierSet

    asked = wanted(distribution)
    return asked if asked and not SpecifierSet(asked, prereleases=True).contains(version) else ""
