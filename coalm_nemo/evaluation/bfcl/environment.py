"""The environment that BFCL's package lives in: its pins fit no other, so it gets a venv of its own.

python -m coalm_nemo.evaluation.bfcl.environment --dir ENV --release v3
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

from coalm_nemo.errors import EXIT_USER_ERROR, UserError

RELEASES = {
    "v3": ("bfcl-eval==2025.7.17", "soundfile"),  # the last release with V3's data; it imports soundfile undeclared
    # torch first, as in our own environment: sentence-transformers would draw in any build
    "v4": ("torch==2.13.0", "bfcl-eval==2026.3.23", "soundfile"),
}
_CHECK = "import bfcl_eval.constants.model_config; from importlib.metadata import version; print(version('bfcl-eval'))"


def default_directory(release: str) -> Path:
    """Below the user's cache directory."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "coalm_nemo" / f"bfcl-{release}"


def find_python(directory: Path, release: str) -> Path:
    """The environment's interpreter. Raises UserError, which says how to make the environment, where there is none."""
    python = directory / "bin" / "python"
    if not python.exists() or not (directory / "lib").is_dir():
        raise UserError(
            f"BFCL {release} needs an environment of its own and there is none in {directory}; make it with: "
            f"python -m coalm_nemo.evaluation.bfcl.environment --dir {directory} --release {release}"
        )
    return python


def prepare(directory: Path, release: str) -> Path:
    """Make the environment where it is missing or unfinished (V3: 500 MB, V4: 2 GB). Raises UserError where pip fails."""
    python, ready = directory / "bin" / "python", directory / "ready"
    packages = RELEASES[release]
    if python.exists() and ready.exists() and ready.read_text() == " ".join(packages):
        return python
    venv.create(directory, with_pip=True, clear=True)
    for package in packages:
        _run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", package], directory)
    _run([python, "-c", _CHECK], directory)
    aside = ready.with_suffix(".partial")
    aside.write_text(" ".join(packages))
    os.replace(aside, ready)
    return python


def _run(command: list[str | Path], directory: Path) -> None:
    # The package makes directories for results and scores as it is imported, beside itself unless told where.
    environment = os.environ | {"BFCL_PROJECT_ROOT": str(directory)}
    done = subprocess.run([str(c) for c in command], env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise UserError(f"the BFCL environment in {directory} could not be made: {reason}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m coalm_nemo.evaluation.bfcl.environment", description=__doc__)
    parser.add_argument("--release", choices=sorted(RELEASES), default="v3")
    parser.add_argument("--dir", type=Path, help="default: below the user's cache directory")
    arguments = parser.parse_args()
    directory = (arguments.dir or default_directory(arguments.release)).expanduser().absolute()
    try:
        print(prepare(directory, arguments.release))
    except UserError as e:
        print(e, file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
