"""A conversion that is killed, stopped or disturbed at any moment: the same command ends with the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_same_weights, load_weights, refused
from safetensors.torch import save_file
from slow_convert import make_small_and_slow
from tiny_llama import make_tiny_llama

from coalm_nemo.checkpoint import import_hf, journal, planned_files, rows, streams
from coalm_nemo.checkpoint.convert import export_checkpoint, import_checkpoint
from coalm_nemo.checkpoint.torch_dist import TorchDistPlan
from coalm_nemo.errors import EXIT_STOPPED, EXIT_USER_ERROR

SLOW_CONVERT = Path(__file__).with_name("slow_convert.py")


def content(directory: Path) -> dict[str, str]:
    """SHA-256 of every file by name. The time of the conversion, which coalm.json and so its manifest tell, is left
    out."""
    found = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        data = path.read_bytes()
        if path.name == "coalm.json":
            data = json.dumps(json.loads(data) | {"created": ""}).encode()
        if path.name == "manifest.json":
            files = json.loads(data)["files"]
            files.pop("coalm.json")
            data = json.dumps(files).encode()
        found[path.relative_to(directory).as_posix()] = hashlib.sha256(data).hexdigest()
    return found


# Killed at random moments.


def convert(verb: str, source: Path, out: Path) -> list[str]:
    return [verb, "--hf" if verb == "import" else "--ckpt", str(source), "--out", str(out)]


class Killer:
    """Runs one conversion again and again, and kills it."""

    def __init__(self, words: list[str], out: Path, pace: float, piece_bytes: int) -> None:
        self.command = [sys.executable, str(SLOW_CONVERT), str(pace), str(piece_bytes), "convert", *words]
        self.out, self.partial = out, out.parent / f".{out.name}.partial"

    def finish(self) -> str:
        """Let it end; gives what it said."""
        done = subprocess.run(self.command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        assert not self.partial.exists()
        return done.stdout

    def kill_after(self, seconds: float) -> bool:
        """Gives whether the kill came before the end."""
        process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            _, error = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return True
        assert process.returncode == 0, error
        return False


def killed_again_and_again(verb: str, source: Path, out: Path, kills: int, pace: float, piece_bytes: int) -> None:
    draw = random.Random(f"{verb}{kills}")
    killer = Killer(convert(verb, source, out), out, pace, piece_bytes)
    started = time.monotonic()
    killer.finish()
    duration, whole = time.monotonic() - started, content(out)
    shutil.rmtree(out)
    inside = 0
    for _ in range(kills):
        landed = killer.kill_after(draw.uniform(0.0, duration))
        inside += landed and killer.partial.exists()
        if out.exists():  # only ever whole
            killer.finish() if killer.partial.exists() else None
            assert content(out) == whole
            shutil.rmtree(out)
    killer.finish()
    assert content(out) == whole
    assert inside >= kills // 4, "the kills did not land inside the conversion"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An HF directory of 3 MB and its checkpoint."""
    place = tmp_path_factory.mktemp("small")
    hf = make_tiny_llama(place / "hf", hidden_size=256, dtype="bfloat16", num_layers=6, shards=2)
    import_checkpoint(hf, place / "ckpt")
    return hf, place / "ckpt"


@pytest.mark.parametrize("verb", ["import", "export"])
def test_three_kills(tmp_path: Path, small: tuple[Path, Path], verb: str) -> None:
    source = small[0] if verb == "import" else small[1]
    killed_again_and_again(verb, source, tmp_path / "out", 3, 0.1, 128 << 10)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["import", "export"])
