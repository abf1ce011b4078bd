"""The demo's own code: the job on a user's checkpoint and rows, the picture, and the base that is shipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coalm_nemo.demo.pipeline import METRICS, NANO_BASE, SPLIT_NAMES, prepare_directory
from coalm_nemo.errors import UserError
from tests.conftest import write_rows


@pytest.mark.slow
def test_the_job_on_own_checkpoint_and_rows(tiny_llama: Path, tmp_path: Path) -> None:
    from coalm_nemo.demo.own_data import run_own_demo

    rows = write_rows(tmp_path / "rows.jsonl", 60)
    words = ["train.steps=3", "parallel.tensor=2"]
    result = run_own_demo(tiny_llama, rows, tmp_path / "out", 2, words)
    assert 1 <= len(result["items"]) <= 32
    lines = [json.loads(line) for line in (tmp_path / "out" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("validation_loss" in line for line in lines)
    assert (tmp_path / "out" / "coalm" / "model.safetensors").is_file()


def test_own_rows_that_are_too_few_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    from coalm_nemo.demo.own_data import run_own_demo

    rows = write_rows(tmp_path / "rows.jsonl", 1)
    with pytest.raises(UserError, match="too few"):
        run_own_demo(tiny_llama, rows, tmp_path / "out", 1, [])
    assert not (tmp_path / "out").exists()


def test_a_directory_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        prepare_directory(tmp_path)


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    from coalm_nemo.demo.picture import draw_result

    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"step": n, "lm_loss": 5 / n}) + "\n" for n in range(1, 50)))
    figures: dict[str, Any] = {s: {m: {"percent": 40.0} for m in METRICS} for s in SPLIT_NAMES}
    draw_result(metrics, {"before": figures, "after": figures}, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_the_shipped_base_has_the_tokenizer_that_the_world_builds() -> None:
    """Changing a phrase changes the tokenizer: then the base has to be rebuilt (`make nano-base`)."""
    from coalm_nemo.demo.tokenizer import build_tokenizer

    shipped = json.loads((NANO_BASE / "tokenizer.json").read_text())
    assert shipped["model"] == json.loads(build_tokenizer().to_str())["model"]


@pytest.mark.slow
def test_the_shipped_base_copies_from_its_context() -> None:
    """What the fine-tuning builds on: a run of random tokens, said again, is predicted."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(NANO_BASE, dtype=torch.float32).eval()
    run = torch.randint(20, model.config.vocab_size, (16, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        guessed = model(torch.cat([run, run], dim=1)).logits[:, 24:-1].argmax(-1)
    assert (guessed == run[:, 1:]).float().mean() > 0.9
