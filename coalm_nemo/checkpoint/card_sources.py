"""Where a model card's facts come from: the export itself, the checkpoint that it was made from, and that one's run.

A training checkpoint is RUN/checkpoints/step_N. Beside it lie RUN/run.yaml (the resolved recipe), RUN/metrics.jsonl, and,
where somebody scored the model, RUN/scores.json. The data's manifest is found through run.yaml. Nothing has to be there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from coalm_nemo.checkpoint.card_license import known_model, license_by
from coalm_nemo.checkpoint.inspect_command import model_line
from coalm_nemo.checkpoint.layout import HF_SUBDIR, CheckpointInfo, read_info
from coalm_nemo.checkpoint.model_card import CardInfo
from coalm_nemo.errors import UserError
from coalm_nemo.models.llama import LlamaConfig, parse_llama_config

RUN_FILE = "run.yaml"
METRICS_FILE = "metrics.jsonl"
SCORES_FILE = "scores.json"
DATA_MANIFEST = "manifest.json"


def collect_card_info(out_dir: Path, ckpt: Path | None = None, name: str = "") -> CardInfo:
    """Everything that the files tell. `name` is the model's, where the directory's is not (yet) what it should be."""
    out_dir = Path(out_dir)
    config, checkpoint = _read_json(out_dir / "config.json"), _checkpoint_info(ckpt)
    quantization = config.pop("quantization_config", None) or {}
    cfg = _llama(config)
    run_dir = _run_directory(ckpt)
    run = _read_yaml(run_dir / RUN_FILE) if run_dir else {}
    model_section: dict[str, Any] = run["model"] if isinstance(run.get("model"), dict) else {}
    sources = [str(config.get("_name_or_path") or ""), checkpoint.source if checkpoint else ""]
    sources += [str(model_section.get(key) or "") for key in ("hf_path", "checkpoint")]
    base = known_model(*sources, *_earlier_sources(model_section))
    step = checkpoint.step if checkpoint and checkpoint.kind == "training" else None
    return CardInfo(
        name=name or out_dir.resolve().name,
        base_model=base,
        model=model_line(cfg) if cfg else "",
        dtype=str(config.get("dtype") or config.get("torch_dtype") or ""),
        quantization=str(quantization.get("format") or ""),
        license=license_by(base, cfg),
        license_files=tuple(sorted(p.name for pattern in ("LICENSE*", "USE_POLICY*") for p in out_dir.glob(pattern))),
        step=step,
        coalm_version=checkpoint.coalm_version if checkpoint else "",
        created=checkpoint.created if checkpoint else "",
        run=_without_paths(run),
        data_fingerprint=checkpoint.data_fingerprint if checkpoint else "",
        data=_data_manifest(run),
        metrics=last_metrics(run_dir / METRICS_FILE, step) if run_dir and step else {},
        scores=dict(_flat(_read_json(run_dir / SCORES_FILE))) if run_dir else {},
        end_ids=_end_ids(out_dir),
        has_chat_template=_has_chat_template(out_dir),
    )


def _checkpoint_info(ckpt: Path | None) -> CheckpointInfo | None:
    with suppress(UserError):
        return read_info(Path(ckpt)) if ckpt else None
    return None


def _run_directory(ckpt: Path | None) -> Path | None:
    """RUN of RUN/checkpoints/step_N."""
    parent = Path(ckpt).resolve().parent if ckpt else None
    return parent.parent if parent is not None and parent.name == "checkpoints" else None


def _earlier_sources(model_section: Mapping[str, Any]) -> Iterator[str]:
    """The Hugging Face directory that the run's Megatron base was imported from."""
    base = model_section.get("checkpoint")
    if base:
        info = _checkpoint_info(Path(str(base)))
        yield info.source if info else ""
        yield str(_read_json(Path(str(base)) / HF_SUBDIR / "config.json").get("_name_or_path") or "")


def _llama(config: dict[str, Any]) -> LlamaConfig | None:
    with suppress(UserError):
        return parse_llama_config(config)
    return None


def _data_manifest(run: Mapping[str, Any]) -> dict[str, Any]:
    data = run.get("data")
    train = str(data.get("train") or "") if isinstance(data, dict) else ""
    manifest = _read_json(Path(train) / DATA_MANIFEST) if train else {}
    return manifest if "content_sha256" in manifest else {}


def last_metrics(path: Path, step: int) -> dict[str, float]:
    """Loss, validation loss and tokens up to `step`; lines after it belong to a later checkpoint."""
    found: dict[str, float] = {}
    tokens = supervised = 0
    for line in _json_lines(path):
        if not isinstance(line.get("step"), int) or line["step"] > step:
            continue
        if "lm_loss" in line:
            found["loss of the last step"] = line["lm_loss"]
            tokens, supervised = tokens + line.get("tokens", 0), supervised + line.get("supervised_tokens", 0)
        if "validation_loss" in line:
            found["validation loss"] = line["validation_loss"]
    return found | {name: n for name, n in (("tokens", tokens), ("supervised tokens", supervised)) if n}


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # the last line of a killed run may be torn
                if isinstance(line := json.loads(text), dict):
                    yield line


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of nested dictionaries, named by their path; right / total / percent becomes the percentage alone."""
    if isinstance(value, dict) and "percent" in value:
        yield f"{prefix} (percent)", value["percent"]
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}, {key}" if prefix else str(key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield prefix, value


def _end_ids(out_dir: Path) -> tuple[int, ...]:
    ids = _read_json(out_dir / "generation_config.json").get("eos_token_id")
    return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)


def _has_chat_template(out_dir: Path) -> bool:
    files = ("chat_template.jinja", "chat_template.json")
    return any((out_dir / f).is_file() for f in files) or bool(
        _read_json(out_dir / "tokenizer_config.json").get("chat_template")
    )


def _without_paths(value: Any) -> Any:
    """Absolute paths reduced to their last part: where things lay on one machine is nobody else's business."""
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items()}
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def _read_yaml(path: Path) -> dict[str, Any]:
    """A mapping; empty where the file is not there or holds something else."""
    import yaml

    with suppress(OSError, yaml.YAMLError, UnicodeDecodeError):
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    return {}


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is not there or holds something else."""
    with suppress(OSError, ValueError):
        value = json.loads(path.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    return {}