def test_twenty_kills(tmp_path: Path, verb: str) -> None:
    source = make_tiny_llama(
        tmp_path / "hf", hidden_size=1024, ffn_size=4096, num_heads=16, dtype="bfloat16", num_layers=4, shards=3
    )
    if verb == "export":
        import_checkpoint(source, tmp_path / "ckpt")
        source = tmp_path / "ckpt"
    killed_again_and_again(verb, source, tmp_path / "out", 20, 0.015, 4 << 20)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_says_that_it_can_go_on(tmp_path: Path, small: tuple[Path, Path], signum: signal.Signals) -> None:
    killer = Killer(convert("import", small[0], tmp_path / "out"), tmp_path / "out", 0.5, 128 << 10)
    process = subprocess.Popen(
        killer.command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signum, signal.SIG_DFL),  # a shell's background jobs are born deaf to Ctrl-C
    )
    wait_for(lambda: any((killer.partial / "files").glob("*.distcp")))
    process.send_signal(signum)
    output, error = process.communicate(timeout=30)
    assert (process.returncode, output) == (EXIT_STOPPED, "")
    assert error == "coalm: stopped; the same command goes on from here\n"
    assert killer.partial.exists() and not (tmp_path / "out").exists()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Stopped at a chosen moment, in this process.


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pieces, so that a small checkpoint has many."""
    monkeypatch.setattr(rows, "_LARGEST_BUFFER_BYTES", 16 << 10)
    monkeypatch.setattr(streams, "STAGE_BYTES", 16 << 10)
    monkeypatch.setattr(planned_files, "MARK_BYTES", 32 << 10)
    monkeypatch.setattr(import_hf, "MAX_CHUNK_BYTES", 32 << 10)
    monkeypatch.setitem(TorchDistPlan.__init__.__kwdefaults__, "max_file_bytes", 400 << 10)


def at_share(share: float, action: Callable[[], object]) -> Callable[[int, int], None]:
    """Progress that does something once, when that share is done."""
    todo = [action]

    def progress(done: int, total: int) -> None:
        if done >= share * total and todo:
            todo.pop()()

    return progress


def stop() -> None:
    raise KeyboardInterrupt


@pytest.fixture
def stopped(tmp_path: Path, small: tuple[Path, Path], pieces: None) -> Path:
    """An import of tmp_path/hf to tmp_path/out that was stopped half-way; gives its partial directory."""
    shutil.copytree(small[0], tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(tmp_path / "hf", tmp_path / "out", progress=at_share(0.5, stop))
    assert not (tmp_path / "out").exists()
    return tmp_path / ".out.partial"


def go_on(tmp_path: Path, notices: list[str] | None = None) -> int:
    """Finish, compare with the uninterrupted result; gives the bytes that were found."""
    notice = notices.append if notices is not None else None
    report = import_checkpoint(tmp_path / "hf", tmp_path / "out", notice=notice)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not (tmp_path / ".out.partial").exists()
    return report.found_bytes


def test_what_is_finished_is_not_done_again(tmp_path: Path, stopped: Path) -> None:
    weights = sum(t.numel() * t.element_size() for t in load_weights(tmp_path / "hf").values())
    assert 0.3 * weights < go_on(tmp_path) < 0.7 * weights


def damage_a_file(partial: Path) -> None:
    path = partial / "files/__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_a_file(partial: Path) -> None:
    os.truncate(partial / "files/__0_0.distcp", 100_000)


def lose_a_file(partial: Path) -> None:
    (partial / "files/__0_0.distcp").unlink()


def lengthen_a_file(partial: Path) -> None:
    with (partial / "files/__0_0.distcp").open("ab") as file:
        file.write(b"x" * 10_000)


def tear_the_journal(partial: Path) -> None:
    path = partial / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-20])


def garble_the_journal(partial: Path) -> None:
    path = partial / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + b"\xff\x00\n" + b"".join(lines[3:]))


def leave_half_a_manifest(partial: Path) -> None:
    (partial / "files/.manifest.json.partial").write_text("{")
    (partial / "files/hf").mkdir()
    (partial / "files/hf/config.json").write_text("{")


@pytest.mark.parametrize(
    "harm",
    [damage_a_file, cut_a_file, lose_a_file, lengthen_a_file, tear_the_journal, garble_the_journal,
     leave_half_a_manifest],
)  # fmt: skip
def test_what_is_found_is_checked(tmp_path: Path, stopped: Path, harm: Callable[[Path], None]) -> None:
    harm(stopped)
    notices: list[str] = []
    assert go_on(tmp_path, notices) > 0
    assert notices == []


def test_an_empty_journal_starts_over(tmp_path: Path, stopped: Path) -> None:
    (stopped / "journal.jsonl").write_bytes(b"")
    assert go_on(tmp_path) == 0


def test_another_source_starts_over_and_says_so(tmp_path: Path, stopped: Path) -> None:
    weights = load_weights(tmp_path / "hf")
    weights["model.norm.weight"] += 1
    for path in (tmp_path / "hf").glob("model*"):
        path.unlink()
    save_file(weights, tmp_path / "hf/model.safetensors")
    notices: list[str] = []
    report = import_checkpoint(tmp_path / "hf", tmp_path / "out", notice=notices.append)
    assert report.found_bytes == 0
    assert "starting over, as the source changed since the interrupted run" in notices[0]
    export_checkpoint(tmp_path / "out", tmp_path / "back")
    assert_same_weights(tmp_path / "hf", tmp_path / "back")


def test_other_options_start_over_and_say_so(tmp_path: Path, small: tuple[Path, Path], pieces: None) -> None:
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(small[1], tmp_path / "out", progress=at_share(0.5, stop))
    notices: list[str] = []
    export_checkpoint(small[1], tmp_path / "out", dtype="fp32", notice=notices.append)
    assert "starting over, as the options changed" in notices[0]
    assert all(t.dtype.itemsize == 4 for t in load_weights(tmp_path / "out").values())


def test_a_kill_after_the_renaming_is_tidied_up(
    tmp_path: Path, small: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(journal.shutil, "rmtree", lambda path, **_: stop() if path.name.endswith("partial") else None)
        import_checkpoint(small[0], tmp_path / "out")
    assert (tmp_path / ".out.partial").exists()
    before = content(tmp_path / "out")
    report = import_checkpoint(small[0], tmp_path / "out")
    assert report.found_bytes == report.weight_bytes
    assert content(tmp_path / "out") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    with refused("not empty", tmp_path):
        import_checkpoint(small[0], tmp_path / "out")


def test_two_at_once_are_refused(tmp_path: Path, small: tuple[Path, Path]) -> None:
    seen: list[str] = []

    def second() -> None:
        with refused("another process is writing", tmp_path):
            import_checkpoint(small[0], tmp_path / "out")
        seen.append("refused")

    import_checkpoint(small[0], tmp_path / "out", progress=at_share(0.1, second))
    assert seen == ["refused"]
    assert (tmp_path / "out/manifest.json").exists()


def test_the_number_of_workers_does_not_change_the_result(
    tmp_path: Path, small: tuple[Path, Path], pieces: None
) -> None:
    for workers in (1, 3):
        import_checkpoint(small[0], tmp_path / f"ckpt{workers}", workers=workers)
    assert content(tmp_path / "ckpt1") == content(tmp_path / "ckpt3")


def test_what_older_versions_left_is_removed_once_it_is_surely_dead(tmp_path: Path, small: tuple[Path, Path]) -> None:
    long_ago = time.time() - 10_000
    dead, fresh, alive = (tmp_path / f".out.partial-{n}" for n in (999_999_998, 999_999_999, os.getpid()))
    for path in (dead, fresh, alive):
        path.mkdir()
        (path / "file").write_text("x")
        if path != fresh:
            os.utime(path / "file", (long_ago, long_ago))
            os.utime(path, (long_ago, long_ago))
    import_checkpoint(small[0], tmp_path / "out")
    assert (dead.exists(), fresh.exists(), alive.exists()) == (False, True, True)


# Sources and disks that fail on the way: one sentence, and nothing left.


def import_is_disturbed(hf: Path, action: Callable[[], object], sentence: str) -> None:
    with refused(sentence, hf.parent):
        import_checkpoint(hf, hf.parent / "out", progress=at_share(0.3, action), workers=1)


def test_a_shard_cut_while_it_is_read(tmp_path: Path, small: tuple[Path, Path], pieces: None) -> None:
    hf = Path(shutil.copytree(small[0], tmp_path / "hf"))
    import_is_disturbed(hf, lambda: [os.truncate(p, 5000) for p in hf.glob("*.safetensors")], "ends at byte")


def test_a_shard_changed_while_it_is_read(tmp_path: Path, small: tuple[Path, Path], pieces: None) -> None:
    hf = Path(shutil.copytree(small[0], tmp_path / "hf"))
    shard = hf / "model-00001-of-00002.safetensors"
    import_is_disturbed(hf, lambda: os.utime(shard, (1, 1)), "was changed while it was read")


@pytest.mark.parametrize("workers", [1, 3])
def test_a_disk_that_fills_up_on_the_way(tmp_path: Path, small: tuple[Path, Path], pieces: None, workers: int) -> None:
    """A real file system that is full, although there was room when the conversion began."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted")
    try:
        filler = disk / "filler"
        fill = at_share(0.2, lambda: filler.write_bytes(bytes(shutil.disk_usage(disk).free)))
        with pytest.raises(Exception, match="the disk is full; nothing was left behind"):
            import_checkpoint(small[0], disk / "out", progress=fill, workers=workers)
        assert list(disk.iterdir()) == [filler]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def replace_by_another_file(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "model.safetensors"])
