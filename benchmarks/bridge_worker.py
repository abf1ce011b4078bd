"""megatron-bridge's conversion on a CPU, in an environment of its own: IMPORT|EXPORT HF_DIR CHECKPOINT [OUT].

Transformer Engine is imported by megatron-bridge though a conversion uses none of it: an empty stand-in takes its place,
put there after megatron-core has seen that it is missing. Our CPU layer stands for what is taken from CUDA.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock


class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Any module of Transformer Engine and the like: every name in it is a class of nothing."""

    names = ("transformer_engine", "transformer_engine_torch", "nvidia_resiliency_ext", "mamba_ssm", "causal_conv1d",
             "fla", "modelopt", "qwen_vl_utils", "nvdlfw_inspect", "open_clip", "timm", "mlflow")  # fmt: skip

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        module = ModuleType(spec.name)
        module.__path__ = []
        module.__getattr__ = lambda name: _empty(name)  # type: ignore[method-assign]
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def _empty(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {}) if name[0].isupper() else MagicMock(name=name)


def main() -> None:
    verb, hf, ckpt = sys.argv[1:4]
    import torch

    from coalm_nemo import cpu_compat

    cpu_compat.install()
    import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401  (before the stand-in: the local layers are chosen)
    import megatron.core.models.gpt.gpt_model  # noqa: F401

    sys.meta_path.append(StandIn())
    torch.cuda.set_device = lambda *_: None  # type: ignore[assignment]
    torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:29513", rank=0, world_size=1)
    from megatron.bridge import AutoBridge
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    bridge = AutoBridge.from_hf_pretrained(hf, torch_dtype=torch.bfloat16)
    provider = bridge.to_megatron_provider(load_weights=verb == "import")
    provider.transformer_layer_spec = lambda *_, **__: get_gpt_layer_local_spec(normalization="RMSNorm")
    provider.transformer_impl = "local"
    for name in ("gradient_accumulation_fusion", "masked_softmax_fusion", "bias_dropout_fusion",
                 "apply_rope_fusion", "bias_activation_fusion", "persist_layer_norm"):  # fmt: skip
        setattr(provider, name, False)
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    if verb == "import":
        bridge.save_megatron_model(model, ckpt, hf_tokenizer_path=hf, low_memory_save=True)
        return
    export(bridge, model, ckpt, sys.argv[4])


def export(bridge: Any, model: Any, ckpt: str, out: str) -> None:
    """What `export_ckpt` does: load the checkpoint into a model, save that model."""
    from megatron.core import dist_checkpointing

    state = {"model": model[0].sharded_state_dict()}
    loaded = dist_checkpointing.load(state["model"], f"{ckpt}/iter_0000000")
    model[0].load_state_dict(loaded, strict=False)
    bridge.save_hf_pretrained(model, out, show_progress=False)


if __name__ == "__main__":
    main()
