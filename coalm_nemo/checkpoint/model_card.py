"""README.md of an export: a model card of what is known about the model. What is not known is left out.

Front matter: https://huggingface.co/docs/hub/model-cards#model-card-metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coalm_nemo.checkpoint.card_license import license_note, license_of

CARD_FILE = "README.md"
_PAPER = "https://arxiv.org/abs/2502.08820"


@dataclass(frozen=True)
class CardInfo:
    """What a card can tell. Every field may be empty."""

    name: str
    base_model: str = ""
    """Name on the Hugging Face hub, where it is a known one."""
    model: str = ""
    """Shape in one line."""
    dtype: str = ""
    quantization: str = ""
    license: str = ""
    """The hub's name of the base's licence: "llama3.1", ...; empty: not known."""
    license_files: tuple[str, ...] = ()
    step: int | None = None
    coalm_version: str = ""
    created: str = ""
    run: Mapping[str, Any] = field(default_factory=dict)
    """run.yaml, paths reduced to their last part."""
    data_fingerprint: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    """The training set's manifest.json."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    end_ids: tuple[int, ...] = ()
    has_chat_template: bool = False


def write_model_card(out_dir: Path, info: CardInfo) -> Path:
    """Write `out_dir`/README.md and give its path. Raises OSError."""
    path = Path(out_dir) / CARD_FILE
    path.write_text("\n".join(card_lines(info)) + "\n", encoding="utf-8")
    return path


def card_lines(info: CardInfo) -> Iterator[str]:
    """The card, line by line."""
    yield from _front_matter(info)
    yield from ("", f"# {info.name}", "")
    yield from _what_it_is(info)
    yield from _usage(info)
    for title, lines in (
        ("Training", list(_training(info))),
        ("Data", list(_data(info))),
        ("Metrics", list(_figures("metric", info.metrics))),
        ("Scores", list(_figures("score", info.scores))),
    ):
        if lines:
            yield from ("", f"## {title}", "", *lines)
    yield from ("", "## Licence", "", *license_note(info.license, info.name, info.license_files))
    yield from _run_file(info)


def _front_matter(info: CardInfo) -> Iterator[str]:
    tags = ["llama", "tool-calling", "function-calling", "dialogue", "coalm_nemo"]
    fields: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    fields["license"] = license_of(info.license)
    if fields["license"] == "other" and info.license_files:
        fields["license_link"] = info.license_files[0]
    if info.base_model:
        fields["base_model"] = [info.base_model]
        fields["base_model_relation"] = "quantized" if info.quantization and not info.step else "finetune"
    fields["tags"] = tags + (["fp8", "compressed-tensors"] if info.quantization else [])
    yield "---"
    yield from (f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items())  # JSON is YAML
    yield "---"


def _what_it_is(info: CardInfo) -> Iterator[str]:
    base = f" [{info.base_model}](https://huggingface.co/{info.base_model})" if info.base_model else " a Llama model"
    if info.step:
        yield (
            f"Fine-tuned from{base} to hold conversations over many turns and to call tools, in the manner of "
            f"[CoALM]({_PAPER}), with `coalm_nemo`."
        )
    else:
        yield f"Converted from{base} with `coalm_nemo`; the weights were not trained further."
    facts = [
        ("Shape", info.model),
        ("Weights", info.dtype + (f", {info.quantization}" if info.quantization else "")),
        ("Written by", f"coalm_nemo {info.coalm_version}" if info.coalm_version else ""),
        ("Checkpoint of", info.created),
    ]
    if any(value for _, value in facts):
        yield from ("", *(f"- {name}: {value}" for name, value in facts if value))


def _usage(info: CardInfo) -> Iterator[str]:
    yield from ("", "## How to use", "", "```python")
    yield "from transformers import AutoModelForCausalLM, AutoTokenizer"
    yield ""
    yield f'path = "{info.name}"  # this directory'
    yield 'model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", device_map="auto")'
    yield "tokenizer = AutoTokenizer.from_pretrained(path)"
    if info.has_chat_template:
        yield 'messages = [{"role": "user", "content": "Find me a cheap restaurant in the north."}]'
        yield "options = {'add_generation_prompt': True, 'return_dict': True, 'return_tensors': 'pt'}".replace("'", '"')
        yield "inputs = tokenizer.apply_chat_template(messages, **options).to(model.device)"
    else:
        yield 'inputs = tokenizer("The weather today is", return_tensors="pt").to(model.device)'
    yield "answer = model.generate(**inputs, max_new_tokens=256)"
    yield 'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))'
    yield "```"
    if info.quantization:
        yield from (
            "",
            "The weights are FP8: `pip install compressed-tensors` first. vLLM loads the directory as it is.",
        )
    if info.end_ids:
        ids = ", ".join(map(str, info.end_ids))
        yield from ("", f"An answer ends with any of the token ids {ids}; `generation_config.json` names them.")