@pytest.mark.parametrize(
    "replace", [replace_by_fifo, replace_by_directory, replace_by_dangling_link, replace_by_another_file]
)
def test_something_else_in_place_of_a_shard(tmp_path: Path, replace: Callable[[Path], None], name: str) -> None:
    """Through the command: no hanging on a pipe, exit code 2, one sentence, nothing left."""
    hf = make_tiny_llama(tmp_path / "hf", num_layers=1, shards=2 if "of" in name else 1)
    replace(hf / name)
    ends_with_one_sentence(tmp_path, ["import", "--hf", str(hf), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("replace", [replace_by_fifo, replace_by_directory, replace_by_dangling_link])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "metadata.json", "manifest.json"])
def test_something_else_in_place_of_a_checkpoint_file(
    tmp_path: Path, small: tuple[Path, Path], replace: Callable[[Path], None], name: str
) -> None:
    ckpt = Path(shutil.copytree(small[1], tmp_path / "ckpt"))
    if name != "manifest.json":
        (ckpt / "manifest.json").unlink()
    replace(ckpt / name)
    if name == "manifest.json" and replace is replace_by_dangling_link:
        pytest.skip("as good as none")
    ends_with_one_sentence(tmp_path, ["export", "--ckpt", str(ckpt), "--out", str(tmp_path / "out")])


def ends_with_one_sentence(place: Path, words: list[str]) -> None:
    before = sorted(place.iterdir())
    command = [sys.executable, "-m", "coalm_nemo.cli", "convert", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == EXIT_USER_ERROR, done.stderr
    assert done.stderr.startswith("coalm: ") and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert sorted(place.iterdir()) == before


def test_the_partial_directory_is_not_followed_as_a_link(tmp_path: Path, small: tuple[Path, Path]) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".out.partial").symlink_to("elsewhere")
    with refused("is a symbolic link", tmp_path):
        import_checkpoint(small[0], tmp_path / "out")


def test_the_slow_command_is_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """`slow_convert` patches names that exist."""
    defaults: list[dict[str, Any]] = [TorchDistPlan.__init__.__kwdefaults__, export_checkpoint.__kwdefaults__]
    assert "max_file_bytes" in defaults[0] and "max_shard_bytes" in defaults[1]
    assert callable(make_small_and_slow)
