"""The typed configuration of a run. A recipe returns one; YAML files and `key=value` words change it.

Every section is a dataclass that OmegaConf checks: an unknown key or a wrong type is a UserError.
What the values mean together (layout, batch, schedule) is checked in one place: `coalm_nemo/validate.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from coalm_nemo.errors import UserError


@dataclass
class RunSection:
    """Where the run lives and what it runs on."""

    dir: str = "runs/default"
    """Everything the run writes: checkpoints, metrics.jsonl, logs, the imported base."""
    platform: str = "auto"
    """auto | cpu | cuda. "auto" is cuda where a GPU is seen, else cpu."""
    layers: str = "auto"
    """auto | transformer_engine | torch. "auto" is Transformer Engine on a GPU and plain torch on a CPU; plain torch on a
    GPU, which is slower and has no FP8, is never chosen silently."""
    seed: int = 42
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables that the ranks run with, unless the shell sets them otherwise."""


@dataclass
class ModelSection:
    """Which weights to start from."""

    hf_path: str = ""
    """Hugging Face Llama directory: config.json, tokenizer, and weights unless `init` is "random"."""
    checkpoint: str = ""
    """Megatron checkpoint to start from (`coalm convert import`). Empty: `hf_path` is imported into the run directory."""
    shape: str = ""
    """8b | 70b | 405b: Llama 3.1's shape, for plans and dry runs where no model is at hand."""
    init: str = "pretrained"
    """pretrained | random. "random" draws the weights from the seed: the same ones on every layout."""


@dataclass
class ParallelSection:
    """How the model and the batch are split over ranks."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    """Model chunks a pipeline rank holds; above 1 the interleaved schedule runs."""
    context: int = 1
    sequence: bool = True
    """Split activations between tensor-parallel regions along the sequence; takes effect with tensor > 1."""
    count_embedding_and_loss: bool = False
    """Count the embedding and the loss as a layer each when layers are dealt to pipeline chunks."""
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False


@dataclass
class LoraSection:
    """Low-rank adapters instead of full fine-tuning."""

    rank: int = 0
    """0: every weight is trained."""
    alpha: float = 32.0
    """The adapters' output is scaled by alpha / rank."""
    targets: list[str] = field(default_factory=lambda: ["q", "k", "v", "o", "gate", "up", "down"])
    """Projections that get an adapter."""
    dropout: float = 0.0
    """Part of an adapter's input that is dropped in training."""
    base: str = "as_trained"
    """as_trained | nf4. nf4 is QLoRA: the frozen linear layers are kept in 4 bits and made `precision.dtype` again where
    they are used. Adapters are merged into the base as it was, not as it was rounded."""
    start_from: str = ""
    """A PEFT directory (adapter_config.json, adapter_model.safetensors) whose adapters training starts from."""


@dataclass
class PrecisionSection:
    """Arithmetic of the forward and backward pass."""

    dtype: str = "bf16"
    """fp32 | bf16 | fp8_current | fp8_blockwise | fp8_delayed | fp8_scaled_mm | fp8_emulated_current |
    fp8_emulated_blockwise | fp8_emulated_delayed. Master weights, gradients and moments are fp32 with all.

    FP8 is Transformer Engine's: matrix products of the layers in e4m3 (gradients e5m2), everything else bf16. Scales are
    the current tensor's (the H100's default), of 128x128 and 1x128 blocks, or from the last steps' largest values.
    `fp8_scaled_mm` is the current tensor's through torch's own FP8 product, for GPUs without Transformer Engine
    (models/fp8_scaled_mm.py). Emulated, the same casts are done in plain torch (models/fp8_emulation.py): on CPU, and on
    GPUs without FP8."""
    bf16_layers_at_start: int = 0
    """With FP8: this many first layers stay in bf16."""
    bf16_layers_at_end: int = 0
    fp8_params: bool = False
    """With FP8: weights are kept and gathered in FP8 (fp32 masters in the distributed optimizer), for memory and speed."""
    gradients: str = "fp32"
    """fp32 | bf16: what gradients are accumulated and reduced in. bf16 halves their memory and their traffic."""
    fp8_weight_gradients: bool = True
    """With FP8: the products that give weight gradients run in FP8 too."""
    amax_history_len: int = 1024
    """With delayed scaling: how many passes the largest value is looked for in. Transformer Engine's default."""
    emulation_weights: str = "fp32"
    """fp32 | bf16: with emulated FP8, weights and what lies between the products. bf16 is what real FP8 has; fp32 shows
    FP8's part alone, is the faster on CPU, and is the same on every layout."""

    @property
    def fp8(self) -> str:
        """Scaling recipe of Transformer Engine's FP8 ("current", "blockwise", "delayed"), or "" without it."""
        own = self.any_fp8 and not self.scaled_mm and not self.emulated_fp8
        return self.dtype.removeprefix("fp8_") if own else ""

    @property
    def any_fp8(self) -> bool:
        """FP8 of any kind."""
        return self.dtype.startswith("fp8_")

    @property
    def scaled_mm(self) -> bool:
        """FP8 through torch's scaled matrix product."""
        return self.dtype == "fp8_scaled_mm"

    @property
    def emulated_fp8(self) -> str:
        """Scaling recipe of emulated FP8, or ""."""
        emulated = "fp8_emulated_"
        return self.dtype.removeprefix(emulated) if self.dtype.startswith(emulated) else ""

    @property
    def weights(self) -> str:
        """Dtype of the weights outside the optimizer, by torch's name."""
        kept = self.emulation_weights if self.emulated_fp8 else self.dtype
        return "float32" if kept == "fp32" else "bfloat16"


