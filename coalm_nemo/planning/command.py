"""`coalm plan`: which layouts fit, how fast they are, and why."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from coalm_nemo.config import RunConfig
from coalm_nemo.errors import UserError
from coalm_nemo.models.llama import LlamaConfig
from coalm_nemo.planning.estimate import Estimate, estimate
from coalm_nemo.planning.explain import why, why_others
from coalm_nemo.planning.hardware import GIB, find_gpu
from coalm_nemo.planning.job import Job, Layout
from coalm_nemo.planning.legality import check_legal, parse_layout
from coalm_nemo.planning.memory import Parts, stage_memory
from coalm_nemo.planning.page import nothing_fits, page, parts_table, time_table
from coalm_nemo.planning.search import Found, search
from coalm_nemo.planning.shapes import find_shape

DEFAULT_LORA_RANK = 16
METHODS = {"full": "sft", "lora": "lora", "qlora": "lora"}


@dataclass(frozen=True)
class PlanRequest:
    """The words of the command; what is empty or 0 comes from the recipe, else from a default."""

    gpus: int
    model: str = ""
    """8b | 70b | 405b, or a Hugging Face directory."""
    gpu: str = "h100-80gb"
    seq_len_tokens: int = 0
    global_batch: int = 0
    micro_batch: int = 0
    task: str = ""
    """pretrain | sft | lora as published figures name them: LoRA on qkv alone unless `lora_targets` says otherwise."""
    method: str = ""
    """full | lora as CoALM trains: LoRA on every linear layer unless `lora_targets` says otherwise."""
    precision: str = ""
    lora_targets: str = ""
    lora_rank: int = 0
    attended_tokens: float = 0.0
    layout: str = ""
    """`tensor=8,pipeline=8,...`: this layout alone; what it does not name has Layout's defaults."""


def plan_command(
    request: PlanRequest,
    run: RunConfig | None = None,
    top: int = 10,
    as_json: bool = False,
    picture: Path | None = None,
    base: Layout | None = None,
    write: Path | None = None,
) -> None:
    """Print the plan, write its picture, and the best layout as YAML for `coalm train --config`.

    Raises UserError for bad input and where nothing fits. `base` says what a search does not vary: FP8 parameters, the
    precision of gradients, the distributed optimizer.
    """
    if top < 1:
        raise UserError(f"--top is {top}; it must be at least 1")
    if picture and picture.suffix.lower() != ".png":
        raise UserError(f"--picture {picture} must end in .png")
    job = make_job(request, run)
    found = plan_one(job, request) if request.layout else search(job, base, request.micro_batch)
    listed = (found.fitting + found.too_large)[:1] if request.layout else found.fitting[:top]
    if not listed:
        raise UserError(nothing_fits(job, found))
    if as_json:
        print(json.dumps([as_dict(e, listed[0]) for e in listed], indent=2))
    else:
        lines = [*page(job, listed), *([] if request.layout else ["", *why_others(found, len(listed))])]
        print("\n".join([*lines, "", *parts_table(listed[0]), "", *time_table(listed[0])]))
    if picture:
        from coalm_nemo.planning.picture import draw_plan

        draw_plan(listed, picture)
    if write:
        _write(write, overrides_of(listed[0]))


def _write(path: Path, text: str) -> None:
    """Whole or not at all. Raises UserError where it cannot be written."""
    aside = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError as e:
        raise UserError(f"{path} cannot be written ({e.strerror})") from e


def changes_of(best: Estimate) -> dict[str, object]:
    """The layout as settings of a RunConfig."""
    layout, values = best.layout, {}
    for name in ("tensor", "pipeline", "virtual_pipeline", "context", "sequence", "count_embedding_and_loss"):
        values[f"parallel.{name}"] = getattr(layout, name)
    values["parallel.distributed_optimizer"] = layout.distributed_optimizer
    if not layout.distributed_optimizer:
        values["parallel.overlap_param_gather"] = False
    if layout.context > 1:  # every row is cut into 2 x context parts
        values["data.pack_multiple"] = max(4, 2 * layout.context)
    values |= {"batch.global_size": best.job.global_batch, "batch.micro_size": layout.micro_batch}
    values |= {"train.recompute": layout.recompute, "optimizer.moments": "bf16" if layout.moment_bytes == 2 else "fp32"}
    return values | ({"precision.fp8_params": layout.fp8_params} if best.job.precision == "fp8" else {})


def overrides_of(best: Estimate) -> str:
    """The layout as the YAML that changes a recipe to it: what `--gpus 256` makes of a recipe for 128."""
    rate = f"{best.tokens_per_s_per_gpu:.0f} tokens/s/GPU predicted"
    lines, section = [f"# {best.layout.short()} on {best.job.gpus} {best.job.gpu.name}: {rate}"], ""
    for key, value in changes_of(best).items():
        if key.split(".")[0] != section:
            section = key.split(".")[0]
            lines.append(f"{section}:")
        lines.append(f"  {key.split('.')[1]}: {str(value).lower()}")
    return "\n".join(lines) + "\n"


