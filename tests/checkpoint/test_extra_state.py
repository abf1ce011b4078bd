"""Transformer Engine's module states: import writes what a model of its modules asks for, export passes them by."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from extra_state_worker import STATE, load_and_save
from helpers import assert_same_weights
from tiny_llama import make_tiny_llama
from torch.distributed.checkpoint import FileSystemReader

from coalm_nemo.checkpoint.convert import export_checkpoint, import_checkpoint
from coalm_nemo.checkpoint.mapping import extra_state_keys
from coalm_nemo.models.llama import load_llama_config


def stored_states(ckpt: Path) -> dict[str, object]:
    """Every object of a checkpoint, as torch.distributed.checkpoint finds and loads it."""
    metadata = FileSystemReader(ckpt).read_metadata()
    states = {}
    for index, info in metadata.storage_data.items():
        if index.fqn.rpartition("/")[0].endswith("_extra_state"):
            content = (ckpt / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
            states[index.fqn] = torch.load(io.BytesIO(content), weights_only=True)
    return states


def test_import_writes_one_empty_local_shard_a_module(tmp_path: Path) -> None:
    """megatron-core saves `[sh_obj.data for sh_obj in ...]`, and gives the module the element: None."""
    hf = make_tiny_llama(tmp_path / "hf")
    import_checkpoint(hf, tmp_path / "ckpt")
    assert stored_states(tmp_path / "ckpt") == dict.fromkeys(extra_state_keys(load_llama_config(hf)), [None])


@pytest.mark.slow
def test_a_model_with_states_loads_an_import_and_its_checkpoint_is_exported(tmp_path: Path) -> None:
    """The final norm's state among them: Transformer Engine's RMSNorm has one, and a missing key fails the load."""
    hf, ckpt, saved = make_tiny_llama(tmp_path / "hf"), tmp_path / "ckpt", tmp_path / "saved"
    import_checkpoint(hf, ckpt)
    torch.multiprocessing.spawn(load_and_save, (hf, ckpt, saved, tmp_path / "rendezvous"), nprocs=1)  # type: ignore[no-untyped-call]
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert len(facts["asked"]) == 2 * 4 + 1
    assert "decoder.final_layernorm._extra_state/shard_0_1" in facts["asked"]
    assert set(facts["asked"]) <= set(extra_state_keys(load_llama_config(hf)))
    assert set(facts["given"]) == {"None"}
    states = stored_states(saved)
    assert sorted(states) == facts["asked"]
    assert all(torch.equal(state[0], STATE) for state in states.values())  # type: ignore[index]
    export_checkpoint(saved, tmp_path / "back", hf_base=hf)
    assert_same_weights(hf, tmp_path / "back")
