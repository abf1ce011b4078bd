"""The `coalm` command: one thin function a verb."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from coalm_nemo.config import RunConfig
from coalm_nemo.errors import EXIT_USER_ERROR, UserError
from coalm_nemo.evaluation.command import eval_app

app = typer.Typer(
    help="Llama -> CoALM: a model that converses and calls tools.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
convert_app = typer.Typer(help="Hugging Face Llama <-> Megatron checkpoint.", no_args_is_help=True)
app.add_typer(convert_app, name="convert")
data_app = typer.Typer(help="Training sets, built from their sources.", no_args_is_help=True)
app.add_typer(data_app, name="data")
slurm_app = typer.Typer(help="Jobs on a SLURM cluster.", no_args_is_help=True)
app.add_typer(slurm_app, name="slurm")
wandb_app = typer.Typer(help="What runs have logged for W&B.", no_args_is_help=True)
app.add_typer(wandb_app, name="wandb")


@wandb_app.callback()
def wandb() -> None:
    """Keeps `sync` a word of its own."""


app.add_typer(eval_app, name="eval")


def main() -> None:
    """Entry point. A UserError becomes one sentence on standard error and exit code 2."""
    try:
        app()
    except UserError as e:
        print(f"coalm: {e}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def build_recipe(name: str, overrides: list[str]) -> RunConfig:
    """A recipe with its changes."""
    from coalm_nemo.config import build_config
    from recipes import load_recipe

    return build_config(load_recipe(name), [], overrides)


@app.command()
def train(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Changes to the recipe.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="A recipe by name.")] = "coalm_tiny",
    config: Annotated[list[Path] | None, typer.Option(help="YAML of overrides; may be given more than once.")] = None,
    nproc: Annotated[int, typer.Option(min=0, help="Start this many ranks here (0: this process is one rank).")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved run, check it, and stop.")] = False,
    gpus: Annotated[
        int, typer.Option(help="With --dry-run: build each of this many ranks, without memory (0: the recipe's GPUs).")
    ] = 0,
) -> None:
    """Fine-tune.

    Under torchrun or srun each process is a rank; alone, --nproc starts them. Exit codes: 0 finished, 2 bad input,
    3 non-finite loss, 75 stopped by a signal with a checkpoint saved (the same command goes on).

    Example: coalm train --recipe coalm_tiny --nproc 4 model.hf_path=llama data.train=rows.jsonl parallel.tensor=2
    parallel.pipeline=2 train.steps=100
    """
    from coalm_nemo.training.command import train_command

    sys.exit(train_command(recipe, config or [], overrides or [], nproc, dry_run, gpus))


@app.command()
def plan(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Changes to the recipe.")
    ] = None,
    gpus: Annotated[int, typer.Option(help="How many.")] = 8,
    recipe: Annotated[str | None, typer.Option(help="A recipe by name.")] = None,
    model: Annotated[str, typer.Option(help="8b | 70b | 405b, or a Hugging Face directory.")] = "",
    gpu: Annotated[str, typer.Option(help="h100-80gb | h200-141gb.")] = "h100-80gb",
    seq_len_tokens: Annotated[int, typer.Option(min=0)] = 0,
    global_batch: Annotated[int, typer.Option(min=0, help="Sequences (packs) a step.")] = 0,
    micro_batch: Annotated[int, typer.Option(min=0)] = 0,
    task: Annotated[str, typer.Option(help="pretrain | sft | lora, as published figures name them.")] = "",
    method: Annotated[str, typer.Option(help="full | lora | qlora.")] = "",
    precision: Annotated[str, typer.Option(help="bf16 | fp8.")] = "",
    layout: Annotated[str, typer.Option(help="Only this one: tensor=8,pipeline=8,...")] = "",
    top: Annotated[int, typer.Option(help="How many layouts.")] = 10,
    picture: Annotated[Path | None, typer.Option(help="PNG: memory bars and the pipeline's timeline.")] = None,
    write: Annotated[Path | None, typer.Option(help="YAML of the best layout, for `coalm train --config`.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A list of layouts, best first.")] = False,
) -> None:
    """Which layouts fit, how much memory they take, how fast they are, and why. Needs no GPU and no weights.

    Example: coalm plan --recipe coalm_405b --gpus 128
    """
    from coalm_nemo.planning.command import PlanRequest, layout_of, plan_command

    request = PlanRequest(
        gpus=gpus, model=model, gpu=gpu, seq_len_tokens=seq_len_tokens, global_batch=global_batch,
        micro_batch=micro_batch, task=task, method=method, precision=precision, layout=layout,
    )  # fmt: skip
    if recipe is None and overrides:
        raise UserError("key=value changes go with --recipe")
    run = build_recipe(recipe, overrides or []) if recipe else None
    plan_command(request, run, top, as_json, picture, layout_of(run) if run else None, write)


@app.command("fp8-check")
def fp8_check(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Changes to the recipe.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="A recipe by name.")] = "coalm_demo",
    config: Annotated[list[Path] | None, typer.Option(help="YAML of overrides; may be given more than once.")] = None,
    precision: Annotated[str, typer.Option(help="fp8_current, fp8_emulated_current, ...; the recipe's, if none.")] = "",
    baseline: Annotated[str, typer.Option(help="bf16 | fp32; by itself, what lies between the FP8 products.")] = "",
    steps: Annotated[int, typer.Option(help="Steps of each run.")] = 200,
    seeds: Annotated[int, typer.Option(help="Pairs of runs, each in another order; their spread is the noise.")] = 1,
    nproc: Annotated[int, typer.Option(min=0, help="Start this many ranks here (0: this process is one rank).")] = 0,
    control: Annotated[bool, typer.Option(help="With one seed: a third run that shows the noise.")] = True,
    tolerance: Annotated[float, typer.Option(help="How much higher the FP8 loss may be, relative.")] = 0.01,
    out: Annotated[Path | None, typer.Option(help="Default: fp8_check in the run's directory.")] = None,
) -> None:
    """Does FP8 train as well as the same run without it? Same base, rows and order; exit code 0 yes, 1 no.

    Losses step by step, the gradients' cosine and the casts' error in every matrix, a verdict and a picture. Real FP8
    needs Transformer Engine; emulated FP8 runs anywhere.

    Example: coalm fp8-check --recipe coalm_8b --steps 200 model.checkpoint=ckpt/base data.train=sets/mine
    """
    from coalm_nemo.fp8_check.command import fp8_check_command

    sys.exit(
        fp8_check_command(
            recipe, config or [], overrides or [], precision=precision, baseline=baseline, steps=steps, seeds=seeds,
            nproc=nproc, control=control, tolerance=tolerance, out=out,
        )
    )  # fmt: skip


@app.command()
def demo(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="With --data: changes to the run.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("runs/demo"),
    base: Annotated[Path | None, typer.Option(help="Your own Hugging Face Llama directory, with --data.")] = None,
    data: Annotated[Path | None, typer.Option(help="Your own rows (JSONL), with --base.")] = None,
    nproc: Annotated[int, typer.Option(min=1, help="Ranks with --base and --data; the built-in demo runs on 4.")] = 1,
) -> None:
    """Run the whole path: import, train, export, and the scores before and after.

    Without options: the built-in world and nano base, 4 ranks at TP2 x PP2 with sequence parallelism, about six
    minutes on two cores. With --base and --data: the same job on your own checkpoint and rows.

    Example: coalm demo --base Llama-3.2-1B-Instruct --data rows.jsonl --out runs/mine train.steps=50
    """
    if (base is None) != (data is None):
        raise UserError("--base and --data belong together; give both or neither")
    if base is not None and data is not None:
        from coalm_nemo.demo.own_data import run_own_demo

        run_own_demo(base, data, out, nproc, overrides or [])
        return
    if overrides:
        raise UserError("key=value changes go with --base and --data; the built-in demo runs its recipe as it is")
    from coalm_nemo.demo.pipeline import run_demo

    run_demo(out)


@data_app.command("build")
def data_build(
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value ...]", help="Changes, such as sources.sgd.optional_slots=true."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML: tokenizer, options, sources.")] = None,
    source: Annotated[list[str] | None, typer.Option(help="KIND=PATH; may be given more than once.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Hugging Face directory of the model to train.")] = None,
    seq_len_tokens: Annotated[int | None, typer.Option(help="Length of packs, and the longest row.")] = None,
    loss: Annotated[str | None, typer.Option(help="last | all assistant turns.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of maskings, phrasings and the blend.")] = None,
    against: Annotated[
        list[str] | None, typer.Option(help="File of evaluation items; may be given more than once.")
    ] = None,
    writer: Annotated[
        str | None, typer.Option(help="OpenAI-compatible URL that rewords thoughts and responses.")
    ] = None,
    writer_model: Annotated[str | None, typer.Option(help="Its model.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Worker processes (0: one a core).")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Build a training set: rows from their sources, rendered, masked, tokenised and packed.

    The same inputs and seed give the same bytes; a finished set that is already what was asked for is used again.
    Kinds of source: released, snips, hammer, toolace, sgd, multiwoz, chat.

    Example: coalm data build --source sgd=data/sgd/train --source chat=mine.jsonl --tokenizer Llama-3.1-8B-Instruct
    --out sets/mine
    """
    from coalm_nemo.data.command import build_command

    given = {"tokenizer": tokenizer, "seq_len_tokens": seq_len_tokens, "loss": loss, "seed": seed, "against": against}
    given |= {"writer": writer, "writer_model": writer_model}
    build_command(out, config, source or [], overrides or [], given, workers, as_json)