def make_job(request: PlanRequest, run: RunConfig | None = None, llama: LlamaConfig | None = None) -> Job:
    """The job that the words, the recipe and the defaults make together; `llama`: the model, where it is at hand.

    Raises UserError for unknown names.
    """
    run = run or _defaults()
    wanted = request.model or run.model.hf_path or run.model.shape
    name, shape = (Path(wanted).name, llama) if llama else find_shape(wanted)
    precision = request.precision or run.precision.dtype
    return Job(
        model=shape,
        gpus=request.gpus,
        global_batch=request.global_batch or run.batch.global_size,
        seq_len_tokens=request.seq_len_tokens or run.train.seq_len_tokens,
        task=_task(request, run),
        precision="fp8" if precision.startswith("fp8") and "emulated" not in precision else precision,
        gpu=find_gpu(request.gpu),
        attended_tokens=request.attended_tokens,
        lora_rank=request.lora_rank or run.lora.rank or DEFAULT_LORA_RANK,
        lora_targets=request.lora_targets or _lora_targets(request, run),
        nf4_base=request.method == "qlora" or (not request.method and run.lora.base == "nf4"),
        name=name,
        packed=run.data.packing,
    )


def _defaults() -> RunConfig:
    """What a plan without a recipe assumes."""
    run = RunConfig()
    run.precision.dtype, run.batch.global_size, run.train.seq_len_tokens = "fp8", 64, 4096
    run.data.packing = run.speed.tensor_overlap = True
    return run


def _task(request: PlanRequest, run: RunConfig) -> str:
    """pretrain | sft | lora. Raises UserError where --task and --method contradict each other."""
    if request.method and request.method not in METHODS:
        raise UserError(f"--method {request.method} is not known; use full, lora or qlora")
    if request.task and request.method and (request.task == "lora") != (METHODS[request.method] == "lora"):
        raise UserError(f"--task {request.task} and --method {request.method} do not agree; give one of them")
    return request.task or METHODS.get(request.method, "lora" if run.lora.rank else "sft")


def _lora_targets(request: PlanRequest, run: RunConfig) -> str:
    """qkv as published runs have it where --task names LoRA, else what the recipe trains."""
    return "qkv" if request.task == "lora" else ",".join(run.lora.targets)


def plan_one(job: Job, request: PlanRequest) -> Found:
    """The one layout that was asked for, in the list it belongs to. Raises UserError if it is not legal."""
    base = replace(Layout(), micro_batch=request.micro_batch or 1)
    layout = parse_layout(request.layout, base, job.model)
    check_legal(job, layout)
    one = estimate(job, layout)
    return Found(fitting=[one]) if one.fits else Found(too_large=[one])


def layout_of(run: RunConfig) -> Layout:
    """The layout a configuration asks for; also the `base` of a search that keeps its FP8 parameters and optimizer."""
    parallel = run.parallel
    return Layout(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        context=parallel.context,
        micro_batch=run.batch.micro_size,
        recompute=run.train.recompute,
        sequence=parallel.sequence,
        count_embedding_and_loss=parallel.count_embedding_and_loss,
        distributed_optimizer=parallel.distributed_optimizer,
        fp8_params=run.precision.fp8_params,
        gradient_bytes=2 if run.precision.gradients == "bf16" else 4,
        moment_bytes=2 if run.optimizer.moments == "bf16" else 4,
        bf16_layers_at_start=run.precision.bf16_layers_at_start,
        bf16_layers_at_end=run.precision.bf16_layers_at_end,
        fp8_weight_gradients=run.precision.fp8_weight_gradients,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        tensor_overlap=run.speed.tensor_overlap,
    )


def as_dict(e: Estimate, best: Estimate) -> dict[str, Any]:
    """A layout as JSON. Memory is in GiB; `memory_gb` is the first stage's peak, as logs and published figures have it."""
    causal, full = e.both_mfu
    return {
        **asdict(e.layout),
        "data_parallel": e.layout.data_parallel(e.job.gpus),
        "micro_batches": e.layout.micro_batches(e.job),
        "tokens_per_s_per_gpu": round(e.tokens_per_s_per_gpu, 2),
        "step_s": round(e.time.total, 4),
        "bubble_fraction": round(e.bubble_fraction, 5),
        "memory_gb": round(e.memory.first.allocated / GIB, 2),
        "memory_worst_gb": round(e.memory.worst.allocated / GIB, 2),
        "memory_worst_stage": e.memory.worst_stage,
        "memory_reserve_gb": round(e.memory.worst.reserve / GIB, 2),
        "memory_spare_gb": round(e.spare / GIB, 2),
        "fits": e.fits,
        "memory_parts_gb": _in_gib(e.memory.worst),
        "memory_stages_gb": {str(s): _in_gib(stage_memory(e.job, e.layout, s)) for s in range(e.layout.pipeline)},
        "time_parts_s": {k: round(v, 4) for k, v in asdict(e.time).items()},
        "mfu_causal": round(causal, 4),
        "mfu_full": round(full, 4),
        "epoch_hours": round(e.epoch_gpu_hours / e.job.gpus, 3),
        "epoch_gpu_hours": round(e.epoch_gpu_hours, 1),
        "why": why(e, best),
    }


def _in_gib(parts: Parts) -> dict[str, float]:
    return {k: round(v / GIB, 2) for k, v in asdict(parts).items()}
