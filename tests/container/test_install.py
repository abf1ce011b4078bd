"""container/install.py with a real pip on made-up bases: a vendor's pre-release torch that an index would replace."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
VENDOR_TORCH = "2.10.0a0+b4e4ee81d3.nv25.12"


def load_install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("container_install", ROOT / "container" / "install.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


install = load_install()


class Base:
    """A tree with the project's install.py, a virtual environment with packages, and a folder of wheels as the index."""

    def __init__(self, root: Path, python: Path) -> None:
        self.root, self.python, self.index = root, python, root / "index"
        self.index.mkdir(parents=True)
        (root / "container").mkdir()
        (root / "container" / "install.py").write_bytes((ROOT / "container" / "install.py").read_bytes())
        self.constraints = root / "constraints.txt"
        self.constraints.touch()

    def wheel(self, name: str, version: str, *requires: str) -> Path:
        """An empty package in the index."""
        module = name.replace("-", "_")
        path = self.index / f"{module}-{version}-py3-none-any.whl"
        info = f"{module}-{version}.dist-info"
        files = {
            f"{module}/__init__.py": "",
            f"{info}/METADATA": "\n".join(
                [
                    "Metadata-Version: 2.1",
                    f"Name: {name}",
                    f"Version: {version}",
                    *map("Requires-Dist: {}".format, requires),
                ]
            ),
            f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        record = "".join(f"{file},,\n" for file in (*files, f"{info}/RECORD"))
        with zipfile.ZipFile(path, "w") as archive:
            for file, text in (files | {f"{info}/RECORD": record}).items():
                archive.writestr(file, text)
        return path

    def has(self, name: str, version: str) -> None:
        """Installed in the base, and not in the index."""
        wheel = self.wheel(name, version)
        subprocess.run([self.python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel], check=True)
        wheel.unlink()

    def packages(self, *wanted: str, **variables: str) -> subprocess.CompletedProcess[str]:
        lines = ", ".join(f'"{w}"' for w in wanted)
        (self.root / "pyproject.toml").write_text(f'[project]\nname = "project"\ndependencies = [{lines}]\n')
        own = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
        own |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.index), "PIP_CONFIG_FILE": os.devnull} | variables
        command = [self.python, self.root / "container" / "install.py", "packages"]
        return subprocess.run(command, env=own, capture_output=True, text=True, check=False)

    def versions(self) -> dict[str, str]:
        done = subprocess.run([self.python, "-m", "pip", "list", "--format=json"], capture_output=True, check=True)
        return {p["name"]: p["version"] for p in json.loads(done.stdout)}


