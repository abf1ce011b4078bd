"""What importing the package costs: heavy libraries are imported by the functions that need them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "coalm_nemo"
HEAVY = ("torch", "megatron", "transformers", "transformer_engine", "triton", "wandb")
OPTIONAL = ("transformer_engine", "apex", "amp_C", "flash_attn", "nemo", "nemo_toolkit")
CHECKPOINT = [
    f"coalm_nemo.checkpoint.{p.stem}" for p in sorted((PACKAGE / "checkpoint").glob("*.py")) if p.stem[0] != "_"
]
LIGHT = {
    "cli": ["coalm_nemo.cli"],
    "config": ["coalm_nemo.config"],
    "validate": ["coalm_nemo.validate"],
    "doctor": ["coalm_nemo.doctor"],
    "recipes": ["recipes.coalm_tiny"],
    "the dry run": ["coalm_nemo.training.command", "coalm_nemo.training.ranks", "coalm_nemo.training.prepare"],
    "checkpoint": CHECKPOINT,
}


@pytest.mark.parametrize("group", LIGHT)
def test_light_modules_import_nothing_heavy(group: str) -> None:
    script = f"""
import importlib, sys
for name in {LIGHT[group]}: importlib.import_module(name)
print([m for m in {HEAVY} if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_no_module_needs_an_optional_package(path: Path) -> None:
    assert not [name for name in top_level_imports(path) if name.split(".")[0] in OPTIONAL]


def top_level_imports(path: Path) -> list[str]:
    """Names that importing the module imports; not those inside functions or under TYPE_CHECKING."""
    found: list[str] = []
    todo: list[ast.AST] = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo += list(ast.iter_child_nodes(node))
    return found


def test_the_search_finds_what_it_looks_for(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "try:\n  import apex\nexcept ImportError: pass\nclass A:\n  from nemo import x\ndef f():\n  import amp_C\n"
    )
    assert sorted(top_level_imports(path)) == ["apex", "nemo"]
