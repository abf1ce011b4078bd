"""A Hugging Face model directory: its weights checked against `config.json`, and the files that travel beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from coalm_nemo.checkpoint.mapping import HF_EMBEDDING, HF_HEAD, hf_tensors
from coalm_nemo.checkpoint.rows import FileReader, RowBlock, stream_blocks
from coalm_nemo.checkpoint.safetensors_io import StoredTensor, read_header, unique_keys
from coalm_nemo.errors import UserError
from coalm_nemo.models.llama import LlamaConfig

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
IGNORED_SUFFIX = "rotary_emb.inv_freq"
"""A buffer that old versions of transformers stored; it follows from config.json."""

SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
SIDE_PATTERNS = ("LICENSE*", "USE_POLICY*", "NOTICE*")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_COMPARE_BUFFER_BYTES = 4 << 20


def open_weights(hf_dir: Path, cfg: LlamaConfig, reader: FileReader) -> dict[str, StoredTensor]:
    """The model's tensors by name, exactly those that `cfg` asks for.

    Raises UserError for missing or damaged files, and for tensors that are missing, unexpected or of another shape.
    """
    hf_dir = Path(hf_dir)
    found = {n: t for n, t in _all_tensors(hf_dir, reader).items() if not n.endswith(IGNORED_SUFFIX)}
    if cfg.tied_embeddings and HF_HEAD in found:
        _drop_equal_head(hf_dir, found, reader)
    wanted = {t.name: t.shape for t in hf_tensors(cfg)}
    for name, shape in wanted.items():
        if name not in found:
            raise UserError(f"{hf_dir} lacks the tensor {name} that its config.json asks for")
        tensor = found[name]
        if tensor.shape != shape:
            raise UserError(
                f"{tensor.path}: {name} has shape {list(tensor.shape)}, but config.json asks for {list(shape)}"
            )
    if extra := sorted(found.keys() - wanted.keys()):
        raise UserError(f"{found[extra[0]].path} holds {_and_more(extra)}, which config.json does not account for")
    return {name: found[name] for name in wanted}


def _and_more(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more tensors"


def _drop_equal_head(hf_dir: Path, found: dict[str, StoredTensor], reader: FileReader) -> None:
    """Tied embeddings need no head; one that repeats the embedding is left out, another would be lost silently."""
    head, embedding = found[HF_HEAD], found.get(HF_EMBEDDING)
    if embedding is None:
        return
    if (head.code, head.shape) != (embedding.code, embedding.shape) or not _same_bytes(head, embedding, reader):
        raise UserError(f"{hf_dir}: config.json ties the embeddings, but {HF_HEAD} differs from {HF_EMBEDDING}")
    del found[HF_HEAD]


def _same_bytes(one: StoredTensor, other: StoredTensor, reader: FileReader) -> bool:
    streams = [stream_blocks([RowBlock(t.open(reader), 0, t.rows)], _COMPARE_BUFFER_BYTES) for t in (one, other)]
    return all(a == b for a, b in zip(*streams, strict=True))


def _all_tensors(hf_dir: Path, reader: FileReader) -> dict[str, StoredTensor]:
    if (hf_dir / SINGLE_FILE).exists():  # the order in which transformers looks, too
        return read_header(hf_dir / SINGLE_FILE, reader)
    if (hf_dir / INDEX_FILE).is_file():
        return _indexed_tensors(hf_dir, reader)
    if any(hf_dir.glob("*.bin")) or any(hf_dir.glob("*.pth")):
        raise UserError(f"{hf_dir} holds its weights as pickles only (.bin, .pth); convert them to safetensors first")
    raise UserError(f"{hf_dir} holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there")


def _indexed_tensors(hf_dir: Path, reader: FileReader) -> dict[str, StoredTensor]:
    weight_map = _read_index(hf_dir / INDEX_FILE)
    shards = {file: read_header(_shard_path(hf_dir, file), reader) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in shards[file]:
            raise UserError(f"{hf_dir / INDEX_FILE} places {name} in {file}, which does not hold it")
    found: dict[str, StoredTensor] = {}
    for file, tensors in shards.items():
        for name, tensor in tensors.items():
            if name in found:
                raise UserError(f"{name} is both in {found[name].path} and in {file}; one of them must go")
            found[name] = tensor
    return found


def _read_index(path: Path) -> dict[str, str]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read as an index ({e})") from e
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise UserError(f"{path} has no valid 'weight_map'")
    return weight_map


def _shard_path(hf_dir: Path, file: str) -> Path:
    """A shard's path. The name must stay inside the directory; a symbolic link there is the user's own doing."""
    parts = PurePosixPath(file)
    if not file or parts.is_absolute() or ".." in parts.parts or "\\" in file or "\0" in file:
        raise UserError(f"{hf_dir / INDEX_FILE} names {file!r}, which is outside its directory")
    if not (hf_dir / file).is_file():
        raise UserError(f"{hf_dir / INDEX_FILE} names {file}, which is missing")
    return hf_dir / file


def side_files(hf_dir: Path) -> Iterator[Path]:
    """The files beside the weights that are there: configuration, tokenizer, chat template, licence."""
    for name in SIDE_FILES:
        if (hf_dir / name).is_file():
            yield hf_dir / name
    for pattern in SIDE_PATTERNS:
        yield from (p for p in sorted(hf_dir.glob(pattern)) if p.is_file())


def copy_side_files(hf_dir: Path, target: Path) -> list[str]:
    """Copy the files beside the weights; gives their names."""
    target.mkdir(parents=True, exist_ok=True)
    files = list(side_files(hf_dir))
    for path in files:
        shutil.copyfile(path, target / path.name)
    return [path.name for path in files]


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