@pytest.fixture(scope="module")
def with_pip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once and copied: an environment finds itself by where its interpreter lies."""
    directory = tmp_path_factory.mktemp("with_pip") / "venv"
    venv.create(directory, with_pip=True, symlinks=True)
    return directory


@pytest.fixture
def base(tmp_path: Path, with_pip: Path) -> Base:
    shutil.copytree(with_pip, tmp_path / "venv", symlinks=True)
    return Base(tmp_path / "tree", tmp_path / "venv" / "bin" / "python")


def test_a_vendors_torch_stays_although_newer_ones_are_in_the_index(base: Base) -> None:
    base.has("torch", VENDOR_TORCH)
    base.has("click", "8.1.0")
    base.wheel("torch", "2.13.0"), base.wheel("click", "8.4.0"), base.wheel("typer", "0.20.0", "click>=8", "torch>=2.6")
    done = base.packages("torch>=2.6", "typer>=0.15")
    assert done.returncode == 0, done.stdout + done.stderr
    now = base.versions()
    assert (now["torch"], now["click"], now["typer"]) == (VENDOR_TORCH, "8.1.0", "0.20.0")
    assert f"are as they were: torch {VENDOR_TORCH}" in done.stdout


def test_the_images_own_constraints_do_not_stop_the_installation(base: Base, tmp_path: Path) -> None:
    base.has("torch", VENDOR_TORCH)
    base.wheel("typer", "0.20.0")
    (tmp_path / "image.txt").write_text("typer==0.9.0\ntorch==2.9.0\n")
    done = base.packages("torch>=2.6", "typer>=0.15", PIP_CONSTRAINT=str(tmp_path / "image.txt"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_small_package_that_is_too_old_is_replaced_and_named(base: Base) -> None:
    base.has("torch", VENDOR_TORCH)
    base.has("omegaconf", "2.1.0")
    base.wheel("omegaconf", "2.3.0")
    done = base.packages("torch>=2.6", "omegaconf>=2.3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "omegaconf 2.1.0 of the base is replaced: the project wants >=2.3" in done.stdout
    assert base.versions()["omegaconf"] == "2.3.0"


@pytest.mark.parametrize(
    ("name", "version", "asked"), [("torch", "2.5.0a0+nv", ">=2.6"), ("megatron-core", "0.15.2", "==0.16.*")]
)
def test_a_compiled_package_that_is_too_old_is_refused(base: Base, name: str, version: str, asked: str) -> None:
    base.has("torch", version if name == "torch" else VENDOR_TORCH)
    if name != "torch":
        base.has(name, version)
    base.wheel("torch", "2.13.0"), base.wheel("megatron-core", "0.16.0")
    before = base.versions()
    done = base.packages(f"{name}{asked}")
    assert done.returncode == 1
    assert (
        done.stderr == f"install: the base has {name} {version}, the project wants {asked}: take another base image\n"
    )
    assert base.versions() == before


def test_what_can_only_be_had_with_another_torch_is_refused(base: Base) -> None:
    base.has("torch", VENDOR_TORCH)
    base.wheel("torch", "2.13.0"), base.wheel("peft", "1.0", "torch>=2.12")
    done = base.packages("peft")
    assert done.returncode == 1 and "install: pip install failed (above)" in done.stderr
    assert "Traceback" not in done.stderr
    assert base.versions()["torch"] == VENDOR_TORCH


def test_a_plain_base_gets_the_tested_versions_and_may_renew_its_tools(base: Base) -> None:
    base.has("wheel", "0.1")
    base.constraints.write_text("# tested\ntorch==2.13.0\n")
    for version in ("2.13.0", "2.14.0"):
        base.wheel("torch", version, "wheel>=0.40")
    base.wheel("wheel", "0.45")
    done = base.packages("torch>=2.6")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (base.versions()["torch"], base.versions()["wheel"]) == ("2.13.0", "0.45")


def test_no_pip_is_one_sentence(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    base = Base(tmp_path / "tree", tmp_path / "venv" / "bin" / "python")
    done = base.packages("torch>=2.6")
    assert done.returncode == 1 and "is there a pip for" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("version", "good"), [((3, 10), False), ((3, 11), True), ((3, 12), True), ((3, 13), False)])
def test_the_bases_python(version: tuple[int, int], good: bool) -> None:
    if good:
        install.check_python(version)
        return
    with pytest.raises(install.Refusal, match=r"take one with 3\.11 or 3\.12"):
        install.check_python(version)


def test_usage() -> None:
    done = subprocess.run([sys.executable, "container/install.py", "all"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "install.py packages" in done.stderr


def package(version: str, place: str = "/usr") -> dict[str, str]:
    return {"version": version, "place": place}


def test_every_kind_of_change_is_named() -> None:
    before = {name: package("1.0") for name in ("apex", "kept", "moved", "newer")}
    now = {"kept": package("1.0"), "moved": package("1.0", "/opt"), "newer": package("2.0"), "added": package("1.0")}
    assert install.changes(before, now, []) == [
        "apex 1.0 is now gone",
        "moved 1.0 is now 1.0 in /opt",
        "newer 1.0 is now 2.0",
    ]
    assert install.changes(before, now, ["newer", "apex", "moved"]) == []


@given(st.dictionaries(st.sampled_from("abcdef"), st.sampled_from(["1.0", "2.0a0+nv"])), st.data())
def test_nothing_is_named_exactly_when_nothing_changed(versions: dict[str, str], data: st.DataObject) -> None:
    before = {name: package(version) for name, version in versions.items()}
    assert install.changes(before, before | {"z": package("1")}, []) == []
    if before:
        name = data.draw(st.sampled_from(sorted(before)))
        now = before | {name: package(before[name]["version"] + ".1")}
        assert len(install.changes(before, now, [])) == 1 and install.changes(before, now, [name]) == []


def test_versions_that_are_not_pythons_are_not_pinned() -> None:
    found = {"distro-info": package("1.1build1"), "torch": package(VENDOR_TORCH)}
    assert install.pins(found, {}) == [f"torch=={VENDOR_TORCH}"]


def test_only_what_nobody_else_can_read_is_touched(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o700)
    for name, mode in (("closed/a.py", 0o600), ("open.sh", 0o755)):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(mode)
    untouched = (tmp_path / "open.sh").stat().st_ctime_ns
    install.make_readable(tmp_path)
    assert (tmp_path / "closed").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "closed/a.py").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "open.sh").stat().st_ctime_ns == untouched
