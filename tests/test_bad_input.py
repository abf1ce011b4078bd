"""Bad input through the real command: one clear sentence, exit code 2, and nothing half-written."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from coalm_nemo import cli
from coalm_nemo.checkpoint.layout import write_manifest
from coalm_nemo.errors import EXIT_USER_ERROR
from tests.tiny_llama import CHAT_TEMPLATE, make_tiny_llama

LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_PROCID",
    "LOCAL_WORLD_SIZE",
)
GOOD_ROW = {"instruction": "Repeat.", "input": "red cat", "output": "red cat"}
HALF_WRITTEN = ("*.partial*", ".*partial*", ".random-*", "step_*", "base-*", "*.distcp", "metrics.jsonl")


@dataclass(frozen=True)
class Desk:
    """A test's own directory with a sound model and sound rows, which the test then spoils."""

    path: Path
    model: Path
    capture: pytest.CaptureFixture[str]

    @property
    def run_dir(self) -> Path:
        return self.path / "run"

    @property
    def out(self) -> Path:
        return self.path / "out"

    def rows(self, *rows: Any) -> Path:
        return self.file("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows or (GOOD_ROW,)))

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def edit_config(self, **changes: Any) -> None:
        path = self.model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def train(self, *words: str, rows: Path | None = None) -> list[str]:
        """Arguments of a run that would be sound."""
        data = rows or self.rows()
        sound = [
            f"run.dir={self.run_dir}",
            f"model.hf_path={self.model}",
            f"data.train={data}",
            "train.steps=1",
            "batch.global_size=1",
        ]
        return ["train", *sound, "run.platform=cpu", *words]

    def refused(self, words: list[str], sentence: str) -> None:
        """`coalm WORDS` says `sentence` (a pattern), exits with 2 and leaves nothing behind."""
        code, error = run_here(words, self.capture)
        self.check(code, error, sentence)

    def check(self, code: int, error: str, sentence: str) -> None:
        lines = error.strip().splitlines()
        assert len(lines) == 1, error
        assert re.match(r"coalm( train)?: ", lines[0]) and "Traceback" not in error
        assert re.search(sentence, lines[0]), lines[0]
        assert code == EXIT_USER_ERROR
        left = [str(p) for pattern in HALF_WRITTEN for p in [*self.run_dir.rglob(pattern), *self.path.glob(pattern)]]
        assert not left
        assert not (self.out / "config.json").exists() and not (self.out / "coalm.json").exists()


def run_here(words: list[str], capture: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The command in this process; its exit code and standard error. Its environment variables do not outlive it."""
    environment, arguments = dict(os.environ), sys.argv
    sys.argv = ["coalm", *words]
    capture.readouterr()
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = arguments
        os.environ.clear()
        os.environ.update(environment)
    return int(ended.value.code or 0), capture.readouterr().err


def run_apart(words: list[str], **options: Any) -> tuple[int, str]:
    """The command in a process of its own: for what would change this one (megatron on CPU, resource limits)."""
    command = [sys.executable, "-W", "ignore", "-m", "coalm_nemo.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)
    return done.returncode, done.stderr


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def sound_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("sound") / "model", num_layers=4, shards=2)


@pytest.fixture
def desk(tmp_path: Path, sound_model: Path, capsys: pytest.CaptureFixture[str]) -> Desk:
    return Desk(tmp_path, Path(shutil.copytree(sound_model, tmp_path / "model")), capsys)


# A model directory that is not one. Each case is refused by `convert import`, and by `train` in the same words.

Spoil = Callable[[Desk], object]


def shard(desk: Desk, number: int = 1) -> Path:
    return desk.model / f"model-0000{number}-of-00002.safetensors"


def cut_shard(desk: Desk) -> None:
    content = shard(desk).read_bytes()
    shard(desk).write_bytes(content[: len(content) // 2])


def edit_index(desk: Desk, name: str, file: str) -> None:
    path = desk.model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][name] = file
    path.write_text(json.dumps(index))


def edit_tensors(desk: Desk, edit: Callable[[dict[str, Any]], object]) -> None:
    """Make the weights one file, with a change."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(shard(desk, 1)) | load_file(shard(desk, 2))
    edit(tensors)
    for path in desk.model.glob("model*"):
        path.unlink()
    save_file(tensors, desk.model / "model.safetensors")


def pickles_only(desk: Desk) -> None:
    for path in desk.model.glob("model*"):
        path.unlink()
    (desk.model / "pytorch_model.bin").write_bytes(b"pickle")


def replace_model(desk: Desk, content: str | None) -> None:
    shutil.rmtree(desk.model)
    if content is not None:
        desk.model.write_text(content)


EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"
YARN = {"rope_type": "yarn", "factor": 4.0}
MODELS: dict[str, tuple[Spoil, str]] = {
    "missing directory": (lambda d: replace_model(d, None), "is not a directory; give a Hugging Face Llama directory"),
    "not a directory": (lambda d: replace_model(d, "a file"), "is not a directory"),
    "no config.json": (lambda d: (d.model / "config.json").unlink(), "config.json is missing"),
    "config.json not JSON": (lambda d: (d.model / "config.json").write_text("{"), "config.json is not valid JSON"),
    "config.json not UTF-8": (lambda d: (d.model / "config.json").write_bytes(b'{"a": "\xff"}'), "not valid JSON"),
    "config.json a list": (lambda d: (d.model / "config.json").write_text("[]"), "does not hold a JSON object"),
    "not Llama": (lambda d: d.edit_config(model_type="mistral"), "'mistral' model; only Llama"),
    "layers not a number": (lambda d: d.edit_config(num_hidden_layers="4"), "num_hidden_layers must be a positive int"),
    "epsilon not a number": (lambda d: d.edit_config(rms_norm_eps="small"), "rms_norm_eps must be a number"),
    "theta not a number": (lambda d: d.edit_config(rope_scaling=None, rope_theta="big"), "rope_theta must be a number"),
    "rope type": (lambda d: d.edit_config(rope_scaling=YARN), "RoPE scaling 'yarn' is not supported"),
    "rope incomplete": (lambda d: d.edit_config(rope_scaling={"rope_type": "llama3"}), "RoPE scaling lacks factor"),
    "biases": (lambda d: d.edit_config(attention_bias=True), "biases are not supported"),
    "quantised": (lambda d: d.edit_config(quantization_config={"bits": 4}), "quantised checkpoint"),
    "pickles only": (pickles_only, "pickles only .*convert them to safetensors"),
    "truncated shard": (cut_shard, "model-00001-of-00002.safetensors is cut off"),
    "index outside": (lambda d: edit_index(d, NORM, "../x.safetensors"), "'../x.safetensors', which is outside"),
    "index names a missing shard": (lambda d: shard(d).unlink(), "00001-of-00002.safetensors, which is missing"),
    "index places a tensor wrongly": (lambda d: edit_index(d, EMBEDDING, shard(d, 2).name), f"places {EMBEDDING} in"),
    "missing tensor": (lambda d: edit_tensors(d, lambda t: t.pop(NORM)), f"lacks the tensor {NORM}"),
    "wrong shape": (lambda d: edit_tensors(d, lambda t: t.update({NORM: t[NORM][:8].clone()})), r"has shape \[8\]"),
    "wrong dtype": (lambda d: edit_tensors(d, lambda t: t.update({NORM: t[NORM].double()})), "dtype F64; only"),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("verb", ["import", "train"])
def test_bad_model(desk: Desk, case: str, verb: str) -> None:
    spoil, sentence = MODELS[case]
    rows = desk.rows()
    spoil(desk)
    importing = ["convert", "import", "--hf", str(desk.model), "--out", str(desk.out)]
    desk.refused(importing if verb == "import" else desk.train(rows=rows), sentence)


# A tokenizer or a chat template that training cannot use.


def remove_tokenizer(desk: Desk) -> None:
    for path in [*desk.model.glob("*token*"), *desk.model.glob("chat_template*")]:
        path.unlink()


def set_template(desk: Desk, template: str) -> None:
    (desk.model / "chat_template.jinja").write_text(template)


TOKENIZERS: dict[str, tuple[Spoil, str]] = {
    "no tokenizer": (remove_tokenizer, "has no usable tokenizer|tokenizer.json is missing"),
    "damaged tokenizer": (lambda d: (d.model / "tokenizer.json").write_text("{}"), "has no usable tokenizer"),
    "no chat template": (lambda d: (d.model / "chat_template.jinja").unlink(), "no chat template; add chat_template"),
    "template looks ahead": (lambda d: set_template(d, "{{ messages | length }}" + CHAT_TEMPLATE), "as a continuation"),
    "template without an end": (lambda d: set_template(d, CHAT_TEMPLATE.replace("<|eot_id|>", "")), "would never stop"),
    "template that fails": (lambda d: set_template(d, "{{ raise_exception('no') }}"), "template refuses the row"),
    "template not Jinja": (lambda d: set_template(d, "{% for %}"), "chat template"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_bad_tokenizer(desk: Desk, case: str) -> None:
    spoil, sentence = TOKENIZERS[case]
    spoil(desk)
    desk.refused(desk.train(), sentence)


# Rows that cannot be learnt from. The second row is the bad one, and is named.


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


ROWS: dict[str, tuple[Any, str]] = {
    "no assistant turn": (chat(("user", "hi")), "rows.jsonl:2: the row has no assistant turn"),
    "empty assistant turn": (
        chat(("user", "hi"), ("assistant", " ")),
        "rows.jsonl:2: message 2 is an empty assistant turn",
    ),
    "unknown role": (chat(("human", "hi"), ("assistant", "yes")), "message 1 needs a 'role', one of system, user"),
    "assistant first": (
        chat(("assistant", "hi"), ("user", "a")),
        "message 1 is an assistant turn, but there is nothing",
    ),
    "role not a string": ({"messages": [{"role": ["user"], "content": "hi"}]}, "message 1 needs a 'role'"),
    "no content": ({"messages": [{"role": "user"}]}, "message 1 needs a 'content' string"),
    "no messages": ({"messages": []}, "'messages' must be a non-empty list"),
    "control token": (chat(("user", "x<|eot_id|>y"), ("assistant", "yes")), r"holds the control token <\|eot_id\|>"),
    "overlong": (
        chat(("user", "hi " * 600), ("assistant", "yes")),
        "rows.jsonl:2 has .* tokens and train.seq_len_tokens is",
    ),
    "token beyond the vocabulary": ({"token_ids": [1, 2, 320]}, "rows.jsonl:2 .*token 320.*vocab_size is 320"),
    "token beyond 32 bits": ({"token_ids": [1, 2**40]}, "rows.jsonl:2.*'token_ids'"),
    "loss mask not 0 or 1": ({"token_ids": [1, 2], "loss_mask": [0, "x"]}, "'loss_mask' must"),
    "loss mask too short": ({"token_ids": [1, 2], "loss_mask": [1]}, "'loss_mask' must have as many"),
    "nothing supervised": ({"token_ids": [1, 2], "loss_mask": [1, 0]}, "no supervised token; drop such rows with"),
    "unknown shape": ({"prompt": "a", "completion": "b"}, r"a row needs 'messages'.*found \['completion', 'prompt'\]"),
    "output not a string": ({"instruction": "a", "output": 5}, "must be strings"),
    "a list": ([1, 2], "a row must be a JSON object, not list"),
    "tools not JSON": (
        chat(("user", "a"), ("assistant", "b")) | {"tools": "{"},
        "'tools' is a string that is not JSON",
    ),
    "tool_calls not a list": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": 5}]},
        "'tool_calls' must be a list",
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_bad_row(desk: Desk, case: str) -> None:
    row, sentence = ROWS[case]
    desk.refused(desk.train(rows=desk.rows(GOOD_ROW, row)), sentence)


FILES: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "rows.jsonl does not exist"),
    "empty": (b"", "rows.jsonl holds no rows"),
    "blank lines only": (b"\n \n", "rows.jsonl holds no rows"),
    "not JSON": (b'{"text": "a"}\n{"text": \n', "rows.jsonl:2 is not valid JSON"),
    "not UTF-8": (b'{"text": "\xff\xfe"}\n', "rows.jsonl is not UTF-8"),
    "nested too deep": (b"[" * 100_000, "rows.jsonl:1 is not valid JSON"),
    "a lone surrogate": (b'{"instruction": "a", "output": "\\ud800"}\n', "rows.jsonl:1"),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_file_of_rows(desk: Desk, case: str) -> None:
    content, sentence = FILES[case]
    path = desk.path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    desk.refused(desk.train(rows=path), sentence)


def test_no_file_of_rows(desk: Desk) -> None:
    desk.refused(
        ["train", f"run.dir={desk.run_dir}", f"model.hf_path={desk.model}", "batch.global_size=1"], "give data.train="
    )


def test_no_model(desk: Desk) -> None:
    desk.refused(["train", f"run.dir={desk.run_dir}", f"data.train={desk.rows()}"], "give model.hf_path=HF_DIR")


# Settings. Those that a number of ranks decides are checked before any rank is started.

SETTINGS: dict[str, tuple[list[str], str]] = {
    "unknown key": (["train.step=5"], "unknown key 'train.step'.*did you mean 'train.steps'"),
    "unknown section": (["nonsense.zzz=5"], "unknown key.*sections are run, model"),
    "a section as a key": (["train=5"], "unknown key 'train'"),
    "wrong type": (["train.steps=many"], "train.steps cannot be 'many'"),
    "not key=value": (["train.steps"], "'train.steps' is not of the form key=value"),
    "value not YAML": (["train.steps=[1"], "the value is not valid YAML"),
    "unknown recipe": (["--recipe", "coalm_tinny"], "no recipe is called 'coalm_tinny'; did you mean 'coalm_tiny'"),
    "missing YAML": (["--config", "/nowhere/run.yaml"], "/nowhere/run.yaml does not exist"),
    "unknown choice": (["schedule.name=cosin"], "schedule.name is 'cosin'; use one of constant, linear, cosine"),
    "negative": (["optimizer.lr=-1"], "optimizer.lr is -1.0; it must not be negative"),
    "not finite": (["optimizer.lr=.nan"], "optimizer.lr is nan"),
    "zero": (["batch.micro_size=0"], "batch.micro_size is 0; it must be at least 1"),
    "FP8": (["precision.dtype=fp8"], "use one of fp32, bf16, fp8_current, fp8_blockwise, fp8_delayed"),
    "FP8 without Transformer Engine": (["precision.dtype=fp8_current"], "needs Transformer Engine on an FP8 GPU"),
    "tensor parallel against heads": (["--nproc", "3", "parallel.tensor=3"], "4 attention heads do not divide"),
    "tensor parallel against groups": (["--nproc", "4", "parallel.tensor=4"], "2 key/value groups do not divide"),
    "layers against pipeline": (["--nproc", "3", "parallel.pipeline=3"], "4 layers do not divide"),
    "layers against PP x VP": (
        ["--nproc", "2", "parallel.pipeline=2", "parallel.virtual_pipeline=4"], "virtual_pipeline = 8; change them"),
    "virtual without pipeline": (["parallel.virtual_pipeline=2"], "virtual_pipeline above 1 needs parallel.pipeline"),
    "ranks": (["--nproc", "3", "parallel.tensor=2"], "3 ranks do not divide.*start a multiple of 2 ranks"),
    "alone for two ranks": (["parallel.tensor=2"], r"1 rank does not divide.*start a multiple of 2 ranks \(--nproc\)"),
    "batch": (["--nproc", "2", "batch.global_size=3"], "batch.global_size=3 does not divide"),
    "interleaved micro-batches": (
        ["--nproc", "2", "parallel.pipeline=2", "parallel.virtual_pipeline=2"], "global_size a multiple of 2"),
    "longer than the model": (["train.seq_len_tokens=1024"], "above the model's 512 positions"),
    "length against CP": (["--nproc", "2", "parallel.context=2", "train.seq_len_tokens=510"], "does not divide by 4"),
    "packing": (["data.packing=true", "batch.micro_size=2", "batch.global_size=2"], "wants batch.micro_size=1"),
    "gather without the optimizer": (
        ["parallel.overlap_param_gather=true", "parallel.distributed_optimizer=false"], "distributed_optimizer=true"),
    "no length": (["train.steps=0", "train.epochs=0"], "set one of them"),
    "warm-up": (["schedule.warmup_steps=2"], r"schedule.warmup_steps \(2\) is above train.steps \(1\)"),
    "validation rows missing": (["data.validation=/nowhere.jsonl"], "/nowhere.jsonl does not exist"),
    "run.dir below a file": (["run.dir=/dev/null/run"], "/dev/null/run"),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_bad_setting(desk: Desk, case: str) -> None:
    words, sentence = SETTINGS[case]
    desk.refused(desk.train(*words), sentence)


@pytest.mark.parametrize("case", ["tensor parallel against heads", "batch", "unknown key"])
def test_a_dry_run_refuses_the_same(desk: Desk, case: str) -> None:
    words, sentence = SETTINGS[case]
    desk.refused(desk.train("--dry-run", *words), sentence)
    assert not desk.run_dir.exists()


YAMLS = {
    "bad YAML": (b"train: [1", "is not valid YAML"),
    "not UTF-8": (b"train:\n  steps: '\xff'", "is not valid YAML"),
    "no sections": (b"- 1\n- 2\n", "must hold sections"),
    "unknown key": (b"optimizer:\n  learning_rate: 1\n", "unknown key 'optimizer.learning_rate' in .*run.yaml"),
    "a section of text": (b"train: fast\n", "unknown key 'train'"),
}


@pytest.mark.parametrize("case", YAMLS)
def test_bad_yaml(desk: Desk, case: str) -> None:
    content, sentence = YAMLS[case]
    desk.refused(desk.train("--config", str(desk.file("run.yaml", content))), sentence)


def test_cuda_without_a_gpu(desk: Desk) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    desk.refused(desk.train("run.platform=cuda"), "torch sees no GPU; use run.platform=cpu")


def test_nproc_inside_torchrun(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    desk.refused(desk.train("--nproc", "2"), "--nproc 2 inside a torchrun launch of 2 ranks; leave --nproc out")


def test_launcher_variables_that_are_no_numbers(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "first", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    desk.refused(desk.train(), "RANK='first'")


# Checkpoints and conversion.


@pytest.fixture(scope="module")
def sound_checkpoint(sound_model: Path) -> Path:
    from coalm_nemo.checkpoint.convert import import_checkpoint

    out = sound_model.parent / "ckpt"
    import_checkpoint(sound_model, out)
    return out


@pytest.fixture
def checkpoint(desk: Desk, sound_checkpoint: Path) -> Path:
    return Path(shutil.copytree(sound_checkpoint, desk.path / "ckpt"))


def exporting(desk: Desk, ckpt: Path, *words: str) -> list[str]:
    return ["convert", "export", "--ckpt", str(ckpt), "--out", str(desk.out), *words]


def test_export_from_what_is_no_checkpoint(desk: Desk) -> None:
    desk.refused(exporting(desk, desk.path), "has no hf/config.json")
    desk.refused(exporting(desk, desk.path, "--hf-base", str(desk.model)), "not a Megatron distributed checkpoint")
    desk.refused(exporting(desk, desk.path / "nothing"), "is not a directory; give a Megatron checkpoint")


def test_export_over_a_directory_that_is_not_empty(desk: Desk, checkpoint: Path) -> None:
    desk.out.mkdir()
    (desk.out / "precious.txt").write_text("mine")
    desk.refused(exporting(desk, checkpoint), "exists and is not empty")
    assert [p.name for p in desk.out.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--dtype=int8", "'int8' is not known"),
        ("--max-memory=4GiB/s", "'4GiB/s' is not a size"),
        ("--max-memory=1", "is too low"),
    ],
)
def test_bad_options_of_an_export(desk: Desk, checkpoint: Path, option: str, sentence: str) -> None:
    desk.refused(exporting(desk, checkpoint, option), sentence)


def test_verify_of_what_is_no_checkpoint(desk: Desk) -> None:
    words = ["convert", "verify", "--hf", str(desk.model), "--ckpt", str(desk.path), "--no-logits"]
    desk.refused(words, "not a Megatron distributed checkpoint")


def starting_from(desk: Desk, ckpt: Path) -> list[str]:
    return desk.train("model.hf_path=", f"model.checkpoint={ckpt}")


def test_train_from_a_torn_checkpoint(desk: Desk, checkpoint: Path) -> None:
    largest = max(checkpoint.glob("*.distcp"), key=lambda p: p.stat().st_size)
    os.truncate(largest, 1000)
    desk.refused(exporting(desk, checkpoint), f"{largest.name} has 1000 bytes instead of")
    largest.rename(desk.path / "elsewhere.bin")
    code, error = run_here(starting_from(desk, checkpoint), desk.capture)
    desk.check(code, error, f"{largest.name} is missing, though manifest.json lists it")


def test_train_from_a_directory_that_is_no_checkpoint(desk: Desk) -> None:
    desk.refused(starting_from(desk, desk.model), "is not a checkpoint of `coalm convert import`")


def test_train_from_a_checkpoint_with_a_flipped_byte(desk: Desk, checkpoint: Path) -> None:
    largest = max(checkpoint.glob("*.distcp"), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    code, error = run_apart(starting_from(desk, checkpoint))
    desk.check(code, error, f"{largest.name} is corrupt: its SHA-256 is not the one in manifest.json")


class Intruder:
    """Pickled into a checkpoint's metadata, it would make a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


def test_nothing_in_a_checkpoint_is_run(desk: Desk, checkpoint: Path) -> None:
    mark = desk.path / "was-here"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Intruder(mark)))
    write_manifest(checkpoint)
    code, error = run_apart(starting_from(desk, checkpoint))
    desk.check(code, error, "metadata")
    assert not mark.exists()


# No room on the disk.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of a given size."""
    place = tmp_path / "disk"
    mounted = False

    def mount(size: str) -> Path:
        nonlocal mounted
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as e:
            pytest.skip(f"no mount command: {e}")
        if done.returncode:
            pytest.skip(f"mounting is not permitted: {done.stderr.strip()}")
        mounted = True
        return place

    yield mount
    if mounted:
        subprocess.run(["umount", str(place)], check=True)


def test_no_room_for_an_import(desk: Desk, small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("200k")
    words = ["convert", "import", "--hf", str(desk.model), "--out", str(disk / "ckpt")]
    desk.refused(words, "has 205 kB free; .* are needed")
    assert not list(disk.iterdir())


def test_no_room_for_an_export(desk: Desk, checkpoint: Path, small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("200k")
    desk.refused(["convert", "export", "--ckpt", str(checkpoint), "--out", str(disk / "hf")], "free; .* are needed")
    assert not list(disk.iterdir())


def test_no_room_for_the_tokens(desk: Desk, small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("16k")
    rows = desk.rows(*[GOOD_ROW] * 500)
    desk.refused(desk.train(f"run.dir={disk / 'run'}", rows=rows), "could not be written")
    assert not [p for p in disk.rglob("*") if p.is_file()]


def test_no_room_for_the_side_files(desk: Desk, small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("1100k")
    (desk.model / "LICENSE").write_text("x" * 500_000)
    desk.refused(desk.train(f"run.dir={disk / 'run'}"), "could not be written|cannot be written|No space")
    assert not list(disk.rglob("*.partial*"))


def test_no_room_for_a_checkpoint(desk: Desk, small_disk: Callable[[str], Path]) -> None:
    """Training goes on past saves that do not fit; only the last one is an error."""
    run = small_disk("1m") / "run"
    words = desk.train(f"run.dir={run}", "train.steps=3", "checkpoint.save_interval_steps=1")
    code, error = run_apart(words)
    assert code == 2 and "step 3 cannot be saved" in error and "are needed" in error
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    assert not list((run / "checkpoints").glob("*"))


def limit_files_to(size: int) -> Callable[[], None]:
    def limit() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


@pytest.mark.parametrize("verb", ["import", "export", "train", "train from random weights"])
def test_a_write_that_fails_half_way(desk: Desk, checkpoint: Path, verb: str) -> None:
    """A limit on the size of a file stands for a disk that fills up after the room was asked for."""
    shutil.move(checkpoint, checkpoint := desk.path / "whole")
    words, room = {
        "import": (["convert", "import", "--hf", str(desk.model), "--out", str(desk.out)], 300_000),
        "export": (exporting(desk, checkpoint), 300_000),
        "train": (desk.train(rows=desk.rows(*[GOOD_ROW] * 500)), 20_000),
        "train from random weights": (desk.train("model.init=random"), 300_000),
    }[verb]
    code, error = run_apart(words, preexec_fn=limit_files_to(room))
    desk.check(code, error, "could not be written: file too large|could not be written: a write was cut short")
