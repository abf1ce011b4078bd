"""What `coalm data build` is told: a YAML file, `--source KIND=PATH`, and `key=value` words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from coalm_nemo.data.chat_format import FORMATS
from coalm_nemo.data.sources.base import Source
from coalm_nemo.errors import UserError

KINDS = {
    "released": ("coalm_nemo.data.sources.released", "ReleasedSource"),
    "snips": ("coalm_nemo.data.sources.snips", "SnipsSource"),
    "hammer": ("coalm_nemo.data.sources.hammer", "HammerSource"),
    "toolace": ("coalm_nemo.data.sources.toolace", "ToolAceSource"),
    "sgd": ("coalm_nemo.data.sources.sgd", "SgdSource"),
    "multiwoz": ("coalm_nemo.data.sources.multiwoz", "MultiwozSource"),
    "chat": ("coalm_nemo.data.sources.chat", "ChatSource"),
}
"""`kind` of a source -> the module and class that read it."""

REWORDED = ("sgd", "multiwoz")
"""Kinds whose thoughts and responses an endpoint may reword."""

LOSSES = ("last", "all")


@dataclass(frozen=True)
class SourceEntry:
    """One source and its place in the blend."""

    name: str
    source: Source
    loss: str
    epochs: float
    weight: float | None
    """Share of the blended rows, relative to the other sources' weights; None: `epochs` counts."""


@dataclass
class BuildConfig:
    """A whole set."""

    tokenizer: str = ""
    """Hugging Face directory of the model that will be trained."""
    template: str = "auto"
    """auto | llama3.1 | llama3. auto: what the tokenizer's chat template speaks, llama3.1 if it has none."""
    seq_len_tokens: int = 4096
    """Rows are at most this long and are packed into sequences of this length."""
    pack_multiple: int = 4
    """Row lengths are rounded up to this when packed: 2 x context parallelism's size must divide it."""
    loss: str = "last"
    """last | all: which assistant turns of a conversation are targets. A source may say otherwise for itself."""
    seed: int = 42
    against: list[str] = field(default_factory=list)
    """Files of evaluation items; rows that overlap one are dropped."""
    sources: dict[str, Any] = field(default_factory=dict)
    """Name -> kind, path, epochs or weight, loss, and the kind's own options."""

    def entries(self) -> list[SourceEntry]:
        """The sources, checked. Raises UserError for what is unknown, missing or contradictory."""
        if not self.sources:
            raise UserError("no source is given; use --source KIND=PATH or a file with --config")
        entries = [_entry(name, options, self.loss) for name, options in self.sources.items()]
        weighted = [e for e in entries if e.weight is not None]
        if weighted and len(weighted) < len(entries):
            missing = next(e.name for e in entries if e.weight is None)
            raise UserError(f"source {missing} has no weight, but others have; give all of them weights, or epochs")
        return entries


def load_build_config(file: Path | None, sources: Sequence[str], overrides: Iterable[str], **given: Any) -> BuildConfig:
    """`file`, then `--source KIND=PATH` words, `key=value` words and what the command line gives by name.

    Raises UserError for an unknown key, a wrong type, a missing file.
    """
    values = _read(file) if file else {}
    for word in sources:
        _add_source(values, word)
    for word in overrides:
        _override(values, word)
    _add_writer(values, given.pop("writer", None), given.pop("writer_model", None))
    values |= {k: v for k, v in given.items() if v not in (None, [])}
    config = _typed(BuildConfig, values, str(file or "the command line"))
    assert isinstance(config, BuildConfig)
    _check(config)
    return config


def _check(config: BuildConfig) -> None:
    if not config.tokenizer:
        raise UserError("give the model's directory with --tokenizer HF_DIR")
    if config.template != "auto" and config.template not in FORMATS:
        raise UserError(f"template is '{config.template}'; use one of auto, {', '.join(FORMATS)}")
    for name in ("seq_len_tokens", "pack_multiple"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} is {getattr(config, name)}; it must be at least 1")
    if config.seed < 0:
        raise UserError(f"seed is {config.seed}; it must not be negative")


def _read(file: Path) -> dict[str, Any]:
    """A YAML file over the one that it `extends`; a source set to null is left out."""
    from omegaconf import OmegaConf

    if not Path(file).is_file():
        raise UserError(f"the configuration file {file} does not exist")
    try:
        values = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except Exception as e:
        raise UserError(f"{file} is not valid: {str(e).splitlines()[0]}") from e
    if not isinstance(values, dict):
        raise UserError(f"{file} must hold keys such as 'sources:'")
    result = {str(k): v for k, v in values.items()}
    if base := result.pop("extends", None):
        below = _read(Path(file).parent / str(base))
        both = {**below.get("sources", {}), **(result.get("sources") or {})}
        result = {**below, **result, "sources": {k: v for k, v in both.items() if v is not None}}
    return result


