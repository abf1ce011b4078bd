"""Whether a built set is one that a run can train on."""

from __future__ import annotations

import hashlib
from pathlib import Path

from coalm_nemo.checkpoint.layout import sha256_of
from coalm_nemo.data.shards import ShardSet
from coalm_nemo.errors import UserError
from coalm_nemo.models.llama import LlamaConfig


def check_set(directory: Path, hf_dir: Path, seq_len_tokens: int, llama: LlamaConfig) -> None:
    """Raises UserError where the set's tokenizer, template or length is not the run's, or a file is torn."""
    rows = ShardSet.load(directory)
    manifest = rows.manifest
    if manifest["tokenizer_sha256"] != _digest_of(hf_dir / "tokenizer.json"):
        raise UserError(f"{directory} was built with another tokenizer than {hf_dir} has; build it again with that one")
    own = _own_template(hf_dir)
    if own and manifest["chat_template_sha256"] != hashlib.sha256(own.encode()).hexdigest():
        raise UserError(f"{directory} was built with another chat template than {hf_dir} has; build it again")
    if manifest["packing"]["seq_len_tokens"] != seq_len_tokens:
        raise UserError(
            f"{directory} was built for sequences of {manifest['packing']['seq_len_tokens']} tokens and "
            f"train.seq_len_tokens is {seq_len_tokens}; make them the same"
        )
    longest = int(rows.positions().max())
    if longest > llama.max_positions:
        raise UserError(f"{directory} has a row of {longest} tokens and the model has {llama.max_positions} positions")
    if manifest["largest_token"] >= llama.vocab_size:
        raise UserError(
            f"{directory} holds token {manifest['largest_token']}, but the model's vocab_size is {llama.vocab_size}"
        )


def _digest_of(file: Path) -> str:
    if not file.is_file():
        raise UserError(f"{file} is missing; a run on a built set compares its tokenizer with the model's")
    return sha256_of(file)


def _own_template(hf_dir: Path) -> str:
    from coalm_nemo.data.chat import load_tokenizer

    return str(load_tokenizer(hf_dir).chat_template or "")
