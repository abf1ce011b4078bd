"""The Dockerfile built on a plain Debian and on a base like NVIDIA's, and run as a user that nobody knows.

`make test-container` runs this: about twenty minutes on two cores, 15 GB of disk, root, buildah and debootstrap.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from coalm_nemo.demo.pipeline import SPLIT_NAMES
from tests.container.buildah import ROOT, Buildah, Done, throwaway
from tests.container.ngc_like import ENGINE, MEGATRON, TORCH

ANYBODY = "12345:12345"
CPU_BASE, CPU, NGC_BASE, NGC = (f"localhost/{name}" for name in ("debian", "coalm-cpu", "ngc-like", "coalm-ngc"))


def reason_not_to() -> str:
    if not os.environ.get("COALM_TEST_CONTAINER"):
        return "takes twenty minutes and 15 GB: `make test-container` runs it"
    if os.geteuid():
        return "buildah in chroot isolation, and debootstrap, need root"
    missing = [name for name in ("buildah", "debootstrap") if not shutil.which(name)]
    return f"not installed: {', '.join(missing)} (Debian has packages of these names)" if missing else ""


pytestmark = [
    pytest.mark.container,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(bool(reason_not_to()), reason=reason_not_to() or "-"),
]


@pytest.fixture(scope="module")
def buildah() -> Iterator[Buildah]:
    with throwaway() as buildah:
        yield buildah


@pytest.fixture(scope="module")
def cpu(buildah: Buildah) -> Done:
    """Log of the build on a plain Debian."""
    buildah.debian(CPU_BASE)
    return buildah.build(CPU, CPU_BASE, "--build-arg", "REVISION=abc")


@pytest.fixture(scope="module")
def cpu_container(buildah: Buildah, cpu: Done) -> Iterator[str]:
    with buildah.container(CPU) as name:
        yield name


@pytest.fixture(scope="module")
def ngc_base(buildah: Buildah, cpu: Done) -> str:
    buildah.build(NGC_BASE, CPU, context=ROOT / "tests" / "container", file="ngc_like.Dockerfile")
    return NGC_BASE


def test_the_cpu_build_is_checked_by_the_doctor_and_labelled(buildah: Buildah, cpu: Done) -> None:
    assert "0 packages of the base are as they were" in cpu.stdout
    assert "CPU training      yes" in cpu.stdout and "coalm doctor: " not in cpu.stderr
    config = json.loads(buildah("inspect", "--type", "image", CPU).stdout)["OCIv1"]["config"]
    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in config["Labels"].items()}
    assert (labels["title"], labels["revision"], labels["base.name"]) == ("coalm_nemo", "abc", CPU_BASE)
    assert config["User"] == "1000:1000" and config["Cmd"] == ["coalm", "doctor"]


def test_the_image_keeps_no_settings_of_the_build(buildah: Buildah, cpu_container: str) -> None:
    settings = buildah.pip_conf.read_text()
    assert "[global]" in settings
    script = (
        "find / -xdev -name pip.conf -size +0; ls /root/.cache /run/secrets/* /opt/coalm_nemo/.git 2>/dev/null; env"
    )
    found = buildah.run(cpu_container, "sh", "-c", script, check=False).stdout
    assert "pip.conf" not in found and "PIP_" not in found and "wheels" not in found
    history = buildah("inspect", "--type", "image", CPU).stdout
    assert not [word for word in settings.split() if "/" in word and word in history]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("coalm doctor", r"CPU training +yes"),
        ("coalm plan --recipe coalm_405b --gpus 128 --top 1", r"TP\d+ PP\d+"),
        (
            "coalm train --dry-run --nproc 4 --recipe coalm_demo model.hf_path=$BASE data.train=/workspace/rows.jsonl",
            r"tensor",
        ),
        ("touch $HOME/a /workspace/a && python3 -c 'import getpass; print(getpass.getuser())'", "coalm"),
        ("python3 -c 'import torch._inductor.runtime.cache_dir_utils as c; print(c.cache_dir())'", "/"),
    ],
)
def test_anybody_can_run_it(buildah: Buildah, cpu_container: str, command: str, says: str) -> None:
    row = json.dumps({"instruction": "Repeat.", "input": "a b", "output": "a b"})
    start = f"cd /workspace; BASE=/opt/coalm_nemo/coalm_nemo/demo/nano_base; echo {shlex.quote(row)} >rows.jsonl; "
    done = buildah.run(cpu_container, "sh", "-c", start + command, user=ANYBODY)
    assert re.search(says, done.stdout), done.stdout + done.stderr


def test_a_laptops_image_is_no_clusters(buildah: Buildah, cpu_container: str) -> None:
    done = buildah.run(cpu_container, "coalm", "doctor", "--expect-cluster", user=ANYBODY, check=False)
    assert done.returncode == 1 and "Transformer Engine is missing" in done.stderr and "Traceback" not in done.stderr


def test_the_demo_as_anybody(buildah: Buildah, cpu_container: str) -> None:
    buildah.run(cpu_container, "coalm", "demo", "--out", "/workspace/runs/demo", user=ANYBODY)
    written = buildah.run(cpu_container, "cat", "/workspace/runs/demo/demo.json", user=ANYBODY).stdout
    after = json.loads(written)["after"]
    assert set(after) == set(SPLIT_NAMES)
    assert all(figures["calls"]["percent"] > 90 for figures in after.values()), written


def test_a_clusters_packages_stay_as_they_are(buildah: Buildah, ngc_base: str) -> None:
    done = buildah.build(NGC, ngc_base)
    kept = f"numpy {numpy_version()}"
    line = next(line for line in done.stdout.splitlines() if "packages of the base are as they were" in line)
    for piece in (f"torch {TORCH}", f"megatron-core {MEGATRON}", f"transformer-engine {ENGINE}", "apex 0.1", kept):
        assert piece in line
    assert int(line.split()[1]) > 40
    assert "omegaconf 2.2.0 of the base is replaced: the project wants >=2.3" in done.stdout
    assert "the cluster's pieces are all there. No GPU is seen here" in done.stdout + done.stderr
    with buildah.container(NGC) as name:
        script = (
            "import torch, coalm_nemo as c, typer; print(torch.__version__, torch.__file__, c.__file__, typer.__file__)"
        )
        version, torch, project, typer = buildah.run(name, "python", "-c", script, user=ANYBODY).stdout.split()
    assert version == TORCH and torch.startswith("/usr/local/lib") and typer.startswith("/opt/venv")
    assert project == "/opt/coalm_nemo/coalm_nemo/__init__.py"


@pytest.mark.parametrize(
    ("piece", "sentence"),
    [
        ("transformer_engine", "Transformer Engine is missing: GPU training and FP8 need it."),
        ("apex", "Apex is missing"),
    ],
)
def test_a_base_without_a_piece_stops_the_build(buildah: Buildah, ngc_base: str, piece: str, sentence: str) -> None:
    tag = f"{NGC_BASE}-without-{piece.replace('_', '-')}"
    folders = {"transformer_engine": "transformer_engine*", "apex": "apex*"}[piece]
    (buildah.directory / "Without").write_text(
        f"FROM {ngc_base}\nRUN rm -r /usr/local/lib/python3*/dist-packages/{folders}\n"
    )
    buildah(
        "bud", "--isolation", "chroot", "--tag", tag, "--file", f"{buildah.directory}/Without", str(buildah.directory)
    )
    done = buildah.build(f"{NGC}-without", tag, check=False)
    assert done.returncode
    assert sentence in done.stdout + done.stderr
    assert "install: `coalm doctor --expect-cluster` finds the image wanting (above)" in done.stdout + done.stderr


def test_enroots_steps_build_the_same(buildah: Buildah, ngc_base: str) -> None:
    """What slurm/build_image.sh hands to `enroot start`, in the same base."""
    command = ["bash", "slurm/build_image.sh", "--dry-run", "--with", "enroot", f"{buildah.directory}/out.sqsh"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    steps = shlex.split(next(line for line in lines if "enroot start" in line))[-1]
    volumes = tuple(buildah.volumes[1::2])
    with buildah.container(ngc_base) as name:
        where = (*volumes, f"{ROOT}:/source:ro", f"{buildah.pip_conf}:/run/secrets/pip.conf:ro")
        done = buildah.run(name, "bash", "-c", steps, volumes=where)
        assert f"torch {TORCH}" in done.stdout and "the cluster's pieces are all there" in done.stderr
        hidden = buildah.run(name, "sh", "-c", "ls -A /opt/coalm_nemo /opt/coalm_nemo/slurm").stdout.split()
    assert "install.py" not in hidden and "cluster.env" not in hidden and ".git" not in hidden and "README.md" in hidden


def numpy_version() -> str:
    return next(
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("numpy==")
    ).split("==")[1]
