"""The Dockerfile and slurm/build_image.sh as texts: linted, without secrets, and with the commands that they say."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "Dockerfile"
SCRIPT = ROOT / "slurm" / "build_image.sh"
BESIDE_PYTHON = Path(sys.executable).parent


def tool(name: str) -> str:
    """A linter from the path or from beside the interpreter; skips the test where it is in neither."""
    if found := shutil.which(name, path=f"{BESIDE_PYTHON}:{os.environ['PATH']}"):
        return found
    return pytest.skip(f"{name} is not installed (`pip install -e '.[dev]'` brings it)")


@pytest.mark.parametrize("file", ["Dockerfile", "tests/container/ngc_like.Dockerfile"])
def test_hadolint(file: str) -> None:
    done = subprocess.run([tool("hadolint"), "--no-color", ROOT / file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert not done.stdout


def test_shellcheck() -> None:
    done = subprocess.run([tool("shellcheck"), SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_labels_say_what_pyproject_says() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    labels = dict(re.findall(r'org\.opencontainers\.image\.([a-z.]+)="([^"]*)"', DOCKERFILE.read_text()))
    assert (labels["title"], labels["version"]) == (project["name"], project["version"])
    assert {"description", "revision", "created", "base.name"} <= set(labels)


def test_the_default_base_is_the_clusters_and_root_is_left() -> None:
    lines = DOCKERFILE.read_text().splitlines()
    assert "ARG BASE=nvcr.io/nvidia/nemo:26.02" in lines and "FROM ${BASE}" in lines
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert users[-1].split(":")[0] != "0"


def test_only_named_things_go_in() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    named = [line[1:] for line in lines if line.startswith("!")]
    assert lines[0] == "*" and all((ROOT / name).exists() for name in named)
    assert not {"runs", "wandb", ".git", "tests"} & set(named)
    assert {"**/*.env", "**/.*"} <= set(lines[1 + len(named) :]), "what is shut out must come after what is let in"


def build_image(
    tmp_path: Path, *words: str, tools: tuple[str, ...] = (), fails: str = ""
) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """The script with pretended tools on PATH, and the commands that they were given; `fails`: the one that exits with 1."""
    programs, said = tmp_path / "bin", tmp_path / "said"
    programs.mkdir(exist_ok=True)
    for name in ("bash", "cat", "date", "dirname", "git", "mktemp", "realpath", "rm", "sed"):
        if not (programs / name).exists():
            (programs / name).symlink_to(str(shutil.which(name)))
    for name in tools:
        (programs / name).write_text(
            f'#!/bin/bash\n{{ printf "%q " {name} "$@"; echo; }} >>{said}\n[[ "{fails}" != "$1" ]] || exit 1\n'
            '[[ $1 != import && $1 != export ]] || : >"$3"\n'
        )
        (programs / name).chmod(0o755)
    command = [str(shutil.which("bash")), str(SCRIPT), *words]
    done = subprocess.run(command, cwd=tmp_path, env={"PATH": str(programs)}, capture_output=True, text=True)
    lines = said.read_text().splitlines() if said.exists() else []
    return done, [shlex.split(line) for line in lines]


def test_docker_builds_and_enroot_writes_the_file(tmp_path: Path) -> None:
    (tmp_path / "pip.conf").touch()
    done, said = build_image(tmp_path, "--pip-conf", "pip.conf", "out.sqsh", tools=("docker", "enroot"))
    assert done.returncode == 0, done.stderr
    build, squash = said
    assert build[:2] == ["docker", "build"] and build[-1] == "."
    values = dict(build[i + 1].split("=", 1) for i, word in enumerate(build) if word == "--build-arg")
    assert values["BASE"] == "nvcr.io/nvidia/nemo:26.02" and re.fullmatch(
        r"[0-9a-f]{40}(-dirty)?|unknown", values["REVISION"]
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", values["CREATED"])
    assert f"id=pip.conf,src={tmp_path}/pip.conf" in build
    assert squash == ["enroot", "import", "--output", f"{tmp_path}/out.sqsh", "dockerd://coalm_nemo:latest"]


def test_podman_alone_builds_the_image_alone(tmp_path: Path) -> None:
    base = "nvcr.io/nvidia/nemo@sha256:" + "0" * 64
    done, said = build_image(tmp_path, "--base", base, "--tag", "mine:1", tools=("podman",))
    assert done.returncode == 0, done.stderr
    (build,) = said
    assert build[:2] == ["podman", "build"] and f"BASE={base}" in build and "mine:1" in build


def test_enroot_alone_does_the_dockerfiles_steps(tmp_path: Path) -> None:
    done, said = build_image(tmp_path, "out.sqsh", tools=("enroot",))
    assert done.returncode == 0, done.stderr
    assert [words[1] for words in said] == ["import", "create", "start", "export", "remove"]
    importing, creating, starting, exporting, removing = said
    assert importing[-1] == "docker://nvcr.io#nvidia/nemo:26.02"
    name = creating[3]
    assert exporting[3:] == [f"{tmp_path}/out.sqsh", name] and removing[-1] == name
    assert starting[2:4] == ["--root", "--rw"] and f"{ROOT}:/source" in starting
    steps = re.findall(r"python3 container/install.py (\w+)", starting[-1])
    assert steps == re.findall(r"python3 container/install.py (\w+)", DOCKERFILE.read_text()) == ["packages", "project"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bin", "out.sqsh", "said"], "the base's copy is cleaned up"


def test_a_step_that_fails_leaves_no_container(tmp_path: Path) -> None:
    done, said = build_image(tmp_path, "out.sqsh", tools=("enroot",), fails="start")
    assert done.returncode == 1
    assert [words[1] for words in said] == ["import", "create", "start", "remove"]
    assert not list(tmp_path.glob("build_image.*")) and not (tmp_path / "out.sqsh").exists()


def test_a_dry_run_only_prints(tmp_path: Path) -> None:
    done, said = build_image(tmp_path, "--dry-run", "--with", "enroot", "out.sqsh")
    assert done.returncode == 0, done.stderr
    assert not said and [line.split()[:3] for line in done.stdout.splitlines()] == [
        ["+", "enroot", verb] for verb in ("import", "create", "start", "export")
    ]


@pytest.mark.parametrize(
    ("words", "tools", "sentence"),
    [
        ([], (), "neither docker, podman nor enroot is on this machine"),
        (["out.sqsh"], ("docker",), "enroot, which writes out.sqsh, is not on this machine"),
        ([], ("enroot",), "name the file to write"),
        (["--with", "podman"], ("docker",), "podman is not on this machine"),
        (["--with", "singularity"], ("docker",), "use docker, podman or enroot"),
        (["out.img"], ("docker", "enroot"), "must end in .sqsh"),
        (["bin/there.sqsh"], ("docker", "enroot"), "is there already"),
        (["nowhere/out.sqsh"], ("docker", "enroot"), "the directory of nowhere/out.sqsh is not there"),
        (["--pip-conf", "none", "out.sqsh"], ("docker", "enroot"), "cannot be read"),
        (["--base", "a/b@sha256:0", "out.sqsh"], ("enroot",), "not the digest"),
        (["--base"], ("docker",), "--base needs a value"),
        (["--fast"], ("docker",), "unknown option --fast"),
        (["a.sqsh", "b.sqsh"], ("docker", "enroot"), "one file is built at a time"),
    ],
)
def test_refusals(tmp_path: Path, words: list[str], tools: tuple[str, ...], sentence: str) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "there.sqsh").touch()
    done, said = build_image(tmp_path, *words, tools=tools)
    assert done.returncode == 2 and not said
    assert sentence in done.stderr and done.stderr.count("\n") == 1