def _add_source(values: dict[str, Any], word: str) -> None:
    kind, sign, path = word.partition("=")
    if not sign or not path:
        raise UserError(f"--source {word}: write KIND=PATH, for example sgd=data/sgd/train")
    sources = values.setdefault("sources", {})
    name, number = kind, 2
    while name in sources:
        name, number = f"{kind}_{number}", number + 1
    sources[name] = {"kind": kind, "path": path}


def _add_writer(values: dict[str, Any], url: str | None, model: str | None) -> None:
    """`--writer URL --writer-model NAME` for every source that has thoughts to reword."""
    if not url:
        return
    reworded = [s for s in values.get("sources", {}).values() if isinstance(s, dict) and s.get("kind") in REWORDED]
    if not reworded:
        raise UserError(f"--writer rewords the thoughts of {' and '.join(REWORDED)} sources, and none is given")
    for source in reworded:
        source |= {"writer": url, "writer_model": model or ""}


def _override(values: dict[str, Any], word: str) -> None:
    from omegaconf import OmegaConf

    key, sign, text = word.partition("=")
    if not sign or not key:
        raise UserError(f"'{word}' is not of the form key=value (for example sources.sgd.optional_slots=true)")
    try:
        value = OmegaConf.create(f"v: {text}").v if text else ""
        *parents, last = key.split(".")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    except Exception as e:
        raise UserError(f"'{word}' cannot be set: the value is not valid YAML, or the key is not a section") from e


def _entry(name: str, options: Any, loss: str) -> SourceEntry:
    if not isinstance(options, dict) or "kind" not in options:
        raise UserError(f"source {name} needs a 'kind', one of {', '.join(KINDS)}")
    values = {str(k): v for k, v in options.items()}
    source_class = _source_class(name, str(values.pop("kind")))
    loss, epochs, weight = str(values.pop("loss", loss)), values.pop("epochs", None), values.pop("weight", None)
    if loss not in LOSSES:
        raise UserError(f"source {name}: loss is '{loss}'; use one of {', '.join(LOSSES)}")
    if epochs is not None and weight is not None:
        raise UserError(f"source {name} has both epochs and weight; give one")
    for key, number in (("epochs", epochs), ("weight", weight)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int | float) or not number > 0):
            raise UserError(f"source {name}: {key} is {number!r}; it must be a number above 0")
    source = _typed(source_class, values, f"source {name}")
    if not source.path:
        raise UserError(f"source {name} needs a 'path'")
    return SourceEntry(name, source, loss, float(epochs or 1.0), None if weight is None else float(weight))


def _source_class(name: str, kind: str) -> type[Source]:
    import importlib

    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(KINDS)}"
        raise UserError(f"source {name}: there is no kind '{kind}'; {hint}")
    module, class_name = KINDS[kind]
    source_class = getattr(importlib.import_module(module), class_name)
    assert issubclass(source_class, Source)
    return source_class


def _typed(cls: type[Any], values: dict[str, Any], where: str) -> Any:
    """`cls(**values)` with OmegaConf's type checks; an unknown key names the nearest known one."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    known = [f.name for f in fields(cls)]
    if "path" in known:
        known += ["kind", "epochs", "weight", "loss"]  # what every source has; taken off before this
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}"
            raise UserError(f"{where}: unknown key '{key}'; {hint}")
    if "path" in known and not values.get("path"):
        raise UserError(f"{where} needs a 'path'")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), values))
    except OmegaConfBaseException as e:
        raise UserError(f"{where}: {e.full_key or e.key}: {str(e).splitlines()[0].rstrip('.')}") from e


def describe(config: BuildConfig) -> dict[str, Any]:
    """Everything that decides the set's content but the files themselves: part of its key, and of its manifest.

    Paths are left out: a set does not change with where its sources lie.
    """
    options = {k: v for k, v in asdict(config).items() if k not in ("sources", "tokenizer", "against")}
    sources = {
        e.name: {
            "kind": config.sources[e.name]["kind"],
            "loss": e.loss,
            "epochs": e.epochs,
            "weight": e.weight,
            "options": {f.name: getattr(e.source, f.name) for f in fields(e.source) if not _is_elsewhere(f.name)},
        }
        for e in config.entries()
    }
    return {**options, "sources": sources}


def _is_elsewhere(name: str) -> bool:
    """Options that say where something lies or how it is asked for, and not what comes of it."""
    return name in (
        *("path", "irrelevance", "database"),
        *("writer", "writer_cache", "writer_retries", "writer_timeout_s", "writer_concurrency"),
    )
