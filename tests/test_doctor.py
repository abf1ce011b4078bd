"""`coalm doctor` on this machine, and on machines that are pretended."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from coalm_nemo import doctor
from coalm_nemo.cluster_pieces import missing_pieces
from coalm_nemo.diagnosis import BROKEN, FOUND, MISSING, Finding, Gpu, Torch

H100 = Gpu("NVIDIA H100 80GB HBM3", 79.6, (9, 0))
A100 = Gpu("NVIDIA A100-SXM4-80GB", 79.3, (8, 0))
ROWS = (
    "Python", "torch", "megatron-core", "transformers", "other packages", "Transformer Engine", "Apex", "flash-attn",
    "NeMo toolkit", "NCCL", "GPUs", "SLURM", "W&B", "CPU, memory, disk",
)  # fmt: skip
ABILITIES = ["demo", "conversion", "CPU training", "GPU training", "FP8", "SLURM submission"]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


class Machine:
    """This machine, with packages added, removed or broken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
        self.patch = monkeypatch
        self.directory = directory
        self.versions: dict[str, str | None] = {}
        self.modules: dict[str, ModuleSpec | None] = {}
        version, find_spec = importlib.metadata.version, importlib.util.find_spec
        monkeypatch.setattr(importlib.metadata, "version", lambda name: self._version(name, version))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: self._spec(name, find_spec))
        monkeypatch.setattr(doctor, "import_error", lambda name: "")

    def _version(self, name: str, original: Callable[[str], str]) -> str:
        if name not in self.versions:
            return original(name)
        if (found := self.versions[name]) is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    def _spec(self, name: str, original: Callable[[str], Any]) -> Any:
        return self.modules[name] if name in self.modules else original(name)

    def without(self, distribution: str, module: str) -> None:
        self.versions[distribution] = self.modules[module] = None

    def install(self, distribution: str, version: str, module: str, *folders: str) -> None:
        place = self.directory / module
        for folder in ("", *folders):
            (place / folder).mkdir(parents=True)
            (place / folder / "__init__.py").touch()
        spec = ModuleSpec(module, None, is_package=True)
        spec.submodule_search_locations = [str(place)]
        self.versions[distribution], self.modules[module] = version, spec

    def torch(self, **facts: Any) -> None:
        self.patch.setattr(doctor, "look_at_torch", lambda: Torch(**({"version": "2.13.0"} | facts)))

    def finding(self, name: str) -> Finding:
        return next(f for f in doctor.diagnose().findings if f.name == name)

    def can(self) -> dict[str, bool]:
        return {a.name: a.can for a in doctor.diagnose().abilities}


def test_the_real_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "coalm_nemo.cli", "doctor"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(name in done.stdout for name in (*ROWS, *ABILITIES))
    assert "Traceback" not in done.stderr


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.doctor_command(as_json=True) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is True
    assert [f["name"] for f in answer["findings"]] == list(ROWS)
    assert [a["name"] for a in answer["abilities"]] == ABILITIES
    for found in answer["findings"]:
        assert found["meaning"] and (found["state"] == FOUND or found["remedy"])