@data_app.command("show")
def data_show(
    directory: Annotated[Path, typer.Argument(help="A set of `coalm data build`.")],
    rows: Annotated[int, typer.Option(min=1, help="How many, drawn at random.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = 0,
    source: Annotated[str | None, typer.Option(help="Only rows of this source.")] = None,
    packs: Annotated[bool, typer.Option("--packs", help="Whole packs instead, with the rows' boundaries.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Print rows as the model sees them: what it reads, and in colour what it learns to write.

    Example: coalm data show sets/mine --rows 5 --source sgd
    """
    from coalm_nemo.data.show import show_command

    show_command(directory, rows, seed, source, packs, as_json)


@data_app.command("stats")
def data_stats(
    directory: Annotated[Path, typer.Argument(help="A set of `coalm data build`.")],
    picture: Annotated[Path | None, typer.Option(help="PNG to write; DIRECTORY.png if not given.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Rows, tokens, supervised share and drops by source, and a picture of lengths, shares and fill.

    Example: coalm data stats sets/mine
    """
    from coalm_nemo.data.stats import stats_command

    stats_command(directory, picture, as_json)


@convert_app.command("import")
def convert_import(
    hf: Annotated[Path, typer.Option(help="Hugging Face Llama directory.")],
    out: Annotated[Path, typer.Option(help="Megatron checkpoint to write.")],
    max_memory: Annotated[str, typer.Option(help="Memory ceiling, for example 4GiB.")] = "4GiB",
    workers: Annotated[int, typer.Option(min=1, help="Files written side by side.")] = 2,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be written, and how long it takes.")
    ] = False,
) -> None:
    """Hugging Face -> Megatron. Interrupted at any moment, the same command goes on.

    --dry-run needs no weights: config.json and the index say what would become of each tensor.

    Example: coalm convert import --hf Llama-3.1-8B-Instruct --out ckpt/base
    """
    if dry_run:
        from coalm_nemo.checkpoint.plan_command import plan_command

        sys.exit(plan_command(hf, out, None, False))
    from coalm_nemo.checkpoint.command import import_command

    import_command(hf, out, max_memory, workers)


@convert_app.command("export")
def convert_export(
    ckpt: Annotated[Path, typer.Option(help="Megatron checkpoint: imported, or RUN/checkpoints/step_N.")],
    out: Annotated[Path, typer.Option(help="Hugging Face directory to write.")],
    hf_base: Annotated[
        Path | None, typer.Option(help="Where config and tokenizer come from, if not in CKPT/hf.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; as stored if not given.")] = None,
    merge_lora: Annotated[bool, typer.Option("--merge-lora", help="Add a LoRA run's adapters to its base.")] = False,
    quantize: Annotated[str | None, typer.Option(help="fp8: FP8 weights as vLLM and transformers load them.")] = None,
    max_memory: Annotated[str, typer.Option(help="Memory ceiling, for example 4GiB.")] = "4GiB",
    workers: Annotated[int, typer.Option(min=1, help="Files written side by side.")] = 2,
) -> None:
    """Megatron -> Hugging Face. Interrupted at any moment, the same command goes on.

    A LoRA run's checkpoint becomes a PEFT adapter, or with --merge-lora a whole model.

    Example: coalm convert export --ckpt runs/coalm_8b/checkpoints/step_00000100 --out CoALM-8B
    """
    from coalm_nemo.checkpoint.command import export_command

    export_command(ckpt, out, hf_base, dtype, max_memory, workers, merge_lora, quantize)


@convert_app.command("inspect")
def convert_inspect(
    path: Annotated[Path, typer.Argument(help="Hugging Face or Megatron directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="Every tensor, as JSON.")] = False,
) -> None:
    """What a directory holds: shape, tensors, bytes, step, the layout it was saved from, what it can be resumed as.

    Example: coalm convert inspect runs/coalm_8b/checkpoints/step_00000100
    """
    from coalm_nemo.checkpoint.inspect_command import inspect_command

    inspect_command(path, as_json)


@convert_app.command("verify")
def convert_verify(
    hf: Annotated[Path | None, typer.Option(help="Hugging Face Llama directory.")] = None,
    ckpt: Annotated[Path | None, typer.Option(help="Megatron checkpoint.")] = None,
    logits: Annotated[bool, typer.Option(help="Compare logits on a few prompts too (both models in memory).")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compare every tensor, and logits on a few prompts; with --hf or --ckpt alone, check its files' SHA-256.

    Exit code 0: equal, 1: different.

    Example: coalm convert verify --hf Llama-3.1-8B-Instruct --ckpt ckpt/base
    """
    from coalm_nemo.checkpoint.command import verify_command

    sys.exit(verify_command(hf, ckpt, logits, as_json))


@slurm_app.command("env")
def slurm_env(
    cluster: Annotated[Path, typer.Argument(help="YAML of a cluster, such as configs/clusters/h100.yaml.")],
) -> None:
    """Print a cluster's settings as the shell file that the sbatch scripts read.

    Example: coalm slurm env configs/clusters/h100.yaml > slurm/cluster.env
    """
    from coalm_nemo.cluster import load_cluster, shell_settings

    print(shell_settings(load_cluster(cluster)), end="")


@wandb_app.command("sync")
def wandb_sync(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR ...", help="Directories of runs.")],
    include_online: Annotated[
        bool, typer.Option("--include-online", help="Also what starts that were online could not finish sending.")
    ] = False,
) -> None:
    """Send what runs logged offline to W&B. All starts of a run directory, offline or online, are one W&B run.

    The access key is WANDB_API_KEY, or that of `wandb login`. What is sent is marked, and not sent again.

    Example: coalm wandb sync runs/coalm_8b
    """
    from coalm_nemo.training.wandb_sync import sync_command

    sync_command(run_dirs, include_online)


@app.command()
def report(
    directories: Annotated[
        list[Path],
        typer.Argument(metavar="DIR ...", help="Run directories, and directories of `coalm eval`."),
    ],
    out: Annotated[Path | None, typer.Option(help="HTML to write; DIR/report.html of the first if not given.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the page shows as JSON; no page.")] = False,
) -> None:
    """One page of one or several runs: curves, throughput and memory against the plan, restarts, data, scores.

    The page is one file, needs no network, and is made as well while a run goes on.

    Example: coalm report runs/coalm_8b runs/coalm_8b_lora --out both.html
    """
    from coalm_nemo.report.command import report_command

    report_command(directories, out, as_json)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    expect_cluster: Annotated[bool, typer.Option(help="Fail where a piece of GPU training is missing.")] = False,
    expect_gpus: Annotated[int, typer.Option(min=0, help="The same, and where torch sees fewer GPUs.")] = 0,
) -> None:
    """Say what is installed, what this machine can run, and how to get the rest. Exit code 0: the project can run here.

    Example: coalm doctor --expect-cluster --expect-gpus 8
    """
    from coalm_nemo.doctor import doctor_command

    sys.exit(doctor_command(as_json, expect_cluster, expect_gpus))


if __name__ == "__main__":
    main()
