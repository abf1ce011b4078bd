"""Training checkpoints: written aside, hashed, renamed; reshardable to any layout; the newest sound one is used.

`RUN/checkpoints/step_00000010/` holds megatron-core's torch_dist files (weights, optimizer), `hf/` (config, tokenizer,
chat template of the base), `coalm.json` and `manifest.json` with a SHA-256 of every file. Learning rate, random state
and data position are pure functions of the step, so nothing else has to be kept.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from coalm_nemo.checkpoint import layout
from coalm_nemo.checkpoint.lora import AdapterInfo, write_adapter_info
from coalm_nemo.checkpoint.torch_dist import read_metadata
from coalm_nemo.errors import UserError
from coalm_nemo.models.gpt import LlamaModel
from coalm_nemo.models.lora import is_adapter_key
from coalm_nemo.models.nf4 import fill, hollow_weights, place_weight
from coalm_nemo.training import fp8_state
from coalm_nemo.training.callbacks.base import SaveNote
from coalm_nemo.training.setup import Trainee, inner_optimizers

SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}
WRITERS_PER_RANK = 2
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
RESERVE_BYTES = 2**26
"""Kept free for the small files that rank 0 writes last; less where the checkpoint itself is small."""


class SaveFailed(Exception):
    """A checkpoint could not be written; every rank raises it, rank 0 with the reason."""


@dataclass(frozen=True)
class Progress:
    """Where the run stands; kept in `coalm.json`."""

    step: int
    """Optimizer steps done."""
    consumed_items: int
    """Rows (packs) seen since the start: the sampler's position."""
    data_fingerprint: str


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first (a name without a dot in front was renamed, so it was finished)."""
    return sorted(p for p in Path(directory).glob("step_*") if (p / layout.MANIFEST_FILE).is_file())


def model_state(models: list[LlamaModel]) -> dict[str, Any]:
    """Sharded state of every chunk. The keys inside name layers globally, whatever chunk they are in."""
    return {f"model{i}": m.sharded_state_dict() for i, m in enumerate(models)}


def trained_state(models: list[LlamaModel]) -> dict[str, Any]:
    """What training changes: everything, or with LoRA the adapters alone."""
    state = model_state(models)
    if not any(is_adapter_key(key) for part in state.values() for key in part):
        return state
    return {name: {k: v for k, v in part.items() if is_adapter_key(k)} for name, part in state.items()}


def load_model_state(models: list[LlamaModel], checkpoint: Path) -> None:
    """Weights of any Megatron checkpoint (imported base or training) into these chunks; adapters stay as they are."""
    state = {n: {k: v for k, v in part.items() if not is_adapter_key(k)} for n, part in model_state(models).items()}
    wanted = without_extra_state(state)
    hollow = {name for model in models for layer in hollow_weights(model) for name, _ in layer}
    loaded = _load({n: {k: v for k, v in part.items() if k not in hollow} for n, part in wanted.items()}, checkpoint)
    for i, model in enumerate(models):
        _load_strictly(model, loaded[f"model{i}"], hollow)
        _fill_hollow(model, checkpoint)


def _fill_hollow(model: LlamaModel, checkpoint: Path) -> None:
    """QLoRA's base: one layer's weights are there at a time. A lone rank has to ask for a tensor's layers together."""
    layers, device = hollow_weights(model), _device()
    if torch.distributed.get_world_size() == 1:
        layers, device = [[pair for layer in layers for pair in layer]], torch.device("cpu")
    for layer in layers:
        for _, linear in layer:
            place_weight(linear, device)
        names = dict(layer)
        state = {k: v for k, v in model.sharded_state_dict().items() if k in names}
        for name, weight in _load({"model": state}, checkpoint, whole=False)["model"].items() if state else ():
            fill(names[name], weight.to(_device()))
            place_weight(names[name], torch.device("meta"))


def _device() -> torch.device:
    return torch.device(torch.cuda.current_device())


def without_extra_state(state: Any) -> Any:
    """Drop Transformer Engine's `_extra_state` entries: empty outside FP8, and other layer specs have other ones."""
    if isinstance(state, dict):
        return {k: without_extra_state(v) for k, v in state.items() if not str(k).endswith("_extra_state")}
    return state


def _load(wanted: dict[str, Any], checkpoint: Path, *, whole: bool = True) -> dict[str, Any]:
    """`whole`: all ranks together ask for all of every tensor, which is checked."""
    try:
        return dict(dist_checkpointing.load(wanted, str(checkpoint), validate_access_integrity=whole))
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"{checkpoint} cannot be loaded into this model: {str(e).splitlines()[0][:300]}") from e


def _load_strictly(model: LlamaModel, state: dict[str, Any], hollow: Container[str] = ()) -> None:
    missing, unexpected = model.load_state_dict(state, strict=False)
    adapters = any(is_adapter_key(k) for k in state)  # with LoRA the base and the adapters come one after the other
    missing = [k for k in missing if not k.endswith("_extra_state") and is_adapter_key(k) == adapters]
    tied = model.share_embeddings_and_output_weights
    missing = [k for k in missing if not (tied and k == "output_layer.weight") and k not in hollow]
    if missing or unexpected:
        raise RuntimeError(f"checkpoint and model disagree: missing {missing[:3]}, unexpected {unexpected[:3]}")


