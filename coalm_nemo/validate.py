"""The one place that checks a whole run before anything starts, and says what was derived and why."""

from __future__ import annotations

import math
from dataclasses import dataclass

from coalm_nemo.config import RunConfig
from coalm_nemo.errors import UserError
from coalm_nemo.models.llama import LlamaConfig
from coalm_nemo.provenance import SECRET
from coalm_nemo.speed import check_speed, explain_idle

CHOICES = {
    "run.platform": ("auto", "cpu", "cuda"),
    "run.layers": ("auto", "transformer_engine", "torch"),
    "model.init": ("pretrained", "random"),
    "precision.dtype": (
        "fp32",
        "bf16",
        "fp8_current",
        "fp8_blockwise",
        "fp8_delayed",
        "fp8_scaled_mm",
        "fp8_emulated_current",
        "fp8_emulated_blockwise",
        "fp8_emulated_delayed",
    ),
    "precision.emulation_weights": ("fp32", "bf16"),
    "precision.gradients": ("fp32", "bf16"),
    "optimizer.moments": ("fp32", "bf16"),
    "lora.base": ("as_trained", "nf4"),
    "train.recompute": ("none", "selective", "full"),
    "train.empty_rows": ("error", "drop"),
    "data.overlong": ("error", "drop"),
    "schedule.name": ("constant", "linear", "cosine"),
    "logging.wandb": ("disabled", "offline", "online"),
}
FP8_TOKENS = 16
"""Tokens of an FP8 product come in multiples of this (cuBLAS)."""
FP8_BLOCK = 128
NF4_BLOCK = 64
LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
AT_LEAST_ONE = (
    "parallel.tensor", "parallel.pipeline", "parallel.virtual_pipeline", "parallel.context",
    "batch.global_size", "batch.micro_size", "train.seq_len_tokens", "data.pack_multiple", "checkpoint.keep_last",
    "logging.console_interval_steps", "precision.amax_history_len", "evaluation.rows", "evaluation.max_new_tokens",
)  # fmt: skip
NOT_NEGATIVE = (
    "train.steps", "train.epochs", "train.eval_interval_steps", "optimizer.lr", "optimizer.min_lr",
    "optimizer.weight_decay", "optimizer.clip_grad", "schedule.warmup_ratio", "checkpoint.save_interval_steps",
    "checkpoint.milestone_interval_steps", "data.validation_fraction", "run.seed",
    "health.hang_factor", "health.straggler_interval_steps", "evaluation.every_steps",
    "speed.deferral_limit", "speed.collect_interval_steps", "speed.prefetch_steps",
)  # fmt: skip
ABOVE_ZERO = (
    "health.hang_floor_s", "health.hang_slow_s", "health.straggler_ratio", "logging.wandb_timeout_s",
    "logging.wandb_finish_s",
)  # fmt: skip


@dataclass(frozen=True)
class Derived:
    """A value that nobody set, with its reason."""

    name: str
    value: object
    why: str


@dataclass(frozen=True)
class Layout:
    """What follows from the configuration and the number of ranks."""

    world_size: int
    data_parallel: int
    micro_batches: int
    sequence_parallel: bool
    sequence_multiple: int
    """Every sequence length is a multiple of this."""
    derived: tuple[Derived, ...]


def check_run(run: RunConfig, llama: LlamaConfig, world_size: int) -> Layout:
    """Check everything that the configuration, the model and the number of ranks decide together.

    Raises UserError with one sentence that says what to change.
    """
    _check_values(run)
    _check_model(run, llama)
    _check_blocks(run, llama)
    _check_scaled_mm(run, llama)
    _check_pipeline(run, llama)
    data_parallel = _data_parallel(run, world_size)
    micro_batches = _micro_batches(run, data_parallel)
    sequence_parallel = run.parallel.sequence and run.parallel.tensor > 1
    multiple = _sequence_multiple(run, sequence_parallel)
    derived = _explain(run, llama, world_size, data_parallel, micro_batches, sequence_parallel, multiple)
    return Layout(world_size, data_parallel, micro_batches, sequence_parallel, multiple, tuple(derived))


def _value(run: RunConfig, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(run, section), name)


