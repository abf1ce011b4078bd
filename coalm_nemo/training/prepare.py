"""What rank 0 does before there is a process group: tokenise the rows and import the base, once, kept on disk.

The results live in the run directory under names made of what they were made from, so a second start finds them, and
a changed input is never mistaken for the old one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coalm_nemo.config import RunConfig
from coalm_nemo.data.rows import Row, read_rows, split_validation
from coalm_nemo.data.shards import CHAT_TEMPLATE
from coalm_nemo.data.tokens import TokenRows, tokenize_rows
from coalm_nemo.errors import UserError
from coalm_nemo.models.llama import LlamaConfig, load_llama_config


@dataclass(frozen=True)
class Prepared:
    """Paths that every rank opens."""

    base: Path
    """Megatron checkpoint to start from."""
    hf_source: Path
    """Directory with config.json and the tokenizer, copied into every checkpoint."""
    train: Path
    validation: Path | None

    def to_json(self) -> str:
        return json.dumps({k: str(v) if v else None for k, v in vars(self).items()})

    @staticmethod
    def from_json(text: str) -> Prepared:
        raw = {k: Path(v) if v else None for k, v in json.loads(text).items()}
        return Prepared(**raw)  # type: ignore[arg-type]


def hf_source(run: RunConfig) -> Path:
    """Where config.json and the tokenizer are: `model.hf_path`, or the side files of `model.checkpoint`."""
    if run.model.hf_path:
        return Path(run.model.hf_path)
    if not run.model.checkpoint:
        raise UserError("give model.hf_path=HF_DIR (a Hugging Face Llama directory) or model.checkpoint=CKPT")
    path = Path(run.model.checkpoint) / "hf"
    if not path.is_dir():
        raise UserError(f"{path} is missing: {run.model.checkpoint} is not a checkpoint of `coalm convert import`")
    return path


def read_llama(run: RunConfig) -> LlamaConfig:
    """The model's shape. Raises UserError for whatever is wrong with its config.json."""
    return load_llama_config(hf_source(run))


def prepare(run: RunConfig, llama: LlamaConfig) -> Prepared:
    """Everything slow that one process can do for all. Raises UserError for bad rows or a bad model directory."""
    source = hf_source(run)
    train, validation = prepare_data(run, llama, source)
    base = _prepare_base(run, source)
    side = _keep_side_files(run, source)
    return Prepared(base, side, train, validation)


def prepare_data(run: RunConfig, llama: LlamaConfig, source: Path) -> tuple[Path, Path | None]:
    """Where the tokenised rows are, (train, validation): made if they are not there yet, checked if they are a set."""
    if not run.data.train:
        raise UserError("give data.train=ROWS.jsonl, or a set of `coalm data build`")
    if Path(run.data.train).is_dir():
        return _built_sets(run, llama, source)
    if run.data.validation and Path(run.data.validation).is_dir():
        raise UserError(
            "data.validation is a directory and data.train is not; both are sets, or both are files of rows"
        )
    key = _digest(
        _file_key(run.data.train), _file_key(run.data.validation), _tokenizer_key(source), _data_options(run, llama)
    )
    train, validation = Path(run.run.dir) / "data" / f"train-{key}", Path(run.run.dir) / "data" / f"validation-{key}"
    if not train.is_dir():
        rows, held_out = _read_split(run)
        if held_out:
            _tokenize(run, llama, source, held_out).save(validation)
        _tokenize(run, llama, source, rows).save(train)  # last: its presence says that all is there
    return train, validation if validation.is_dir() else None


def _built_sets(run: RunConfig, llama: LlamaConfig, source: Path) -> tuple[Path, Path | None]:
    """The sets that `data.train` and `data.validation` name, checked. They are used where they lie."""
    from coalm_nemo.data.set_check import check_set

    check_set(Path(run.data.train), source, run.train.seq_len_tokens, llama)
    if not run.data.validation:
        return Path(run.data.train), None
    if not Path(run.data.validation).is_dir():
        raise UserError(f"data.validation={run.data.validation} is not a set of `coalm data build`, as data.train is")
    check_set(Path(run.data.validation), source, run.train.seq_len_tokens, llama)
    return Path(run.data.train), Path(run.data.validation)


