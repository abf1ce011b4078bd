"""Which licence a Llama and what is made from it stand under, and what that licence asks of whoever passes it on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from coalm_nemo.models.llama import LlamaConfig

KNOWN_MODELS = {
    **{f"Llama-3.1-{size}{kind}": "llama3.1" for size in ("8B", "70B", "405B") for kind in ("", "-Instruct")},
    **{f"Llama-3.2-{size}{kind}": "llama3.2" for size in ("1B", "3B") for kind in ("", "-Instruct")},
    "Llama-3.3-70B-Instruct": "llama3.3",
}
"""Meta's models on the Hugging Face hub (organisation meta-llama) and their licences by the hub's names."""

_SHAPES = {
    (32, 4096, 14336, 8.0): "llama3.1",  # 8B
    (126, 16384, 53248, 8.0): "llama3.1",  # 405B
    (16, 2048, 8192, 32.0): "llama3.2",  # 1B
    (28, 3072, 8192, 32.0): "llama3.2",  # 3B
}
"""Layers, hidden, ffn and RoPE factor that occur in one release only; 70B is both 3.1 and 3.3."""

_TITLES = {"llama3.1": "Llama 3.1", "llama3.2": "Llama 3.2", "llama3.3": "Llama 3.3"}
_LLAMA3_VOCABULARY = 128256


def known_model(*names: str) -> str:
    """The hub's name of the first of `names` (a path, a hub name) that is Meta's; empty where none is."""
    for name in names:
        last = re.sub(r"^Meta-", "", name.rstrip("/").rpartition("/")[2])
        if last in KNOWN_MODELS:
            return f"meta-llama/{last}"
    return ""


def license_by(base_model: str, cfg: LlamaConfig | None) -> str:
    """The hub's name of the licence, by the model's name, else by a shape that only one release has; else empty."""
    by_name = KNOWN_MODELS.get(base_model.rpartition("/")[2], "")
    if by_name or cfg is None or cfg.rope_scaling is None or cfg.vocab_size != _LLAMA3_VOCABULARY:
        return by_name
    return _SHAPES.get((cfg.num_layers, cfg.hidden_size, cfg.ffn_size, cfg.rope_scaling.factor), "")


def license_of(name: str) -> str:
    """What the front matter says: a name that the hub knows."""
    return name if name in _TITLES else "other"


def license_note(name: str, model: str, files: Sequence[str]) -> Iterator[str]:
    """What to know before passing the model on, in Markdown. Sections 1.b and 1.b.i of the Llama 3.1 to 3.3 licences."""
    here = f" Its text is in {', '.join(f'`{file}`' for file in files)}." if files else ""
    if name not in _TITLES:
        yield f"The licence of the base model applies; this program does not know which one that is.{here}"
        return
    title = _TITLES[name]
    yield "**Built with Llama.**"
    yield ""
    yield (
        f"{title} is licensed under the {title} Community License, Copyright © Meta Platforms, Inc. "
        f"All Rights Reserved.{here} Whoever passes this model on, or a product that contains it, has to hand over a "
        'copy of that licence and this notice with it, to show "Built with Llama" prominently on a related page, and '
        'to begin the name of a model made from it with "Llama". Its acceptable use policy applies.'
    )
    if not model.lower().startswith("llama"):
        yield ""
        yield f'The name `{model}` does not begin with "Llama": change it before you publish these weights.'