class Checkpointer:
    """Saves and restores a Trainee under `directory`."""

    def __init__(
        self,
        directory: Path,
        hf_source: Path,
        *,
        dtype: str,
        parameters: int,
        keep_last: int,
        milestone_steps: int = 0,
        asynchronous: bool = False,
        adapter: AdapterInfo | None = None,
        delayed_scaling: bool = False,
        on_saved: Callable[[SaveNote], None] = lambda note: None,
        warn: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self.directory = Path(directory)
        self._reserve = self.directory / ".reserve"
        self.hf_source = hf_source
        self.dtype = dtype
        self.keep_last = keep_last
        self.milestone_steps = milestone_steps
        self.queue = AsyncCallsQueue(persistent=False) if asynchronous else None
        self.adapter = adapter
        self.delayed_scaling = delayed_scaling
        self.scales: dict[str, torch.Tensor] = {}
        self.on_saved = on_saved
        self.warn = warn
        self.save_seconds: list[float] = []
        """Of this process's saves; rank 0 alone knows them."""
        self._pending: tuple[int, bool] = (0, False)
        # Weights, and in fp32 the masters and Adam's two moments.
        self.expected_bytes = parameters * (_DTYPE_BYTES[dtype] + 3 * 4)
        self.rank = torch.distributed.get_rank()

    def save(self, trainee: Trainee, progress: Progress, *, required: bool = False) -> None:
        """Write a checkpoint; in the background if asked. All ranks call it at the same step.

        What cannot be saved (no room, a file system that fails) is told as a warning, the checkpoints before it stay, and
        training goes on; for a `required` one (the last of the run) it raises UserError.
        """
        self.wait()
        started = time.monotonic()
        self._pending = (progress.step, required)
        final = self.directory / checkpoint_name(progress.step)
        aside = self.directory / f".{final.name}.partial"
        if problem := self._no_room(aside):
            self._not_saved(problem)
            return
        if self.delayed_scaling:
            self.scales = fp8_state.gather(trainee.models())
        request = self._request(trainee, aside)
        request.finalize_fns.insert(0, lambda: self._reserve.unlink(missing_ok=True))
        request.add_finalize_fn(lambda: self._finish(aside, final, progress, started))
        if self.queue is None:
            self._told(request.execute_sync)
        else:
            self.queue.schedule_async_request(request)

    def _told(self, work: Callable[[], object]) -> None:
        """Do what saves; a failure, on which all ranks agree, becomes a warning or a UserError."""
        try:
            work()
        except CheckpointException as e:
            self._not_saved(next((str(error) for error, _ in e.failures.values()), "another rank knows why"))
        except SaveFailed as e:
            self._not_saved(str(e))

    def _not_saved(self, problem: str) -> None:
        step, required = self._pending
        if self.rank == 0:
            shutil.rmtree(self.directory / f".{checkpoint_name(step)}.partial", ignore_errors=True)
            self._reserve.unlink(missing_ok=True)
        if required:
            raise UserError(f"step {step} cannot be saved: {problem}")
        self.warn(f"step {step} is not saved: {problem}")

    def _no_room(self, aside: Path) -> str | None:
        """Rank 0 looks and makes the directory, all ranks hear the same answer."""
        answer: list[str | None] = [None]
        if self.rank == 0:
            try:
                shutil.rmtree(aside, ignore_errors=True)
                layout.ensure_free_space(self.directory, self.expected_bytes)
                aside.mkdir(parents=True)
                with self._reserve.open("wb") as file:  # a quota shows in no free space
                    os.posix_fallocate(file.fileno(), 0, min(RESERVE_BYTES, self.expected_bytes // 50 + 1))
            except (UserError, OSError) as e:
                answer = [str(e)]
        torch.distributed.broadcast_object_list(answer, src=0)
        return answer[0]

    def _request(self, trainee: Trainee, aside: Path) -> AsyncRequest:
        for chunk in trainee.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)
        state = trained_state(trainee.models())
        state["optimizer"] = trainee.optimizer.sharded_state_dict(state, metadata=SHARDING)
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=WRITERS_PER_RANK)
        request = dist_checkpointing.save(state, str(aside), strategy, async_sharded_save=True)
        assert request is not None
        return request

    def _finish(self, aside: Path, final: Path, progress: Progress, started: float) -> None:
        """Hash what this rank wrote; rank 0 adds the side files and the manifest, then renames."""
        try:
            mine: Any = {p.name: layout.sha256_of(p) for p in aside.glob(f"__{self.rank}_*.distcp")}
        except OSError as e:
            mine = str(e)
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, mine)
        problem = [next((told for told in everyone if isinstance(told, str)), None)]
        if self.rank == 0 and problem[0] is None:
            try:
                self._publish(aside, final, progress, {k: v for d in everyone for k, v in d.items()}, started)
            except OSError as e:
                problem = [str(e)]
        torch.distributed.broadcast_object_list(problem, src=0)
        if problem[0] is not None:
            raise SaveFailed(problem[0])

    def _publish(self, aside: Path, final: Path, progress: Progress, digests: dict[str, str], started: float) -> None:
        shutil.copytree(self.hf_source, aside / "hf", dirs_exist_ok=True)
        info = layout.CheckpointInfo(
            kind="adapter" if self.adapter is not None else "training",
            step=progress.step,
            dtype=self.dtype,
            source=str(self.hf_source),
            consumed_items=progress.consumed_items,
            data_fingerprint=progress.data_fingerprint,
        )
        layout.write_info(aside, info)
        if self.adapter is not None:
            write_adapter_info(aside, self.adapter)
        if self.scales:
            fp8_state.write(aside, self.scales)
        layout.write_manifest(aside, digests)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(aside, final)
        layout.fsync_path(self.directory)
        self._prune()
        size = sum(p.stat().st_size for p in final.rglob("*") if p.is_file())
        self.save_seconds.append(time.monotonic() - started)
        self.on_saved(SaveNote(progress.step, str(final), size, self.save_seconds[-1]))

    def _prune(self) -> None:
        """Delete what is older than the last K and no milestone."""
        for path in list_checkpoints(self.directory)[: -self.keep_last]:
            step = int(path.name.removeprefix("step_"))
            if not (self.milestone_steps and step % self.milestone_steps == 0):
                shutil.rmtree(path, ignore_errors=True)

    def poll(self) -> None:
        """Finish a background save if it is done. All ranks call it at the same step."""
        if (queue := self.queue) is not None:
            self._told(lambda: queue.maybe_finalize_async_calls(blocking=False))

    def wait(self) -> None:
        """Finish a background save."""
        if (queue := self.queue) is not None:
            self._told(lambda: queue.maybe_finalize_async_calls(blocking=True))

    def newest_sound(self) -> Path | None:
        """The newest checkpoint whose files match its manifest; every rank checks a share of each.

        What a killed save left behind is removed on the way.
        Raises UserError if there are checkpoints and none is sound: starting over would hide the loss.
        """
        if self.rank == 0:
            for torn in self.directory.glob(".step_*.partial"):
                shutil.rmtree(torn)
        found = list_checkpoints(self.directory)
        for path in reversed(found):
            problem = self._problem(path)
            if problem is None:
                return path
            self.warn(f"{problem}; going back to the checkpoint before it")
        if found:
            raise UserError(
                f"none of the {len(found)} checkpoints in {self.directory} is sound; move them away to start anew"
            )
        return None

    def refuse_unsound(self, path: Path) -> None:
        """Raises UserError on every rank if a file of `path` does not match its manifest; each rank hashes a share."""
        if problem := self._problem(path):
            raise UserError(problem)

    def _problem(self, path: Path) -> str | None:
        """Damaged, or not to be trusted: torch would run whatever the pickle `.metadata` names, so it is read first by
        our own reader, which runs nothing."""
        try:
            layout.check_manifest(path, full=True, share=(self.rank, torch.distributed.get_world_size()))
            if self.rank == 0:
                read_metadata(path)
            mine = None
        except UserError as e:
            mine = str(e)
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, mine)
        return next((p for p in everyone if p), None)

    def restore(self, trainee: Trainee, path: Path) -> Progress:
        """Weights and optimizer of `path`, from whatever layout, into this one."""
        state = trained_state(trainee.models())
        create_adam_state(trainee.optimizer)
        optimizer = trainee.optimizer.sharded_state_dict(state, is_loading=True, metadata=SHARDING)
        loaded = _load({**without_extra_state(state), "optimizer": optimizer}, path)
        for i, model in enumerate(trainee.models()):
            _load_strictly(model, loaded[f"model{i}"])
        trainee.optimizer.load_state_dict(loaded["optimizer"])
        unshare_adam_steps(trainee.optimizer)
        info = layout.read_info(path)
        return Progress(info.step, info.consumed_items, info.data_fingerprint)


def create_adam_state(optimizer: Any) -> None:
    """Zero moments where torch's AdamW has not stepped yet: megatron-core's load template is made from what is there."""
    for inner in inner_optimizers(optimizer):
        if not isinstance(inner, torch.optim.AdamW):
            continue
        for parameter in (p for group in inner.param_groups for p in group["params"] if not inner.state[p]):
            inner.state[parameter] = {
                "step": torch.tensor(0.0, device=parameter.device),  # where the fused update wants it
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def unshare_adam_steps(optimizer: Any) -> None:
    """Give every parameter a step counter of its own.

    After a load, megatron-core's distributed optimizer leaves one tensor as the `step` of all parameters; torch's AdamW
    then advances it once a parameter and the bias correction goes wrong, silently.
    """
    for inner in inner_optimizers(optimizer):
        for parameter, state in inner.state.items():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].to(parameter.device, copy=True)
