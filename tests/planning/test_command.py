"""`coalm plan` as a user and as a script see it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coalm_nemo.config import RunConfig, build_config
from coalm_nemo.errors import UserError
from coalm_nemo.planning.command import PlanRequest, layout_of, make_job, plan_command
from coalm_nemo.planning.explain import PARTS
from coalm_nemo.planning.job import PROJECTIONS, Layout
from coalm_nemo.planning.shapes import SHAPES, find_shape
from coalm_nemo.validate import check_run
from recipes import load_recipe

KEYS = {"tensor", "pipeline", "virtual_pipeline", "context", "micro_batch", "tokens_per_s_per_gpu", "memory_gb",
        "bubble_fraction", "step_s"}  # fmt: skip
RECORD = "tensor=8,pipeline=8,context=2,virtual_pipeline=8"


def plan(capsys: pytest.CaptureFixture[str], **words: Any) -> list[dict[str, Any]]:
    plan_command(PlanRequest(**words), as_json=True)
    return json.loads(capsys.readouterr().out)


def test_json_is_a_list_best_first(capsys: pytest.CaptureFixture[str]) -> None:
    listed = plan(capsys, model="405b", gpus=128)
    rates = [one["tokens_per_s_per_gpu"] for one in listed]
    assert len(listed) == 10
    assert rates == sorted(rates, reverse=True)
    for one in listed:
        assert one.keys() >= KEYS
        assert one["fits"]
        assert one["memory_gb"] <= one["memory_worst_gb"]


def test_one_layout_is_the_published_run(capsys: pytest.CaptureFixture[str]) -> None:
    (one,) = plan(
        capsys, model="405b", gpus=2048, layout=RECORD, task="pretrain", precision="fp8", seq_len_tokens=8192,
        global_batch=1152, micro_batch=1,
    )  # fmt: skip
    assert one["tokens_per_s_per_gpu"] == pytest.approx(324.3, rel=0.05)
    assert one["memory_gb"] == pytest.approx(52.5, rel=0.05)
    assert one["micro_batches"] == 72


def test_a_layout_that_does_not_fit_is_shown_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    (one,) = plan(capsys, model="405b", gpus=64, layout="tensor=8,pipeline=8")
    assert not one["fits"]
    assert "more than there is" in one["why"]


def test_the_page_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    plan_command(PlanRequest(model="70b", gpus=32), top=3)
    page = capsys.readouterr().out
    assert "TP4" in page
    assert "arithmetic" in page
    assert "slower" in page


def test_a_recipe_fills_in_what_the_words_leave_open() -> None:
    run = RunConfig()
    run.model.hf_path = "meta-llama/Llama-3.1-70B-Instruct"
    run.batch.global_size, run.train.seq_len_tokens, run.precision.dtype = 96, 2048, "bf16"
    job = make_job(PlanRequest(gpus=32), run)
    assert (job.name, job.global_batch, job.seq_len_tokens, job.precision, job.task) == ("70b", 96, 2048, "bf16", "sft")
    assert make_job(PlanRequest(gpus=32, precision="fp8", method="lora"), run).adapted == set(PROJECTIONS)
    assert make_job(PlanRequest(gpus=32, task="lora"), run).lora_targets == "qkv"
    run.parallel.tensor, run.parallel.pipeline, run.precision.fp8_params = 4, 2, True
    assert layout_of(run) == Layout(
        4, 2, gradient_bytes=4, overlap_grad_reduce=False, overlap_param_gather=False, tensor_overlap=False
    )


def test_a_lora_recipe_is_planned_as_one() -> None:
    run = RunConfig()
    run.model.shape, run.precision.dtype = "70b", "fp8_current"
    run.lora.rank, run.lora.targets = 8, ["q", "v"]
    job = make_job(PlanRequest(gpus=8), run)
    assert (job.task, job.lora_rank, job.adapted, job.precision) == ("lora", 8, {"q", "v"}, "fp8")
    run.lora.targets = ["q", "k", "v", "o", "gate", "up", "down"]
    assert make_job(PlanRequest(gpus=8), run).adapted == set(PROJECTIONS)
    assert make_job(PlanRequest(gpus=8, method="full"), run).task == "sft"
    assert make_job(PlanRequest(gpus=8, task="pretrain"), run).task == "pretrain"


def test_a_model_by_name_or_by_its_config(tmp_path: Path) -> None:
    for name in ("8b", "8B", "Llama-3.1-8B-Instruct", "meta-llama/Meta-Llama-3-8B"):
        assert find_shape(name)[1] == SHAPES["8b"]
    values = {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128,
              "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 512}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    for path in (tmp_path, tmp_path / "config.json"):
        assert find_shape(str(path))[1].num_layers == 4


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ({"model": "9b", "gpus": 8}, "no model '9b'"),
        ({"model": "", "gpus": 8}, "no model ''"),
        ({"model": "8b", "gpus": 0}, "--gpus is 0"),
        ({"model": "8b", "gpus": 8, "gpu": "a100"}, "--gpu a100"),
        ({"model": "8b", "gpus": 8, "task": "rlhf"}, "--task rlhf"),
        ({"model": "8b", "gpus": 8, "method": "dora"}, "--method dora"),
        ({"model": "8b", "gpus": 8, "method": "full", "task": "lora"}, "do not agree"),
        ({"model": "8b", "gpus": 8, "precision": "int4"}, "--precision int4"),
        ({"model": "8b", "gpus": 8, "precision": "fp8_emulated_current"}, "--precision fp8_emulated_current"),
        ({"model": "8b", "gpus": 8, "layout": "tensor=16"}, "not legal"),
        ({"model": "8b", "gpus": 8, "seq_len_tokens": 4097}, "no layout of 8b is legal on 8 .*tokens do not divide"),
        (
            {"model": "8b", "gpus": 8, "layout": "distributed_optimizer=false"},
            "FP8 parameters need the distributed optimizer",
        ),
        ({"model": "405b", "gpus": 16}, "no layout of 405b fits on 16"),
        ({"model": "8b", "gpus": 7, "global_batch": 5}, "no layout of 8b is legal"),
    ],
)
def test_bad_input_is_one_sentence(words: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=part) as caught:
        plan_command(PlanRequest(**words))
    assert "\n" not in str(caught.value)


def test_a_picture_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_command(PlanRequest(model="8b", gpus=8), top=2, picture=tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_shows_memory_by_stage_and_time_by_cause(capsys: pytest.CaptureFixture[str]) -> None:
    """Every stage of the best layout with its reserve told apart; the parts of a line add up to its total."""
    plan_command(PlanRequest(model="405b", gpus=128), top=1)
    out = capsys.readouterr().out
    table = out[out.index("by part and pipeline stage") :].splitlines()[2:18]
    for stage, line in enumerate(table):
        number, *parts, total, spare = map(float, line.split())
        assert (number, len(parts)) == (stage, len(PARTS))
        assert sum(parts) == pytest.approx(total, abs=0.06 * len(parts))
        assert total + spare == pytest.approx(79.1, abs=0.11)
    assert "matrix products" in out and "GPUh" in out


def test_json_has_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    (one,) = plan(capsys, model="405b", gpus=128, layout="tensor=8,pipeline=16,moment_bytes=2")
    assert list(one["memory_stages_gb"]) == [str(r) for r in range(16)]
    assert one["memory_stages_gb"][str(one["memory_worst_stage"])] == one["memory_parts_gb"]
    assert {"nccl", "fragmentation", "cuda"} < one["memory_parts_gb"].keys()


@pytest.mark.parametrize("context", [1, 2, 4, 8])
def test_a_written_layout_is_a_run_that_checks(
    context: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Context parallelism cuts rows into 2 x its size, which packs are rounded to."""
    run = load_recipe("coalm_8b")
    words = PlanRequest(16, layout=f"tensor=2,context={context}")
    plan_command(words, run, write=tmp_path / "new" / "layout.yaml")
    made = build_config(load_recipe("coalm_8b"), [tmp_path / "new" / "layout.yaml"], [])
    assert check_run(made, SHAPES["8b"], 16).world_size == 16
    assert made.parallel.context == context
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["layout.yaml"]


def test_planning_imports_nothing_heavy() -> None:
    script = """
import sys
from coalm_nemo.planning.command import PlanRequest, plan_command
plan_command(PlanRequest(model="405b", gpus=128), as_json=True)
sys.exit(str([m for m in ("torch", "megatron", "numpy", "matplotlib", "transformers") if m in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"