def _check_values(run: RunConfig) -> None:
    for key, allowed in CHOICES.items():
        if _value(run, key) not in allowed:
            raise UserError(f"{key} is '{_value(run, key)}'; use one of {', '.join(allowed)}")
    for key in AT_LEAST_ONE:
        if not _number(run, key) >= 1:
            raise UserError(f"{key} is {_value(run, key)}; it must be at least 1")
    for key in NOT_NEGATIVE:
        if not (_number(run, key) >= 0 and math.isfinite(_number(run, key))):
            raise UserError(f"{key} is {_value(run, key)}; it must not be negative")
    for key in ("optimizer.beta1", "optimizer.beta2", "data.validation_fraction", "schedule.warmup_ratio"):
        if not 0 <= _number(run, key) < 1:
            raise UserError(f"{key} is {_value(run, key)}; it must be at least 0 and below 1")
    for key in ABOVE_ZERO:
        if not _number(run, key) > 0:
            raise UserError(f"{key} is {_value(run, key)}; it must be above 0")
    if secret := next((name for name in run.run.environment if SECRET.search(name)), None):
        raise UserError(
            f"run.environment names {secret}, which looks like a key; the configuration is written into the run directory: "
            "export it in the shell instead"
        )
    _check_lora(run)
    _check_fp8(run)
    check_speed(run)
    if run.optimizer.min_lr > run.optimizer.lr:
        raise UserError(f"optimizer.min_lr ({run.optimizer.min_lr}) is above optimizer.lr ({run.optimizer.lr})")
    if run.evaluation.every_steps and not run.evaluation.data:
        raise UserError("evaluation.every_steps needs evaluation.data, held-out rows whose answers are calls or states")
    if not run.train.steps and not run.train.epochs:
        raise UserError("both train.steps and train.epochs are 0; set one of them")
    if run.train.steps and run.schedule.warmup_steps > run.train.steps:
        raise UserError(f"schedule.warmup_steps ({run.schedule.warmup_steps}) is above train.steps ({run.train.steps})")
    if run.data.packing and run.parallel.context > 1 and run.data.pack_multiple % (2 * run.parallel.context):
        raise UserError(
            f"data.pack_multiple={run.data.pack_multiple} must be a multiple of 2 x parallel.context = "
            f"{2 * run.parallel.context}, into which context parallelism cuts every row"
        )
    if run.data.packing and run.batch.micro_size != 1:
        raise UserError("data.packing=true wants batch.micro_size=1: raise train.seq_len_tokens for more rows a pass")
    if run.parallel.overlap_param_gather and not run.parallel.distributed_optimizer:
        raise UserError("parallel.overlap_param_gather needs parallel.distributed_optimizer=true")
    if run.parallel.overlap_param_gather and not run.parallel.overlap_grad_reduce:
        raise UserError("parallel.overlap_param_gather needs parallel.overlap_grad_reduce=true")


def _check_fp8(run: RunConfig) -> None:
    precision = run.precision
    bf16_layers = precision.bf16_layers_at_start or precision.bf16_layers_at_end
    if min(precision.bf16_layers_at_start, precision.bf16_layers_at_end) < 0:
        raise UserError("precision.bf16_layers_at_start and bf16_layers_at_end must not be negative")
    if bf16_layers and not precision.any_fp8:
        raise UserError(f"precision.bf16_layers_* go with FP8, and precision.dtype is {precision.dtype}")
    if precision.fp8_params and not precision.fp8:
        raise UserError(
            f"precision.fp8_params goes with Transformer Engine's FP8, and precision.dtype is {precision.dtype}"
        )
    if precision.fp8 == "delayed" and bf16_layers:
        raise UserError("precision.bf16_layers_* cannot go with fp8_delayed in megatron-core; use fp8_current")
    if run.optimizer.moments == "bf16" and not run.parallel.distributed_optimizer:
        raise UserError("optimizer.moments=bf16 needs parallel.distributed_optimizer=true")
    if precision.gradients == "bf16" and precision.weights == "float32":
        raise UserError("precision.gradients=bf16 goes with bf16 or FP8, and the weights are fp32")
    if precision.fp8_params and not run.parallel.distributed_optimizer:
        raise UserError("precision.fp8_params needs parallel.distributed_optimizer=true")
    if precision.any_fp8 and run.train.seq_len_tokens % FP8_TOKENS:
        raise UserError(
            f"train.seq_len_tokens={run.train.seq_len_tokens}: FP8 products want a multiple of {FP8_TOKENS}"
        )


