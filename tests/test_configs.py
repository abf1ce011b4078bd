"""Every YAML file of the repository loads into the typed configuration it is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from coalm_nemo.data.build_config import load_build_config

CONFIGS = Path(__file__).parents[1] / "configs"
DATA = sorted((CONFIGS / "data").glob("*.yaml"))


@pytest.mark.parametrize("path", DATA, ids=lambda p: p.stem)
def test_data_configs(path: Path) -> None:
    config = load_build_config(path, [], [], tokenizer="t")
    entries = config.entries()
    assert entries
    assert all("${" not in e.source.path for e in entries)


def test_the_mix_is_the_papers() -> None:
    """Rows of table 1 of arXiv 2502.08820; together the released 311,639."""
    entries = load_build_config(CONFIGS / "data" / "coalm_it.yaml", [], [], tokenizer="t").entries()
    weights = {e.name: e.weight for e in entries}
    assert weights == {"snips": 13_084, "hammer": 202_500, "toolace": 13_819, "cra": 82_236}
    assert sum(e.weight or 0 for e in entries) == 311_639


@pytest.mark.parametrize(
    ("name", "left"),
    [("tod", {"hammer", "toolace", "cra"}), ("la", {"snips", "cra"}), ("cra", {"snips", "hammer", "toolace"})],
)
def test_ablations_leave_one_kind_out(name: str, left: set[str]) -> None:
    config = load_build_config(CONFIGS / "data" / f"coalm_it_without_{name}.yaml", [], [], tokenizer="t")
    assert set(config.sources) == left
