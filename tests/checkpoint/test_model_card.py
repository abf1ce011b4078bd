from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from llama_405b import CONFIG
from tiny_llama import make_tiny_llama

from coalm_nemo.checkpoint.card_license import known_model, license_by, license_note, license_of
from coalm_nemo.checkpoint.card_sources import collect_card_info, last_metrics
from coalm_nemo.checkpoint.layout import CheckpointInfo, write_info
from coalm_nemo.checkpoint.model_card import CardInfo, card_lines, write_model_card
from coalm_nemo.checkpoint.quantize import quantize_directory
from coalm_nemo.config import RunConfig, to_yaml
from coalm_nemo.models.llama import parse_llama_config

MANIFEST = {
    "kind": "coalm-shards",
    "content_sha256": "b38b2ee2",
    "supervised_tokens": 824051,
    "blend": {"sgd": {"rows": 82236, "tokens": 59704782}, "chat": {"rows": 7, "tokens": 100}},
}
METRICS = [
    {"step": 1, "lm_loss": 2.5, "tokens": 1000, "supervised_tokens": 200},
    {"step": 2, "lm_loss": 1.25, "tokens": 900, "supervised_tokens": 150},
    {"step": 2, "validation_loss": 1.5},
    {"step": 3, "lm_loss": 0.5, "tokens": 900, "supervised_tokens": 150},
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run from Llama-3.1-8B-Instruct, saved at step 2; gives its checkpoint."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set/manifest.json").write_text(json.dumps(MANIFEST))
    config = RunConfig()
    config.run.dir, config.data.train = str(tmp_path / "run"), str(tmp_path / "set")
    config.model.hf_path = "/models/Llama-3.1-8B-Instruct"
    config.parallel.tensor, config.train.steps, config.batch.global_size = 4, 3, 128
    ckpt = tmp_path / "run/checkpoints/step_00000002"
    ckpt.mkdir(parents=True)
    (tmp_path / "run/run.yaml").write_text(to_yaml(config))
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in METRICS) + '{"step": 3, "lm')
    (tmp_path / "run/scores.json").write_text(
        json.dumps({"words": {"calls": {"percent": 98.8, "right": 9}}, "jga": 0.5})
    )
    write_info(
        ckpt, CheckpointInfo("training", 2, "bfloat16", str(tmp_path / "run/hf"), "0.1.0", data_fingerprint="f1")
    )
    return ckpt


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "CoALM-8B", dtype="bfloat16")


def front_matter(card: str) -> dict[str, Any]:
    _, head, _ = card.split("---\n", 2)
    parsed = yaml.safe_load(head)
    assert isinstance(parsed, dict)
    return parsed


def test_the_card_of_a_run(run: Path, export: Path) -> None:
    assert write_model_card(export, collect_card_info(export, run)) == export / "README.md"
    card = (export / "README.md").read_text()
    head = front_matter(card)
    assert head["license"] == "llama3.1"
    assert head["base_model"] == ["meta-llama/Llama-3.1-8B-Instruct"]
    assert (head["library_name"], head["pipeline_tag"]) == ("transformers", "text-generation")
    assert "tool-calling" in head["tags"]
    for text in (
        "# CoALM-8B",
        "| Steps | 2 of 3 |",
        "| Layout | tensor 4, sequence parallel |",
        "| Learning rate | 1e-05, cosine to 0.0, warm-up 0.1 of all steps |",
        "| Batch | 128 sequences a step |",
        "`b38b2ee2`",
        "| sgd | 82,236 | 59,704,782 |",
        "| loss of the last step | 1.25 |",
        "| validation loss | 1.5 |",
        "| tokens | 1,900 |",
        "| words, calls (percent) | 98.8 |",
        "Built with Llama",
        'does not begin with "Llama"',
        "apply_chat_template",
    ):
        assert text in card, text


def test_no_path_of_this_machine_is_told(run: Path, export: Path, tmp_path: Path) -> None:
    card = write_model_card(export, collect_card_info(export, run)).read_text()
    assert str(tmp_path) not in card
    assert "/models" not in card
    fence = "```yaml\n"
    told = yaml.safe_load(card[card.index(fence) + len(fence) :].split("```")[0])
    assert told["data"]["train"] == "set"
    assert told["model"]["hf_path"] == "Llama-3.1-8B-Instruct"