def _read_split(run: RunConfig) -> tuple[list[Row], list[Row]]:
    rows = read_rows(Path(run.data.train))
    if run.data.validation:
        return rows, read_rows(Path(run.data.validation))
    train, held_out = split_validation(rows, run.data.validation_fraction)
    if not train:
        raise UserError(f"data.validation_fraction={run.data.validation_fraction} leaves no row to train on")
    return train, held_out


def _tokenize(run: RunConfig, llama: LlamaConfig, source: Path, rows: list[Row]) -> TokenRows:
    from coalm_nemo.data.chat import ChatEncoder, load_tokenizer

    tokens = tokenize_rows(
        rows,
        ChatEncoder(load_tokenizer(source)),
        max_positions=min(run.train.seq_len_tokens, llama.max_positions),
        overlong=run.data.overlong,
        empty=run.train.empty_rows,
    )
    if (largest := int(tokens.tokens.max())) >= llama.vocab_size:
        row = int(np.searchsorted(tokens.offsets, tokens.tokens.argmax(), side="right")) - 1
        raise UserError(
            f"{tokens.row_ids[row]} holds token {largest}, but the model's vocab_size is {llama.vocab_size}; "
            f"the tokenizer in {source} must be the model's own"
        )
    return tokens


def _prepare_base(run: RunConfig, source: Path) -> Path:
    from coalm_nemo.checkpoint import layout
    from coalm_nemo.checkpoint.convert import import_checkpoint

    if run.model.checkpoint:
        layout.check_manifest(Path(run.model.checkpoint), full=False)
        return Path(run.model.checkpoint)
    if run.model.init == "random":
        from coalm_nemo.models.random_init import write_random_weights

        key = _digest(_file_key(str(source / "config.json")), str(run.run.seed))
        base = Path(run.run.dir) / f"base-random-{key}"
        if not base.is_dir():
            drawn = Path(run.run.dir) / f".random-{key}"
            try:
                import_checkpoint(write_random_weights(source, drawn, run.run.seed), base)
            finally:
                shutil.rmtree(drawn, ignore_errors=True)
        return base
    base = Path(run.run.dir) / f"base-{_digest(*(_file_key(str(p)) for p in sorted(source.iterdir()) if p.is_file()))}"
    if not base.is_dir():
        import_checkpoint(source, base)
    return base


def _keep_side_files(run: RunConfig, source: Path) -> Path:
    """The base's config and tokenizer, copied beside the run so that checkpoints do not depend on `source`."""
    from coalm_nemo.checkpoint.hf_files import copy_side_files
    from coalm_nemo.checkpoint.layout import atomic_directory

    side = Path(run.run.dir) / "hf"
    shutil.rmtree(side, ignore_errors=True)
    with atomic_directory(side) as partial:
        copy_side_files(source, partial)
        if Path(run.data.train).is_dir():  # what the rows were rendered with is what the export says
            shutil.copyfile(Path(run.data.train) / "tokenizer" / CHAT_TEMPLATE, partial / CHAT_TEMPLATE)
    return side


def _file_key(path: str) -> str:
    """Identity of an input file: where, how long, when changed (hashing 800 GB of weights at each start would not do)."""
    if not path:
        return ""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist")
    stat = Path(path).stat()
    return f"{Path(path).resolve()}:{stat.st_size}:{stat.st_mtime_ns}"


def _tokenizer_key(source: Path) -> str:
    return "|".join(_file_key(str(p)) for p in sorted(source.glob("*token*")) + sorted(source.glob("chat_template*")))


def _data_options(run: RunConfig, llama: LlamaConfig) -> str:
    limits = f"{run.train.seq_len_tokens}:{llama.max_positions}:{llama.vocab_size}"
    return f"{limits}:{run.data.overlong}:{run.train.empty_rows}:{run.data.validation_fraction}"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