def test_only_torch_is_imported() -> None:
    script = """
import sys
from coalm_nemo.doctor import diagnose
diagnose()
print([m for m in ("megatron.core", "transformers", "wandb", "pyarrow", "matplotlib") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("distribution", "module"), [("megatron-core", "megatron"), ("transformers", "transformers")])
def test_something_required_is_missing(machine: Machine, distribution: str, module: str) -> None:
    machine.without(distribution, module)
    found = machine.finding(distribution)
    assert found.state == MISSING and found.stops_us and "pip install" in found.remedy
    assert doctor.doctor_command(as_json=False) == 1
    assert machine.can()["demo"] is machine.can()["CPU training"] is False


def test_a_small_package_is_missing(machine: Machine) -> None:
    machine.versions["psutil"] = None
    assert machine.finding("other packages").meaning == "missing: psutil"
    assert not doctor.diagnose().ok


def test_torch_that_does_not_load(machine: Machine) -> None:
    machine.torch(error="OSError: libcudart.so.12: cannot open shared object file")
    found = machine.finding("torch")
    assert found.state == BROKEN and "libcudart.so.12" in found.meaning
    assert doctor.doctor_command(as_json=False) == 1


def test_a_broken_torch_is_one_line(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def fail() -> int:
        raise RuntimeError("driver mismatch\nsecond line")

    monkeypatch.setattr(torch.cuda, "device_count", fail)
    assert doctor.look_at_torch().error == "RuntimeError: driver mismatch"


def test_torch_is_not_there(machine: Machine) -> None:
    machine.modules["torch"] = None
    assert doctor.look_at_torch() == Torch()
    assert machine.finding("torch").state == MISSING


def test_a_version_that_is_not_wanted(machine: Machine) -> None:
    machine.versions["megatron-core"] = "0.12.0"
    found = machine.finding("megatron-core")
    assert (found.state, found.version, found.meaning) == (BROKEN, "0.12.0", "coalm_nemo wants ==0.16.*")
    assert "megatron-core==0.16.*" in found.remedy


def test_metadata_without_files(machine: Machine) -> None:
    machine.modules["transformers"] = None
    assert "its files are not" in machine.finding("transformers").meaning


def test_a_finder_that_raises_is_a_finding(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ValueError(f"{name}.__spec__ is None\nmore")

    monkeypatch.setattr(importlib.util, "find_spec", fail)
    machine.torch()
    found = machine.finding("megatron-core")
    assert found.state == BROKEN and found.meaning.endswith("ValueError: megatron.__spec__ is None")


def test_the_other_apex(machine: Machine) -> None:
    machine.install("apex", "0.9.10.dev0", "apex", "lib")
    found = machine.finding("Apex")
    assert found.state == BROKEN and found.remedy == "pip uninstall apex"
    assert "another package of that name on PyPI" in found.meaning
    assert doctor.diagnose().ok


def test_apex_without_its_extensions(machine: Machine) -> None:
    machine.install("apex", "0.1", "apex", "multi_tensor_apply")
    assert "no amp_C" in machine.finding("Apex").meaning


def test_nvidia_apex(machine: Machine) -> None:
    machine.install("apex", "0.1", "apex", "multi_tensor_apply")
    machine.install("amp_C", "0.1", "amp_C")
    assert machine.finding("Apex").state == FOUND


def test_a_gpu_without_transformer_engine(machine: Machine) -> None:
    machine.torch(cuda="12.8", nccl="2.27.5", gpus=(H100, H100))
    assert machine.finding("GPUs").version == "2"
    assert "compute capability 9.0: FP8 capable" in machine.finding("GPUs").meaning
    assert machine.finding("NCCL").meaning == "ranks talk over NCCL"
    assert machine.finding("Transformer Engine").state == MISSING
    assert machine.can()["GPU training"] is False and machine.can()["CPU training"] is True


def test_a_gpu_with_everything(machine: Machine) -> None:
    machine.torch(cuda="12.8", nccl="2.27.5", gpus=(H100,))
    machine.install("transformer-engine", "2.12", "transformer_engine")
    machine.install("flash-attn", "2.8", "flash_attn")
    assert machine.can()["GPU training"] is True
    assert machine.finding("flash-attn").meaning == "used by Transformer Engine"


def test_transformer_engine_that_does_not_load(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.torch(cuda="12.8", gpus=(H100,))
    machine.install("transformer-engine", "2.12", "transformer_engine")
    monkeypatch.setattr(doctor, "import_error", lambda name: "ImportError: undefined symbol: _ZN3c10")
    found = machine.finding("Transformer Engine")
    assert found.state == BROKEN and "undefined symbol" in found.meaning
    assert machine.can()["GPU training"] is False


def test_no_fp8_before_ada(machine: Machine) -> None:
    machine.torch(cuda="12.8", gpus=(A100,))
    machine.install("transformer-engine", "2.12", "transformer_engine")
    assert "no FP8 (needs 8.9)" in machine.finding("GPUs").meaning
    assert machine.can()["FP8"] is False


def test_import_error_is_the_first_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_package.py").write_text("raise ImportError('libx.so: no\\nmore')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert doctor.import_error("broken_package") == "ImportError: libx.so: no"
    assert doctor.import_error("json") == ""


def test_slurm(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(machine.directory))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert machine.finding("SLURM").state == MISSING
    for tool in ("sbatch", "srun"):
        (machine.directory / tool).write_text("#!/bin/sh\necho slurm 24.05.1\n")
        (machine.directory / tool).chmod(0o755)
    assert machine.finding("SLURM").version == "24.05.1"
    assert machine.can()["SLURM submission"] is True
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert machine.finding("SLURM").meaning.endswith("inside allocation 77")


def test_wandb(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.versions["wandb"] = "0.31.0"
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setenv("NETRC", str(machine.directory / "netrc"))
    assert "not logged in" in machine.finding("W&B").meaning
    (machine.directory / "netrc").write_text("machine api.wandb.ai\n  login user\n  password none\n")
    os.chmod(machine.directory / "netrc", 0o600)
    assert machine.finding("W&B").meaning.startswith("logged in")
    machine.versions["wandb"] = None
    assert machine.finding("W&B").state == MISSING


NGC_TORCH = {"version": "2.10.0a0+b4e4ee81d3.nv25.12", "cuda": "13.1", "nccl": "2.28.9"}


def cluster(machine: Machine, **torch: Any) -> None:
    """What NVIDIA's image has."""
    machine.torch(**NGC_TORCH | torch)
    machine.install("transformer-engine", "2.12.0+5671fd36", "transformer_engine")
    machine.install("apex", "0.1", "apex", "multi_tensor_apply")
    machine.install("amp_C", "0.1", "amp_C")


