"""The environment of BFCL's package: `make test-bfcl` makes it; without it these tests are skipped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from coalm_nemo.errors import UserError
from coalm_nemo.evaluation.bfcl.environment import default_directory, find_python


@pytest.fixture(scope="session")
def bfcl_env() -> Path:
    directory = Path(os.environ.get("COALM_BFCL_ENV") or default_directory("v3"))
    try:
        find_python(directory, "v3")
    except UserError as e:
        pytest.skip(str(e))
    return directory
