"""What runs in a spawned process: megatron-core loads and saves a model whose modules keep extra state.

Transformer Engine's modules do so: its linear layers, and its RMSNorm too. Only the keeping is imitated here, for the
keys and the bytes that megatron-core makes of it; what Transformer Engine does with a state is read in its source.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch

STATE = torch.arange(200, dtype=torch.uint8)
"""As long as any: Transformer Engine pickles its FP8 history into such a tensor."""


class NormWithState(torch.nn.Module):
    """A weight, and a state that is saved with it and kept as it is loaded."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight.detach().clone())
        self.loaded: Any = "nothing"

    def get_extra_state(self) -> torch.Tensor:
        return STATE

    def set_extra_state(self, state: Any) -> None:
        self.loaded = state


def load_and_save(rank: int, hf: Path, source: Path, target: Path, rendezvous: Path) -> None:
    """Load `source`, note the states that were given, and save with states to `target`."""
    warnings.filterwarnings("ignore")
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    from coalm_nemo.config import RunConfig
    from coalm_nemo.models.gpt import build_chunks
    from coalm_nemo.models.llama import load_llama_config
    from coalm_nemo.platform import choose_platform

    platform, run = choose_platform("cpu"), RunConfig()
    platform.activate(0)
    torch.distributed.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=1)
    parallel_state.initialize_model_parallel(1, 1)
    run.precision.dtype, run.train.seq_len_tokens = "fp32", 64
    (model,) = build_chunks(load_llama_config(hf), run, platform)
    model.decoder.final_layernorm = NormWithState(model.decoder.final_layernorm.weight)
    given: list[Any] = []
    for linear in (ColumnParallelLinear, RowParallelLinear):
        linear.get_extra_state = lambda self: STATE
        linear.set_extra_state = lambda self, state: given.append(state)
    model.output_layer.get_extra_state = lambda: None  # megatron-core insists that this one is empty
    template = model.sharded_state_dict()
    asked = sorted(v.unique_key for k, v in template.items() if k.endswith("_extra_state"))
    model.load_state_dict(dist_checkpointing.load(template, str(source)))
    target.mkdir()
    dist_checkpointing.save(model.sharded_state_dict(), str(target))
    facts = {"asked": asked, "given": [repr(state) for state in (model.decoder.final_layernorm.loaded, *given)]}
    (target.parent / "facts.json").write_text(json.dumps(facts))
    torch.distributed.destroy_process_group()