@dataclass
class SpeedSection:
    """What makes a step faster and changes no result beyond rounding: docs/performance.md has each one's gain and limits."""

    tensor_overlap: bool = False
    """Tensor parallelism's gathers and scatters run beside the matrix products that they feed. Transformer Engine's."""
    gradient_fusion: bool = False
    """The product that makes a weight's gradient adds it into the gradient buffer itself. Needs a kernel of Apex."""
    defer_embedding_gradient: bool = False
    """The output layer's weight gradients wait for the end of the step, when the last stage has nothing else to do. Not
    with `parallel.overlap_grad_reduce`, which would reduce without them."""
    deferral_limit: int = 50
    """At most so many micro-batches wait, each with the gradient of its logits; 0: all of them."""
    fused_loss: bool = False
    """Softmax and cross entropy in fused kernels with one collective less. CUDA only; the logits' gradient is bf16."""
    cuda_graphs: bool = False
    """Layers are recorded once and replayed. Only for rows that are not packed, which it pads to `train.seq_len_tokens`."""
    collect_interval_steps: int = 100
    """Python's garbage collector runs every so many steps, on all ranks at once, and never between; 0: when it likes."""
    prefetch_steps: int = 1
    """Steps whose micro-batches are made beforehand, by a thread beside the training; 0: none."""


@dataclass
class BatchSection:
    """Rows (packs, with packing) a step and a forward pass."""

    global_size: int = 8
    micro_size: int = 1


@dataclass
class DataSection:
    """Rows to learn from."""

    train: str = ""
    """A set of `coalm data build`, or JSONL: `messages`, or `instruction`/`input`/`output`, or `text` (every token
    supervised)."""
    validation: str = ""
    """The same forms."""
    validation_fraction: float = 0.0
    """Part of `train` set aside by row hash where `validation` is empty."""
    packing: bool = False
    """Put whole rows side by side into sequences of `train.seq_len_tokens`; no row attends to another."""
    pack_multiple: int = 4
    """Row lengths are rounded up to this when packs are formed. Context parallelism pads rows to 2 x its size; a fixed
    multiple keeps the packs, and so the order of rows, the same on every layout with 2 x context dividing it. A set's
    own packs are used if they were made with the same."""
    overlong: str = "error"
    """error | drop: what happens to a row longer than `train.seq_len_tokens`. Nothing is ever cut."""
    shuffle: bool = True
    prepare_timeout_s: int = 86400
    """How long other ranks wait for the first one to tokenise and import."""


@dataclass
class TrainSection:
    """Length and memory of the run."""

    steps: int = 0
    """Optimizer steps; 0: as many as `epochs` gives."""
    epochs: float = 1.0
    seq_len_tokens: int = 4096
    recompute: str = "none"
    """none | selective (core attention) | full (every layer)."""
    eval_interval_steps: int = 0
    """Validation loss every so many steps, and at the end; 0: only at the end."""
    empty_rows: str = "error"
    """error | drop: what happens to a row without one supervised token."""


@dataclass
class EvaluationSection:
    """Calls and states that the model answers while it trains: greedily, on its own layout, without an export."""

    every_steps: int = 0
    """0: never; else every so many steps, and at the end."""
    data: str = ""
    """Held-out rows or a built set, as `data.validation`; a row counts if its last answer is a call or a state."""
    rows: int = 64
    """Only the first so many."""
    max_new_tokens: int = 128