def _training(info: CardInfo) -> Iterator[str]:
    rows = list(_recipe_rows(info))
    if rows:
        yield from ("| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows))


def _recipe_rows(info: CardInfo) -> Iterator[tuple[str, str]]:
    """Key figures of run.yaml; `get` gives None for what it does not say."""

    def get(section: str, key: str) -> Any:
        values = info.run.get(section)
        return values.get(key) if isinstance(values, Mapping) else None

    if info.step:
        planned = get("train", "steps")
        yield "Steps", f"{info.step:,}" + (f" of {planned:,}" if planned and planned != info.step else "")
    if not info.run:
        return
    sizes = [(name, get("parallel", name)) for name in ("tensor", "pipeline", "virtual_pipeline", "context")]
    if split := ", ".join(f"{name.replace('_', ' ')} {size}" for name, size in sizes if size and size != 1):
        yield "Layout", split + (", sequence parallel" if get("parallel", "sequence") and sizes[0][1] != 1 else "")
    yield from _one("Precision", get("precision", "dtype"))
    warmup = get("schedule", "warmup_steps")
    if warmup is not None and warmup < 0:
        warmup_text = f"{get('schedule', 'warmup_ratio')} of all steps"
    else:
        warmup_text = f"{warmup} steps"
    schedule = get("schedule", "name")
    rate = get("optimizer", "lr")
    if rate is not None:
        ends = f", {schedule} to {get('optimizer', 'min_lr')}, warm-up {warmup_text}" if schedule else ""
        yield "Learning rate", f"{rate}{ends}"
    adam = [(key, get("optimizer", key)) for key in ("beta1", "beta2", "eps", "weight_decay", "clip_grad")]
    if named := ", ".join(f"{key} {value}" for key, value in adam if value is not None):
        yield "AdamW", named
    yield from _one("Batch", get("batch", "global_size"), " sequences a step")
    packed = ", rows packed side by side" if get("data", "packing") else ""
    yield from _one("Sequence length", get("train", "seq_len_tokens"), f" tokens{packed}")
    yield from _one("Seed", get("run", "seed"))


def _one(name: str, value: Any, after: str = "") -> Iterator[tuple[str, str]]:
    if value is not None and value != "":
        yield name, f"{value}{after}"


def _data(info: CardInfo) -> Iterator[str]:
    facts = [
        ("Content of the set (SHA-256 in its manifest)", info.data.get("content_sha256")),
        ("Data of the run (fingerprint)", info.data_fingerprint),
        ("Supervised tokens", info.data.get("supervised_tokens")),
    ]
    yield from (f"- {name}: `{value}`" for name, value in facts if value)
    blend = info.data.get("blend") or info.data.get("sources")
    if isinstance(blend, Mapping) and blend:
        yield from ("", "| source | rows | tokens |", "|---|---:|---:|")
        for name, figures in blend.items():
            yield f"| {name} | {figures.get('rows', 0):,} | {figures.get('tokens', 0):,} |"


def _figures(kind: str, figures: Mapping[str, float]) -> Iterator[str]:
    if figures:
        yield from (f"| {kind} | |", "|---|---:|")
        for name, value in figures.items():
            yield f"| {name} | {value:,} |" if isinstance(value, int) else f"| {name} | {value:.6g} |"


def _run_file(info: CardInfo) -> Iterator[str]:
    """The whole run.yaml, for whoever wants to do it again."""
    if info.run:
        import yaml

        text = yaml.safe_dump(dict(info.run), sort_keys=False, allow_unicode=True).rstrip()
        yield from ("", "<details><summary>run.yaml</summary>", "", "```yaml", text, "```", "", "</details>")