def _check_blocks(run: RunConfig, llama: LlamaConfig) -> None:
    """Emulated blocks are those of the whole tensor: what a rank holds has to begin and end where a block does."""
    tensor = run.parallel.tensor
    if run.precision.emulated_fp8 != "blockwise" or tensor == 1:
        return
    heads, groups, size = llama.num_heads, llama.num_kv_heads, llama.head_dim
    split = {
        "query features": heads * size,
        "query, key and value features": (heads + 2 * groups) * size,
        "intermediate_size": llama.ffn_size,
    }
    for name, width in split.items():
        if width // tensor % FP8_BLOCK:
            raise UserError(
                f"precision.dtype=fp8_emulated_blockwise has blocks of {FP8_BLOCK}, and the model's {width} {name} over "
                f"parallel.tensor={tensor} are {width // tensor} a rank; use parallel.tensor=1 or another recipe"
            )


def _check_scaled_mm(run: RunConfig, llama: LlamaConfig) -> None:
    """torch's product wants multiples of 16 on every side."""
    tensor, size = run.parallel.tensor, llama.head_dim
    sides = {
        "hidden_size": llama.hidden_size,
        "query features a rank": llama.num_heads * size // tensor,
        "query, key and value features a rank": (llama.num_heads + 2 * llama.num_kv_heads) * size // tensor,
        "intermediate features a rank": llama.ffn_size // tensor,
    }
    for name, width in sides.items():
        if run.precision.scaled_mm and width % FP8_TOKENS:
            raise UserError(f"precision.dtype=fp8_scaled_mm wants multiples of {FP8_TOKENS}; {name}: {width}")


def _check_lora(run: RunConfig) -> None:
    lora = run.lora
    if lora.rank < 0:
        raise UserError(f"lora.rank is {lora.rank}; it must be at least 1, or 0 to train every weight")
    if lora.rank and not lora.alpha > 0:
        raise UserError(f"lora.alpha is {lora.alpha}; it must be above 0")
    if not lora.rank and (lora.base != "as_trained" or lora.dropout or lora.start_from):
        raise UserError("lora.base, lora.dropout and lora.start_from go with adapters; set lora.rank")
    if not 0 <= lora.dropout < 1:
        raise UserError(f"lora.dropout is {lora.dropout}; it must be at least 0 and below 1")
    if lora.base == "nf4" and run.precision.any_fp8:
        raise UserError(f"lora.base=nf4 goes with bf16 or fp32, and precision.dtype is {run.precision.dtype}")
    unknown = [t for t in lora.targets if t not in LORA_TARGETS]
    if unknown or not lora.targets or len(set(lora.targets)) < len(lora.targets):
        raise UserError(f"lora.targets is {lora.targets}; name some of {', '.join(LORA_TARGETS)}, each once")


def _number(run: RunConfig, key: str) -> float:
    return float(_value(run, key))  # type: ignore[arg-type]


