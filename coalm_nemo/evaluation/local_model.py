"""A Hugging Face directory that answers here, with plain `transformers`: batched, padded on the left, greedy unless told.

Prompts are written by the checkpoint's own chat template, with the date that training used. The longest go first: what
does not fit into memory shows at once, and little is padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coalm_nemo.data.chat_format import DATE_STRING
from coalm_nemo.errors import UserError
from coalm_nemo.evaluation.base import Prompt
from coalm_nemo.evaluation.runner import Reply, cut_at_stop, in_order

if TYPE_CHECKING:
    import torch

    from coalm_nemo.evaluation.model_source import ModelSource

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
DEFAULT_BATCH_SIZE = 16


class LocalModel:
    """Weights in memory. Raises UserError where the directory has no usable model, tokenizer or chat template."""

    def __init__(
        self,
        hf_dir: Path,
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        dtype: str = "auto",
        device: str = "auto",
        temperature: float = 0.0,
        seed: int = 0,
        fingerprint: str = "",
    ) -> None:
        import torch

        self.name, self.fingerprint = str(hf_dir), fingerprint
        self.batch_size, self.temperature, self.seed = batch_size, temperature, seed
        self.device = _device(device)
        self.dtype = dtype if dtype != "auto" else ("bf16" if self.device.type == "cuda" else "fp32")
        self.tokenizer = _load_tokenizer(hf_dir)
        self.model = _load_weights(hf_dir, getattr(torch, DTYPES[self.dtype])).to(self.device)
        self.context_tokens = int(getattr(self.model.config, "max_position_embeddings", 0) or 1 << 30)
        self.eos = _eos_ids(self.model, self.tokenizer)
        self.pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.eos[0]
        # What else the directory's generation_config sets (temperature, top_p) would be mixed into every call.
        self.model.generation_config = type(self.model.generation_config)()
        torch.manual_seed(seed)

    @classmethod
    def from_source(cls, source: ModelSource, fingerprint: str = "") -> LocalModel:
        return cls(
            Path(source.model), batch_size=source.batch_size, dtype=source.dtype, device=source.device,
            temperature=source.temperature, seed=source.seed, fingerprint=fingerprint,
        )  # fmt: skip

    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        return in_order(self.stream(prompts))

    def stream(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Reply]]:
        """Batch after batch, the longest prompts first. A prompt that leaves no room for an answer gets none."""
        ids = [self.prompt_ids(p) for p in prompts]
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        fitting = [i for i in order if len(ids[i]) < self.context_tokens]
        yield from ((i, Reply("", "prompt_too_long")) for i in order if len(ids[i]) >= self.context_tokens)
        for start in range(0, len(fitting), self.batch_size):
            batch = fitting[start : start + self.batch_size]
            yield from zip(batch, self._generate([(prompts[i], ids[i]) for i in batch]), strict=True)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The prompt's tokens, up to and with the header of the answer."""
        tools = [dict(t) for t in prompt.tools] if prompt.tools else None
        try:
            text = self.tokenizer.apply_chat_template(
                list(prompt.messages), tools=tools, tokenize=False, add_generation_prompt=True, date_string=DATE_STRING
            )
        except Exception as e:
            first = str(e).splitlines()[0][:200] if str(e) else type(e).__name__
            raise UserError(f"the chat template of {self.name} refuses a prompt of this benchmark ({first})") from e
        return list(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def _generate(self, batch: Sequence[tuple[Prompt, list[int]]]) -> list[Reply]:
        """One batch; where it does not fit into the GPU's memory, its halves."""
        import torch

        try:
            return self._generate_at_once(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise UserError(
                    f"a prompt of {len(batch[0][1])} tokens does not fit into the memory of {self.device}; use a larger "
                    "GPU, or a server over several (--endpoint)"
                ) from None
        torch.cuda.empty_cache()
        half = len(batch) // 2
        return self._generate(batch[:half]) + self._generate(batch[half:])

    def _generate_at_once(self, batch: Sequence[tuple[Prompt, list[int]]]) -> list[Reply]:
        import torch
        from transformers import StoppingCriteriaList

        from coalm_nemo.evaluation.stopping import RowsDone

        longest = max(len(ids) for _, ids in batch)
        rows = [[self.pad] * (longest - len(ids)) + ids for _, ids in batch]
        mask = [[0] * (longest - len(ids)) + [1] * len(ids) for _, ids in batch]
        room = [min(p.max_new_tokens, self.context_tokens - len(ids)) for p, ids in batch]
        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            sampling = {"do_sample": True, "temperature": self.temperature}
        done = RowsDone(self.tokenizer, longest, room, [p.stop for p, _ in batch])
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=torch.tensor(rows, device=self.device),
                attention_mask=torch.tensor(mask, device=self.device),
                max_new_tokens=max(room), eos_token_id=self.eos, pad_token_id=self.pad, use_cache=True,
                stopping_criteria=StoppingCriteriaList([done]), **sampling,
            )  # fmt: skip
        new = out[:, longest:].tolist()
        return [self._reply(p, tokens[:most]) for (p, _), tokens, most in zip(batch, new, room, strict=True)]

    def _reply(self, prompt: Prompt, tokens: list[int]) -> Reply:
        """The text up to the first end-of-turn token or stop string."""
        end = next((i for i, t in enumerate(tokens) if t in self.eos), None)
        text = str(self.tokenizer.decode(tokens[:end], skip_special_tokens=True))
        cut = cut_at_stop(text, prompt.stop)
        whole = end is not None or cut != text
        return Reply(cut.strip(), "" if whole else "cut_short")


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: there is no such device; write cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: write cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; try --device cpu")
    return device


def _load_tokenizer(hf_dir: Path) -> Any:
    from coalm_nemo.data.chat import load_tokenizer

    tokenizer = load_tokenizer(hf_dir)
    if not tokenizer.chat_template:
        raise UserError(f"{hf_dir} has no chat template; add chat_template.jinja to the directory")
    return tokenizer


def _load_weights(hf_dir: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if (Path(hf_dir) / "adapter_config.json").is_file():
        raise UserError(f"{hf_dir} is a LoRA adapter; export the whole model with `coalm convert export --merge-lora`")
    if not (Path(hf_dir) / "config.json").is_file():
        raise UserError(f"{hf_dir} has no config.json; --model is a Hugging Face directory")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        return AutoModelForCausalLM.from_pretrained(hf_dir, dtype=dtype, local_files_only=True).eval()
    except Exception as e:  # transformers raises whatever the damaged file leads to
        first = str(e).splitlines()[0][:200] if str(e) else type(e).__name__
        raise UserError(f"the model in {hf_dir} cannot be loaded ({first})") from e


def _eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """What ends a turn: generation_config's ids, else the model's; always the tokenizer's own too."""
    given = model.generation_config.eos_token_id
    given = model.config.eos_token_id if given is None else given
    ids = given if isinstance(given, list) else [given]
    return sorted({int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None})
