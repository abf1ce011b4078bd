"""The cluster: one for the whole session, made when the first test asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, why_not


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Five nodes of four CPUs and two GPUs that are none."""
    if reason := why_not():
        pytest.skip(f"no SLURM: {reason}")
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