def _check_model(run: RunConfig, llama: LlamaConfig) -> None:
    tensor = run.parallel.tensor
    for name, count in (("attention heads", llama.num_heads), ("key/value groups", llama.num_kv_heads)):
        if count % tensor:
            raise UserError(
                f"the model's {count} {name} do not divide by parallel.tensor={tensor}; use a divisor of {count}"
            )
    for name, width in (
        ("hidden_size", llama.hidden_size),
        ("query features", llama.num_heads * llama.head_dim // tensor),
        ("intermediate_size", llama.ffn_size // tensor),
    ):
        if run.lora.base == "nf4" and width % NF4_BLOCK:
            raise UserError(
                f"lora.base=nf4 has blocks of {NF4_BLOCK}, and a rank's {width} {name} are no multiple of it"
            )
    if llama.ffn_size % tensor:
        raise UserError(f"the model's intermediate_size {llama.ffn_size} does not divide by parallel.tensor={tensor}")
    if run.train.seq_len_tokens > llama.max_positions and not run.data.packing:  # packed rows are checked one by one
        raise UserError(
            f"train.seq_len_tokens={run.train.seq_len_tokens} is above the model's {llama.max_positions} positions"
        )


def _check_pipeline(run: RunConfig, llama: LlamaConfig) -> None:
    parallel = run.parallel
    chunks = parallel.pipeline * parallel.virtual_pipeline
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        raise UserError("parallel.virtual_pipeline above 1 needs parallel.pipeline above 1")
    extra = 2 if parallel.count_embedding_and_loss else 0
    if (llama.num_layers + extra) % chunks:
        counted = " (plus the embedding and the loss, counted as a layer each)" if extra else ""
        raise UserError(
            f"the model's {llama.num_layers} layers{counted} do not divide by parallel.pipeline x "
            f"parallel.virtual_pipeline = {chunks}; change them, or switch parallel.count_embedding_and_loss"
        )


def _data_parallel(run: RunConfig, world_size: int) -> int:
    parallel = run.parallel
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % model_ranks:
        ranks = "1 rank does" if world_size == 1 else f"{world_size} ranks do"
        raise UserError(
            f"{ranks} not divide by parallel.tensor x pipeline x context = {parallel.tensor} x {parallel.pipeline} x "
            f"{parallel.context} = {model_ranks}; start a multiple of {model_ranks} ranks (--nproc)"
        )
    return world_size // model_ranks


def _micro_batches(run: RunConfig, data_parallel: int) -> int:
    batch, parallel = run.batch, run.parallel
    a_pass = batch.micro_size * data_parallel
    if batch.global_size % a_pass:
        raise UserError(
            f"batch.global_size={batch.global_size} does not divide by batch.micro_size x data-parallel ranks = "
            f"{batch.micro_size} x {data_parallel} = {a_pass}"
        )
    micro_batches = batch.global_size // a_pass
    if parallel.virtual_pipeline > 1 and micro_batches % parallel.pipeline:
        raise UserError(
            f"{micro_batches} micro-batches a step do not divide by parallel.pipeline={parallel.pipeline}, which the "
            f"interleaved schedule needs; make batch.global_size a multiple of {a_pass * parallel.pipeline}"
        )
    return micro_batches


def _sequence_multiple(run: RunConfig, sequence_parallel: bool) -> int:
    parallel = run.parallel
    multiple = (2 * parallel.context if parallel.context > 1 else 1) * (parallel.tensor if sequence_parallel else 1)
    if run.precision.any_fp8:  # and the same padding, which is scaled with the rest, on every layout
        multiple = math.lcm(multiple, FP8_TOKENS)
    if run.speed.cuda_graphs:  # a recorded layer has one shape
        multiple = math.lcm(multiple, run.train.seq_len_tokens)
    if run.train.seq_len_tokens % multiple:
        raise UserError(
            f"train.seq_len_tokens={run.train.seq_len_tokens} does not divide by {multiple}, into which context and "
            "sequence parallelism cut it"
        )
    return multiple


def _explain(
    run: RunConfig, llama: LlamaConfig, world: int, data: int, micro: int, sequence: bool, multiple: int
) -> list[Derived]:
    parallel, batch = run.parallel, run.batch
    split = f"TP {parallel.tensor} x PP {parallel.pipeline} x CP {parallel.context}"
    passes = f"global batch {batch.global_size} / (micro-batch {batch.micro_size} x DP {data})"
    notes = [
        Derived("data-parallel ranks", data, f"{world} rank{'s' if world > 1 else ''} / ({split})"),
        Derived("micro-batches a step", micro, passes),
        Derived("parameters", f"{llama.num_parameters():,}", "from config.json"),
        Derived("bubble", f"{_bubble(run, micro):.1%}", "(PP-1) / (VP x micro-batches + PP-1)"),
    ]
    if run.parallel.sequence != sequence:
        notes.append(
            Derived("sequence parallelism", "off", "it splits what tensor parallelism leaves whole, and TP is 1")
        )
    notes += [Derived(name, "off", why) for name, why in explain_idle(run)]
    if multiple > 1:
        notes.append(
            Derived("sequence lengths", f"multiples of {multiple}", "context and sequence parallelism cut them")
        )
    padded = llama.padded_vocab_size(parallel.tensor)
    if padded != llama.vocab_size:
        notes.append(
            Derived("padded vocabulary", padded, f"{llama.vocab_size} rounded up to a multiple of TP {parallel.tensor}")
        )
    return notes


def _bubble(run: RunConfig, micro_batches: int) -> float:
    """Idle part of a step under 1F1B, interleaved or not (Narayanan et al. 2021, section 2.2)."""
    waiting = run.parallel.pipeline - 1
    return waiting / (run.parallel.virtual_pipeline * micro_batches + waiting)
