"""Installs coalm_nemo over what a container's base image has, and changes nothing of that.

Runs inside the image before anything of the project is there, so it uses the standard library and the image's pip.

    python3 container/install.py packages    what the project needs and the base lacks
    python3 container/install.py project     the project itself, then the checks
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "container" / "base.json"
PIP_CONFIG = Path("/run/secrets/pip.conf")
KEPT = ("torch", "megatron-core", "transformer-engine", "apex", "numpy")
"""Compiled for one another (numpy: for torch): never replaced, whatever the project asks for."""

Packages = dict[str, dict[str, str]]
"""Canonical name -> {"version", "place"}: the one of that name that Python imports."""


class Refusal(Exception):
    """The image cannot be built; the message is one sentence."""


def main(words: list[str]) -> int:
    steps = {"packages": install_packages, "project": install_project}
    if len(words) != 1 or words[0] not in steps:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        check_python(sys.version_info[:2])
        steps[words[0]]()
    except Refusal as e:
        print(f"install: {e}", file=sys.stderr)
        return 1
    return 0


def check_python(version: tuple[int, ...]) -> None:
    """Before anything is downloaded: pip would say it last."""
    if not (3, 11) <= version < (3, 13):
        raise Refusal(f"the base has Python {version[0]}.{version[1]}: take one with 3.11 or 3.12")


def install_packages() -> None:
    """torch first where the base has none, or the resolver would choose a build of it for us."""
    base, wanted = kept_base(installed()), requirements(ROOT / "pyproject.toml")
    replaced = unusable(base, wanted)
    for name, asked in replaced.items():
        print(f"install: {name} {base[name]['version']} of the base is replaced: the project wants {asked}", flush=True)
    RECORD.write_text(json.dumps({"packages": base, "replaced": sorted(replaced)}, indent=1), encoding="utf-8")
    if base:
        pip_install(pins(base, replaced), *wanted)
    else:
        tested = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        pip_install(tested, "torch")
        pip_install(tested, *wanted)
    verify()


def install_project() -> None:
    """Editable: one copy of the code, beside its configs and scripts."""
    pip_install([], "--no-deps", "--editable", str(ROOT))
    make_readable(ROOT)
    verify()
    words = ["doctor", "--expect-cluster"] if recorded()["packages"] else ["doctor"]
    if subprocess.run([sys.executable, "-m", "coalm_nemo.cli", *words], check=False).returncode:
        raise Refusal(f"`coalm {' '.join(words)}` finds the image wanting (above)")


def kept_base(base: Packages) -> Packages:
    """What must stay as it is: all of a base that brings torch, since its packages were built for one another. A plain
    base has nothing to keep but what came with its Python, too old for torch on some.
    """
    return base if "torch" in base else {}


def canonical(name: str) -> str:
    from pip._vendor.packaging.utils import canonicalize_name

    return str(canonicalize_name(name.strip()))


def installed() -> Packages:
    """What Python sees now; where a virtual environment hides a system package, the one that is imported."""
    report = json.loads(pip("inspect", capture=True))
    found: Packages = {}
    for package in report["installed"]:
        data, place = package["metadata"], package.get("metadata_location", "")
        found.setdefault(canonical(data["name"]), {"version": data["version"], "place": place})
    return found


def requirements(pyproject: Path) -> list[str]:
    """What the project depends on, without extras."""
    import tomllib

    return list(tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"])


def unusable(base: Packages, wanted: list[str]) -> dict[str, str]:
    """Packages of the base -> the versions that the project wants instead. Raises Refusal if one of them is KEPT.

    A vendor's build of torch is a pre-release (2.10.0a0+...): it counts as its release number says.
    """
    from pip._vendor.packaging.requirements import Requirement

    found = {}
    for requirement in map(Requirement, wanted):
        name = canonical(requirement.name)
        if name not in base or requirement.specifier.contains(base[name]["version"], prereleases=True):
            continue
        if name in KEPT:
            has = f"the base has {name} {base[name]['version']}"
            raise Refusal(f"{has}, the project wants {requirement.specifier}: take another base image")
        found[name] = str(requirement.specifier)
    return found


def pins(base: Packages, replaced: dict[str, str]) -> list[str]:
    """A constraint a package, to the very build that is there. Versions that are not Python's rules are left out."""
    from pip._vendor.packaging.version import InvalidVersion, Version

    lines = []
    for name, package in sorted(base.items()):
        try:
            Version(package["version"])
        except InvalidVersion:  # of the distribution's own packages; `verify` watches them all the same
            continue
        if name not in replaced:
            lines.append(f"{name}=={package['version']}")
    return lines


def pip_install(constraints: list[str], *words: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "constraints.txt"
        file.write_text("\n".join(constraints) + "\n", encoding="utf-8")
        pip("install", "--constraint", str(file), *words)


def pip(*words: str, capture: bool = False) -> str:
    """Output of pip, if captured. Raises Refusal if it fails.

    The image's own constraints are set aside: NVIDIA's list is of the versions that the image was built from, and what
    is installed in the end may be another. They are empty rather than unset, for a file of settings may name them too.
    """
    settings = {"CONSTRAINT": os.devnull, "NO_CACHE_DIR": "1", "DISABLE_PIP_VERSION_CHECK": "1"}
    settings |= {"ROOT_USER_ACTION": "ignore", "BREAK_SYSTEM_PACKAGES": "1"}  # the image is the environment
    if PIP_CONFIG.is_file():
        settings["CONFIG_FILE"] = str(PIP_CONFIG)
    environment = os.environ | {f"PIP_{key}": value for key, value in settings.items()}
    command = [sys.executable, "-m", "pip", *words]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE if capture else None, text=True, check=False)
    if done.returncode:
        raise Refusal(f"pip {words[0]} failed (above): is there a pip for {sys.executable}, and an index to reach?")
    return done.stdout or ""


def recorded() -> dict[str, Any]:
    """What `packages` found: {"packages": the base's that are kept, "replaced": names that may change}."""
    return dict(json.loads(RECORD.read_text(encoding="utf-8")))


def verify() -> None:
    """Raises Refusal if a package of the base is gone, has another version or lies elsewhere."""
    record = recorded()
    base, now = record["packages"], installed()
    if changed := changes(base, now, record["replaced"]):
        raise Refusal(f"the installation changed what the base has: {'; '.join(changed)}")
    same, kept = (
        len(base) - len(record["replaced"]),
        [f"{name} {now[name]['version']}" for name in KEPT if name in base],
    )
    print(f"install: {same} packages of the base are as they were{': ' * bool(kept)}{', '.join(kept)}", flush=True)


def changes(before: Packages, now: Packages, replaced: list[str]) -> list[str]:
    """`torch 2.10.0a0+nv is now 2.13.0` for every package that changed without being announced."""
    found = []
    for name, package in sorted(before.items()):
        there = now.get(name)
        if name in replaced or there == package:
            continue
        where = f" in {there['place']}" if there and there["version"] == package["version"] else ""
        found.append(f"{name} {package['version']} is now {there['version'] + where if there else 'gone'}")
    return found


def make_readable(directory: Path) -> None:
    """For every user id, whatever the checkout's permissions. Only what needs it: a touched file is a layer's weight."""
    for path in (directory, *directory.rglob("*")):
        mode = path.stat().st_mode
        asked = mode | (0o555 if path.is_dir() else 0o444)
        if asked != mode:
            path.chmod(asked)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
