from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from helpers import refused

from coalm_nemo.checkpoint import layout


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    directory = tmp_path / "ckpt"
    (directory / "hf").mkdir(parents=True)
    (directory / ".metadata").write_bytes(b"m" * 10)
    (directory / "__0_0.distcp").write_bytes(b"w" * 1000)
    (directory / "hf/config.json").write_text("{}")
    layout.write_info(directory, layout.CheckpointInfo("base", 0, "bfloat16", "here"))
    layout.write_manifest(directory)
    return directory


def test_a_sound_checkpoint_passes_both_checks(sealed: Path) -> None:
    layout.check_manifest(sealed, full=False)
    layout.check_manifest(sealed, full=True)
    listed = json.loads((sealed / "manifest.json").read_text())["files"]
    assert set(listed) == {".metadata", "__0_0.distcp", "hf/config.json", "coalm.json"}
    assert layout.read_info(sealed).kind == "base"


def test_known_digests_are_taken_over(sealed: Path) -> None:
    layout.write_manifest(sealed, {"__0_0.distcp": "known"})
    assert layout.read_manifest(sealed)["__0_0.distcp"] == {"bytes": 1000, "sha256": "known"}


def test_a_torn_file_is_named(sealed: Path) -> None:
    (sealed / "__0_0.distcp").write_bytes(b"w" * 999)
    with refused(r"__0_0\.distcp has 999 bytes instead of 1000"):
        layout.check_manifest(sealed, full=False)


def test_a_missing_file_is_named(sealed: Path) -> None:
    (sealed / "hf/config.json").unlink()
    with refused(r"hf/config\.json is missing"):
        layout.check_manifest(sealed, full=False)


def test_a_flipped_byte_is_found_by_the_full_check_only(sealed: Path) -> None:
    (sealed / "__0_0.distcp").write_bytes(b"w" * 999 + b"x")
    layout.check_manifest(sealed, full=False)
    with refused(r"__0_0\.distcp is corrupt"):
        layout.check_manifest(sealed, full=True)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "cannot be read"),
        ("[]", "JSON object"),
        ('{"files": {"../x": {"bytes": 1, "sha256": "0"}}}', "outside"),
        ('{"files": {"/etc/passwd": {"bytes": 1, "sha256": "0"}}}', "outside"),
        ('{"files": {"x": {"bytes": "1"}}}', "needs 'bytes'"),
        ("{}", "lists no files"),
    ],
)
def test_a_bad_manifest_is_refused(sealed: Path, content: str, sentence: str) -> None:
    (sealed / "manifest.json").write_text(content)
    with refused(sentence):
        layout.check_manifest(sealed, full=False)


def test_without_a_manifest_it_is_not_a_checkpoint(sealed: Path) -> None:
    (sealed / "manifest.json").unlink()
    with refused("manifest.json is missing"):
        layout.check_manifest(sealed, full=False)


def test_info_of_another_format_is_refused(sealed: Path) -> None:
    (sealed / "coalm.json").write_text('{"format": 99}')
    with refused("format 99"):
        layout.read_info(sealed)


def test_incomplete_info_is_refused(sealed: Path) -> None:
    (sealed / "coalm.json").write_text('{"format": 1, "kind": "base"}')
    with refused("coalm.json"):
        layout.read_info(sealed)


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    with layout.atomic_directory(tmp_path / "a/out") as partial:
        (partial / "sub").mkdir()
        (partial / "sub/file").write_text("x")
        assert not (tmp_path / "a/out").exists()
    assert (tmp_path / "a/out/sub/file").read_text() == "x"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["out"]


def test_an_empty_directory_may_be_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with layout.atomic_directory(tmp_path / "out") as partial:
        (partial / "file").write_text("x")
    assert (tmp_path / "out/file").exists()


@pytest.mark.parametrize("failure", [ValueError("bug"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(tmp_path: Path, failure: BaseException) -> None:
    with pytest.raises(type(failure)), layout.atomic_directory(tmp_path / "out") as partial:
        (partial / "file").write_text("x")
        raise failure
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    with refused("the disk is full", tmp_path), layout.atomic_directory(tmp_path / "out") as partial:
        (partial / "file").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")
    (tmp_path / "file").write_text("x")
    with refused("not empty", tmp_path), layout.atomic_directory(tmp_path / "out"):
        pass
    with refused("not a directory", tmp_path), layout.atomic_directory(tmp_path / "file"):
        pass


def test_a_parent_that_is_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with refused("could not be written", tmp_path), layout.atomic_directory(tmp_path / "file/out"):
        pass


def test_room_is_asked_for_before_writing(tmp_path: Path) -> None:
    layout.ensure_free_space(tmp_path / "not/yet/there", 1)
    with refused("GB free"):
        layout.ensure_free_space(tmp_path, 1 << 60)