def test_a_laptop_is_told_each_piece_of_a_cluster(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.torch()
    for distribution, module in (("transformer-engine", "transformer_engine"), ("apex", "apex")):
        machine.without(distribution, module)
    assert doctor.doctor_command(as_json=False, expect_cluster=True) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines] == [
        "NCCL is missing",
        "Transformer Engine is missing",
        "Apex is missing",
    ]
    assert all(line.startswith("coalm doctor: ") and line.endswith(".") for line in lines)
    assert doctor.doctor_command(as_json=False) == 0


def test_a_clusters_image_without_a_gpu(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    cluster(machine)
    assert doctor.doctor_command(as_json=False, expect_cluster=True) == 0
    assert "No GPU is seen here, so none was loaded" in capsys.readouterr().err


def test_a_clusters_node(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    cluster(machine, gpus=(H100,) * 8)
    assert doctor.doctor_command(as_json=False, expect_gpus=8) == 0
    assert capsys.readouterr().err == "coalm doctor: the cluster's pieces are all there, and load.\n"
    assert doctor.doctor_command(as_json=True, expect_gpus=9) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is False and len(answer["missing"]) == 1
    assert answer["missing"][0].startswith("torch sees 8 of 9 GPUs: NVIDIA H100")


def test_gpus_that_the_container_does_not_see(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    cluster(machine)
    assert doctor.doctor_command(as_json=False, expect_gpus=8) == 1
    assert "torch sees 0 of 8 GPUs: training runs on the CPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("distribution", "version", "sentence"),
    [
        ("transformer-engine", "2.9.0+abc", "Transformer Engine is 2.9.0+abc: coalm_nemo wants >=2.12."),
        ("megatron-core", "0.15.0", "megatron-core is broken: coalm_nemo wants ==0.16.*."),
        ("megatron-core", "0.16.0rc0+abc", ""),
    ],
)
def test_a_cluster_of_other_versions(machine: Machine, distribution: str, version: str, sentence: str) -> None:
    cluster(machine)
    machine.versions[distribution] = version
    assert missing_pieces(doctor.diagnose()) == [sentence][: bool(sentence)]


def test_a_piece_that_does_not_load(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(machine, gpus=(H100,))
    monkeypatch.setattr(doctor, "import_error", lambda name: "ImportError: undefined symbol: _ZN3c10")
    sentences = missing_pieces(doctor.diagnose())
    assert sentences[0] == "Transformer Engine is broken: ImportError: undefined symbol: _ZN3c10."
    assert [s.split(" is ")[0] for s in sentences] == ["Transformer Engine", "Apex"]


def test_a_torch_of_the_wrong_version_is_told_once(machine: Machine) -> None:
    cluster(machine, version="2.5.0a0+nv")
    assert missing_pieces(doctor.diagnose()) == ["torch is broken: coalm_nemo wants >=2.6."]
