"""A RunConfig -> the `nemo_run.Partial` of NeMo's `llm.finetune` that trains the same."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from coalm_nemo.config import RunConfig
from coalm_nemo.errors import UserError
from coalm_nemo.validate import Layout, check_run
from recipes.nemo.fields import refuse_impossible, refuse_saving
from recipes.nemo.model import find_llama, model, peft

IMPORTED = "nemo_base"
"""In the run's directory: the model in NeMo's form, made by `nemo_import`."""


def require_nemo() -> None:
    """Raises UserError where NeMo's LLM collection is not installed."""
    try:
        found = importlib.util.find_spec("nemo.collections.llm") and importlib.util.find_spec("nemo_run")
    except ModuleNotFoundError:
        found = None
    if not found:
        raise UserError(
            "NeMo recipes need nemo-toolkit 2.7 and nemo_run: use the NGC container nvcr.io/nvidia/nemo:26.02, or an "
            "environment of their own (pip install 'nemo-toolkit[nlp,run]>=2.7,<3' -c constraints-nemo.txt)"
        )


def nemo_recipe(run: RunConfig, nodes: int, gpus_per_node: int = 8) -> Any:
    """`run` on `nodes` x `gpus_per_node` GPUs. Raises UserError for what cannot be had, in NeMo or at all."""
    require_nemo()
    import nemo_run
    from nemo.collections import llm

    from recipes.nemo.trainer import optimizer, trainer

    llama = find_llama(run)
    layout = check_run(run, llama, nodes * gpus_per_node)
    refuse_impossible(run, llama)
    steps = total_steps(run)
    refuse_saving(run, steps)
    return nemo_run.Partial(
        llm.finetune,
        model=model(run, llama),
        trainer=trainer(run, layout, steps, nodes, gpus_per_node),
        data=data(run, layout),
        log=log(run, steps),
        resume=resume(run),
        optim=optimizer(run, steps),
        peft=peft(run),
        tokenizer="model",
    )


def nemo_import(run: RunConfig) -> Any:
    """The Partial of `llm.import_ckpt` that turns `model.hf_path` into what `nemo_recipe(run)` starts from."""
    require_nemo()
    import nemo_run
    from nemo.collections import llm

    path = Path(run.model.hf_path).absolute()
    return nemo_run.Partial(
        llm.import_ckpt, model=model(run, find_llama(run)), source=f"hf://{path}", output_path=base(run)
    )


def base(run: RunConfig) -> Path:
    """The NeMo checkpoint to start from. Raises UserError for a checkpoint of another kind."""
    if not run.model.checkpoint:
        return Path(run.run.dir).absolute() / IMPORTED
    path = Path(run.model.checkpoint)
    if path.is_dir() and not (path / "weights").is_dir():
        raise UserError(
            f"{path} is not a NeMo checkpoint (it has no weights/); export it with `coalm convert export` and let "
            "nemo_import turn the Hugging Face directory into one"
        )
    return path.absolute()


def data(run: RunConfig, layout: Layout) -> Any:
    """Our rows in our order."""
    import nemo_run

    from recipes.nemo.data_module import RowsDataModule

    if not run.data.train:
        raise UserError("give data.train (data= in a recipe's name): a set of `coalm data build`, or rows")
    return nemo_run.Config(
        RowsDataModule,
        train=run.data.train,
        hf_path=run.model.hf_path,
        seq_length=run.train.seq_len_tokens,
        global_batch_size=run.batch.global_size,
        micro_batch_size=run.batch.micro_size,
        cache_dir=run.run.dir,
        **({"validation": run.data.validation} if run.data.validation else {}),  # nemo_run's YAML has no empty text
        validation_fraction=run.data.validation_fraction,
        packing=run.data.packing,
        pack_multiple=run.data.pack_multiple,
        length_multiple=layout.sequence_multiple,
        epochs=0.0 if run.train.steps else run.train.epochs,
        shuffle=run.data.shuffle,
        seed=run.run.seed,
        overlong=run.data.overlong,
        empty_rows=run.train.empty_rows,
    )


def total_steps(run: RunConfig) -> int:
    """Steps of the run; epochs are counted in the set. Raises UserError where it is not at hand."""
    if run.train.steps:
        return run.train.steps
    from coalm_nemo.data.batch import Shape
    from coalm_nemo.data.shards import ShardSet, is_shard_set
    from coalm_nemo.training import feed as feeding

    if not is_shard_set(Path(run.data.train)):
        raise UserError(
            f"the run is measured in epochs, and data.train={run.data.train or '(none)'} is no set of `coalm data build` on "
            "this machine to count them in; give train.steps (steps= in a recipe's name)"
        )
    rows, _ = ShardSet.load(Path(run.data.train)).split(0.0 if run.data.validation else run.data.validation_fraction)
    shape = Shape(run.train.seq_len_tokens, run.data.packing)
    feed = feeding.Feed(rows, run, shape, shuffle=run.data.shuffle, data_rank=0, data_size=1)
    return feeding.total_steps(run, len(feed.items))[0]


def log(run: RunConfig, steps: int) -> Any:
    """Directory, checkpoints and Weights & Biases."""
    import nemo_run
    from nemo import lightning as nl

    newest = nemo_run.Config(
        nl.ModelCheckpoint,
        monitor="step",  # the newest ones are kept, not the best
        mode="max",
        save_top_k=run.checkpoint.keep_last,
        save_last="link",
        every_n_train_steps=run.checkpoint.save_interval_steps or steps,
        save_optim_on_train_end=True,
        filename="{step}-{consumed_samples}",
    )
    return nemo_run.Config(
        nl.NeMoLogger,
        name="nemo",
        log_dir=run.run.dir,
        use_datetime_version=False,  # a start finds what the one before it saved
        ckpt=newest,
        wandb=_wandb(run),
    )


def _wandb(run: RunConfig) -> Any:
    import nemo_run
    from lightning.pytorch.loggers import WandbLogger

    logging = run.logging
    if logging.wandb == "disabled":
        return None
    return nemo_run.Config(
        WandbLogger,
        project=logging.wandb_project,
        entity=logging.wandb_entity or None,
        name=logging.wandb_name or Path(run.run.dir).name,
        offline=logging.wandb == "offline",
    )


def resume(run: RunConfig) -> Any:
    """The run's own newest checkpoint, else the base's weights."""
    import nemo_run
    from nemo import lightning as nl

    return nemo_run.Config(
        nl.AutoResume,
        resume_if_exists=run.checkpoint.resume,
        resume_ignore_no_checkpoint=True,
        restore_config=nemo_run.Config(nl.RestoreConfig, path=str(base(run))),
    )