@dataclass
class OptimizerSection:
    """AdamW; weight decay skips norms and biases."""

    lr: float = 1e-5
    min_lr: float = 0.0
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    """Largest global gradient norm; 0: no clipping."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    moments: str = "fp32"
    """fp32 | bf16: what Adam's two moments are kept in. bf16 takes Transformer Engine's optimizer."""


@dataclass
class ScheduleSection:
    """Learning rate over steps."""

    name: str = "cosine"
    """constant | linear | cosine, down to `optimizer.min_lr` at the last step."""
    warmup_steps: int = -1
    """Steps from zero up to `optimizer.lr`; -1: `warmup_ratio` of all steps."""
    warmup_ratio: float = 0.1


@dataclass
class CheckpointSection:
    """What is saved, when, and what a new start does with it."""

    save_interval_steps: int = 0
    """0: only at the end (and when a signal stops the run)."""
    keep_last: int = 2
    milestone_interval_steps: int = 0
    """Checkpoints at multiples of this are never deleted; 0: none."""
    async_save: bool = False
    """Write in the background while training goes on."""
    resume: bool = True
    """Go on from the newest sound checkpoint in the run directory, if there is one."""
    save_final: bool = True


@dataclass
class LoggingSection:
    """Who is told."""

    console_interval_steps: int = 1
    wandb: str = "disabled"
    """disabled | offline | online."""
    wandb_project: str = "coalm"
    wandb_entity: str = ""
    wandb_name: str = ""
    wandb_timeout_s: float = 90.0
    """How long W&B may take to answer at the start; then the run logs offline. The training does not wait for it."""
    wandb_finish_s: float = 60.0
    """How long the end of the run waits for W&B to take what is left."""
    loss_by_source: bool = True
    """Log the loss of each source of a built set, where it has several."""


@dataclass
class HealthSection:
    """What a run watches in itself."""

    hang_factor: float = 20.0
    """No step for this many median steps is a hang: every rank prints its stack and ends with exit code 5. 0: not watched."""
    hang_floor_s: float = 300.0
    """No shorter wait is a hang."""
    hang_slow_s: float = 1800.0
    """Longest time for the first step, a validation or a save."""
    straggler_interval_steps: int = 50
    """Every rank's own speed is compared this often; 0: never."""
    straggler_ratio: float = 1.5
    """A rank this many times slower than the median, three times in a row, is named."""


@dataclass
class RunConfig:
    """A whole run."""

    run: RunSection = field(default_factory=RunSection)
    model: ModelSection = field(default_factory=ModelSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    lora: LoraSection = field(default_factory=LoraSection)
    precision: PrecisionSection = field(default_factory=PrecisionSection)
    speed: SpeedSection = field(default_factory=SpeedSection)
    batch: BatchSection = field(default_factory=BatchSection)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    logging: LoggingSection = field(default_factory=LoggingSection)
    health: HealthSection = field(default_factory=HealthSection)


def known_keys() -> list[str]:
    """Every dotted key of a RunConfig, in order."""
    return [f"{section.name}.{f.name}" for section in fields(RunConfig) for f in fields(_section_type(section.name))]


def build_config(base: RunConfig, files: Sequence[Path] = (), overrides: Iterable[str] = ()) -> RunConfig:
    """`base`, then each YAML file, then each `key=value` word; later ones win.

    Raises UserError for a missing or unreadable file, an unknown key (naming the nearest known one), or a wrong type.
    """
    from omegaconf import OmegaConf

    config = OmegaConf.structured(base)
    for path in files:
        _merge(config, _read_yaml(path), str(path))
    for word in overrides:
        _merge(config, _parse_override(word), f"'{word}'")
    result = OmegaConf.to_object(config)
    assert isinstance(result, RunConfig)
    return result


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML, ready to be given back with --config."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _merge(config: Any, values: dict[str, Any], where: str) -> None:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for key, value in _flatten(values):
        if key not in known_keys():
            raise UserError(f"unknown key '{key}' in {where}{_suggest(key)}")
        try:
            OmegaConf.update(config, key, value)
        except OmegaConfBaseException as e:
            reason = str(e).splitlines()[0].rstrip(".")
            raise UserError(f"{where}: {key} cannot be {value!r} ({reason})") from e


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and "." not in name:
            yield from _flatten(value, f"{name}.")
        else:
            yield name, value


def _parse_override(word: str) -> dict[str, Any]:
    from omegaconf import OmegaConf

    key, sign, value = word.partition("=")
    if not sign or not key:
        raise UserError(f"'{word}' is not of the form key=value (for example train.steps=100)")
    if value and _is_text(key):  # a path such as /data/a=b.jsonl or [x].jsonl is text, not YAML
        return {key: value}
    try:
        parsed = OmegaConf.create(f"v: {value}").v if value else ""
    except Exception as e:
        raise UserError(f"'{word}': the value is not valid YAML") from e
    return {key: parsed}


def _is_text(key: str) -> bool:
    section, _, name = key.partition(".")
    kinds = {f.name: f.type for f in fields(_section_type(section))} if _section_type(section) else {}
    return kinds.get(name) == "str"


def _section_type(name: str) -> Any:
    for f in fields(RunConfig):
        if f.name == name and callable(f.default_factory) and is_dataclass(f.default_factory):
            return f.default_factory
    return None


def _read_yaml(path: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    if not Path(path).is_file():
        raise UserError(f"the configuration file {path} does not exist")
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as e:
        raise UserError(f"{path} is not valid YAML: {str(e).splitlines()[0]}") from e
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold sections such as 'train:' with keys below them")
    return {str(k): v for k, v in values.items()}


def _suggest(key: str) -> str:
    names = known_keys()
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    if not near:
        tail = key.rpartition(".")[2]
        by_tail = {n.rpartition(".")[2]: n for n in names}
        near = [by_tail[m] for m in difflib.get_close_matches(tail, by_tail, n=1, cutoff=0.6)]
    return f"; did you mean '{near[0]}'?" if near else f"; sections are {', '.join(f.name for f in fields(RunConfig))}"
