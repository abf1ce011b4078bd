"""What is asked for: a model, GPUs and a batch (`Job`), and one way to split them (`Layout`)."""

from __future__ import annotations

from dataclasses import dataclass, field

from coalm_nemo.errors import UserError
from coalm_nemo.models.llama import LlamaConfig
from coalm_nemo.planning.hardware import GPUS, Gpu

TASKS = ("pretrain", "sft", "lora")
PRECISIONS = ("bf16", "fp8")
RECOMPUTE = ("none", "selective", "full")
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
COALM_IT_ROWS = 311_639
COALM_IT_TOKENS = round(COALM_IT_ROWS * 677.8)
"""Rows and mean length of arXiv 2502.08820."""
COALM_IT_ATTENDED = 760.0
"""Sum of squared row lengths over their sum: the length that attention sees in packed rows, with CoALM-IT's mean lengths
and the spread that `benchmarks/packing.py` assumes. The published SFT rows (packed SQuAD) are shorter still; at 4096
the difference is under 2 % of a step."""


@dataclass(frozen=True)
class Job:
    """What is to be trained, on what, in which batches."""

    model: LlamaConfig
    gpus: int
    global_batch: int
    """Sequences (packs, with packing) a step."""
    seq_len_tokens: int = 4096
    task: str = "sft"
    """pretrain (whole sequences) | sft (packed rows) | lora (packed rows, frozen base)."""
    precision: str = "fp8"
    gpu: Gpu = field(default_factory=lambda: GPUS["h100-80gb"])
    attended_tokens: float = 0.0
    """Sum of squared row lengths / sum of row lengths; 0: the sequence for pretrain, CoALM-IT's for packed rows."""
    lora_rank: int = 16
    lora_targets: str = "all"
    """all (every linear layer) | some of q,k,v,o,gate,up,down | qkv (one adapter for the fused three, as published runs)."""
    nf4_base: bool = False
    """QLoRA: the frozen linear layers in 4 bits, made BF16 again for every product."""
    name: str = ""
    packed: bool = True
    """False: a row a sequence, padded, and counted as if every one were padded to `seq_len_tokens`."""

    def __post_init__(self) -> None:
        for what, value, allowed in (
            ("task", self.task, TASKS),
            ("precision", self.precision, PRECISIONS),
        ):
            if value not in allowed:
                raise UserError(f"--{what} {value} is not known; use one of {', '.join(allowed)}")
        if unknown := self.adapted.difference(PROJECTIONS):
            names = ", ".join(PROJECTIONS)
            raise UserError(
                f"--lora-targets {', '.join(sorted(unknown))} is not known; use all, qkv or some of {names}"
            )
        for what, number in (
            ("gpus", self.gpus),
            ("global-batch", self.global_batch),
            ("seq-len-tokens", self.seq_len_tokens),
        ):
            if number < 1:
                raise UserError(f"--{what} is {number}; it must be at least 1")

    @property
    def attended(self) -> float:
        """Tokens of its own row that a token could see if attention were not causal, averaged over tokens."""
        if self.attended_tokens:
            return min(self.attended_tokens, self.seq_len_tokens)
        whole = self.task == "pretrain" or not self.packed
        return self.seq_len_tokens if whole else min(COALM_IT_ATTENDED, self.seq_len_tokens)

    @property
    def trains_all(self) -> bool:
        return self.task != "lora"

    @property
    def adapted(self) -> frozenset[str]:
        """Projections that LoRA trains beside."""
        if self.lora_targets in ("all", "qkv"):
            return frozenset(PROJECTIONS if self.lora_targets == "all" else PROJECTIONS[:3])
        return frozenset(self.lora_targets.split(","))


@dataclass(frozen=True)
class Layout:
    """How model, batch and optimizer are split over the GPUs, and what is kept in which form."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    micro_batch: int = 1
    recompute: str = "none"
    sequence: bool = True
    """Sequence parallelism; takes effect with tensor > 1."""
    count_embedding_and_loss: bool = False
    distributed_optimizer: bool = True
    fp8_params: bool = True
    """With FP8: keep the linear weights in FP8 alone; False: BF16 weights and FP8 copies of them."""
    gradient_bytes: int = 2
    moment_bytes: int = 4
    """Each of Adam's two moments; 2 is Megatron's precision-aware optimizer. Master weights are always 4."""
    bf16_layers_at_start: int = 0
    """With FP8: this many first layers compute in BF16."""
    bf16_layers_at_end: int = 0
    fp8_weight_gradients: bool = True
    """With FP8: the products that give weight gradients run in FP8 too."""
    overlap_grad_reduce: bool = True
    """Gradients are reduced beside the backward pass; False: after it."""
    overlap_param_gather: bool = True
    """Parameters are gathered beside the forward pass; False: before it."""
    tensor_overlap: bool = True
    """Tensor parallelism's communication beside the products, which takes buffers; takes effect where there is any."""

    @property
    def model_ranks(self) -> int:
        return self.tensor * self.pipeline * self.context

    @property
    def chunks(self) -> int:
        """Model chunks over the whole pipeline."""
        return self.pipeline * self.virtual_pipeline

    def data_parallel(self, gpus: int) -> int:
        return gpus // self.model_ranks

    def micro_batches(self, job: Job) -> int:
        return job.global_batch // (self.micro_batch * self.data_parallel(job.gpus))

    def tokens_a_pass(self, job: Job) -> float:
        """Tokens of a micro-batch on one context-parallel rank."""
        return self.micro_batch * job.seq_len_tokens / self.context

    @property
    def sequence_split(self) -> int:
        """Ranks over which activations between tensor-parallel regions are split."""
        return self.tensor if self.sequence else 1

    def short(self) -> str:
        """`TP8 PP8 VP4 CP2 MBS1` and what differs from the defaults."""
        parts = [f"TP{self.tensor}", f"PP{self.pipeline}", f"VP{self.virtual_pipeline}", f"CP{self.context}"]
        parts.append(f"MBS{self.micro_batch}")
        if self.recompute != "none":
            parts.append(f"recompute {self.recompute}")
        if self.moment_bytes == 2:
            parts.append("BF16 moments")
        if not self.distributed_optimizer:
            parts.append("whole optimizer")
        if self.bf16_layers_at_start or self.bf16_layers_at_end:
            parts.append(f"BF16 ends {self.bf16_layers_at_start}+{self.bf16_layers_at_end}")
        return " ".join(parts)