def test_what_is_not_known_is_left_out(export: Path) -> None:
    card = write_model_card(export, collect_card_info(export)).read_text()
    head = front_matter(card)
    assert head["license"] == "other"
    assert "base_model" not in head
    for text in ("## Training", "## Data", "## Metrics", "## Scores", "run.yaml", "None", "Built with Llama"):
        assert text not in card, text
    assert "was not trained further" in card or "were not trained further" in card


@pytest.mark.parametrize(
    "missing", ["run.yaml", "metrics.jsonl", "scores.json", "checkpoints/step_00000002/coalm.json"]
)
def test_any_file_of_the_run_may_be_missing(run: Path, export: Path, missing: str) -> None:
    (run.parents[1] / missing).unlink()
    card = "\n".join(card_lines(collect_card_info(export, run)))
    assert "None" not in card
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "transformers"


@pytest.mark.parametrize("content", ["", "[1]", "{", "\x00"])
def test_a_torn_file_of_the_run_is_as_good_as_none(run: Path, export: Path, content: str) -> None:
    for name in ("run.yaml", "metrics.jsonl", "scores.json", "checkpoints/step_00000002/coalm.json"):
        (run.parents[1] / name).write_text(content)
    info = collect_card_info(export, run)
    assert (info.run, info.metrics, info.scores, info.step) == ({}, {}, {}, None)
    assert list(card_lines(info))


def test_an_fp8_export_says_so(export: Path, tmp_path: Path) -> None:
    quantize_directory(export, tmp_path / "fp8")
    info = collect_card_info(tmp_path / "fp8", name="Llama-CoALM-FP8")
    card = "\n".join(card_lines(info))
    assert "pip install compressed-tensors" in card
    assert "compressed-tensors" in front_matter(card + "\n")["tags"]
    assert 'path = "Llama-CoALM-FP8"' in card


def test_end_ids_and_a_missing_chat_template(export: Path) -> None:
    (export / "generation_config.json").write_text(json.dumps({"eos_token_id": [128001, 128008, 128009]}))
    (export / "chat_template.jinja").unlink()
    card = "\n".join(card_lines(collect_card_info(export)))
    assert "128001, 128008, 128009" in card
    assert "apply_chat_template" not in card


def test_metrics_stop_at_the_checkpoints_step(run: Path) -> None:
    assert last_metrics(run.parents[1] / "metrics.jsonl", 1) == {
        "loss of the last step": 2.5,
        "tokens": 1000,
        "supervised tokens": 200,
    }


def test_licences_by_name() -> None:
    assert known_model("", "/data/Meta-Llama-3.1-405B-Instruct/") == "meta-llama/Llama-3.1-405B-Instruct"
    assert known_model("meta-llama/Llama-3.3-70B-Instruct") == "meta-llama/Llama-3.3-70B-Instruct"
    assert known_model("mistral", "/x/llama") == ""
    assert license_by("meta-llama/Llama-3.3-70B-Instruct", None) == "llama3.3"
    assert license_by("", None) == ""


def test_licences_by_shape() -> None:
    big = parse_llama_config(CONFIG)
    assert license_by("", big) == "llama3.1"
    assert license_by("", replace(big, vocab_size=32000)) == ""
    seventy = replace(big, num_layers=80, hidden_size=8192, ffn_size=28672)
    assert license_by("", seventy) == ""  # 3.1 and 3.3 have this shape


def test_the_name_of_a_licence_that_the_hub_knows() -> None:
    assert [license_of(name) for name in ("llama3.1", "", "gpl")] == ["llama3.1", "other", "other"]
    assert "does not begin" not in "\n".join(license_note("llama3.3", "Llama-CoALM-70B", []))
    assert "`LICENSE`" in "\n".join(license_note("", "x", ["LICENSE"]))
    assert "other" in "\n".join(card_lines(CardInfo(name="x", license_files=("LICENSE",))))
