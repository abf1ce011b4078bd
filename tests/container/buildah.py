"""buildah as root without a daemon or namespaces (chroot), with a store of its own that is thrown away."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
Done = subprocess.CompletedProcess[str]


class Buildah:
    """Images and containers in one directory. Builds reach the index as this machine's pip does."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.words = [
            "buildah",
            "--root",
            f"{directory}/store",
            "--runroot",
            f"{directory}/run",
            "--storage-driver",
            "vfs",
        ]
        self.pip_conf, self.volumes = pip_settings(directory)

    def __call__(self, *words: str, check: bool = True) -> Done:
        done = subprocess.run([*self.words, *words], cwd=ROOT, capture_output=True, text=True, check=False)
        if check and done.returncode:
            raise AssertionError(f"buildah {' '.join(words)}\n{done.stdout[-6000:]}\n{done.stderr[-3000:]}")
        return done

    def build(
        self, tag: str, base: str, *words: str, context: Path = ROOT, file: str = "Dockerfile", check: bool = True
    ) -> Done:
        """An image of one layer: the vfs driver copies the whole file system a layer."""
        options = [
            "--isolation",
            "chroot",
            "--network",
            "host",
            "--secret",
            f"id=pip.conf,src={self.pip_conf}",
            *self.volumes,
        ]
        options += ["--build-arg", f"BASE={base}", "--tag", tag, "--file", str(context / file), *words]
        return self("bud", *options, str(context), check=check)

    def debian(self, tag: str) -> None:
        """Debian 12 with Python 3.11 and pip, from this machine's mirror."""
        tree = self.directory / "debian"
        command = ["debootstrap", "--variant=minbase", "--include=python3,python3-pip,python3-venv,ca-certificates"]
        done = subprocess.run([*command, "bookworm", str(tree), *mirror()], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:]
        (self.directory / "Dockerfile").write_text(
            "FROM scratch\nCOPY debian /\nENV PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin\n"
        )
        self("bud", "--isolation", "chroot", "--tag", tag, str(self.directory))

    @contextmanager
    def container(self, image: str) -> Iterator[str]:
        name = self("from", image).stdout.strip()
        try:
            yield name
        finally:
            self("rm", name)

    def run(
        self, container: str, *command: str, user: str = "", volumes: tuple[str, ...] = (), check: bool = True
    ) -> Done:
        options = ["--isolation", "chroot", "--network", "host", *(["--user", user] if user else [])]
        for volume in volumes:
            options += ["--volume", volume]
        return self("run", *options, container, "--", *command, check=check)


def mirror() -> list[str]:
    """Where this machine gets Debian's packages; nothing where that cannot be seen: debootstrap then uses its own."""
    for source in (Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list")):
        for line in source.read_text().splitlines() if source.exists() else []:
            words = line.split()
            if words[:1] in (["URIs:"], ["deb"]) and (address := next((w for w in words if "://" in w), None)):
                return [address]
    return []


def pip_settings(directory: Path) -> tuple[Path, list[str]]:
    """This machine's pip settings as one file, and the files and folders that they name as volumes of a build."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found: dict[str, list[str]] = {}
    for line in lines:
        key, _, value = line.partition("=")
        words = found.setdefault(key.split(".")[-1], [])
        words += [word for word in value.strip("'\"").replace("\\n", " ").split() if word not in words]
    keep = {
        key: found[key]
        for key in ("index-url", "extra-index-url", "find-links", "cert", "timeout", "trusted-host")
        if key in found
    }
    file = directory / "pip.conf"
    file.write_text("[global]\n" + "".join(f"{key} = {' '.join(words)}\n" for key, words in keep.items()))
    paths = [word.removeprefix("file://") for words in keep.values() for word in words]
    there = sorted({mount_of(Path(path)) for path in paths if path.startswith("/") and Path(path).exists()})
    return file, [word for path in there for word in ("--volume", f"{path}:{path}:ro")]


def mount_of(path: Path) -> str:
    """A folder of simple/ pages refers to the files beside it: its parent is what is needed."""
    return str(path.parent if path.name == "simple" else path)


@contextmanager
def throwaway() -> Iterator[Buildah]:
    """Deleted at the end, whatever happened: an image is gigabytes."""
    with tempfile.TemporaryDirectory(prefix="coalm_buildah.") as directory:
        yield Buildah(Path(directory))
