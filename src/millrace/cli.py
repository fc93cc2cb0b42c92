"""The commands of Millrace. Thin: each one reads its arguments and calls the part that does the work.

Nothing here imports torch, Megatron-Core or transformers, so that help, `check` and `plan` answer at once.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from millrace.config.errors import ConfigError
from millrace.errors import MillraceError

if TYPE_CHECKING:
    from millrace.config.schema import Recipe
    from millrace.launch.starting import Options

FAILED, REFUSED = 1, 2

app = typer.Typer(
    help="Post-training of language models: Megatron-Core trains, vLLM samples, recipes say what is done.\n\n"
    "Start with `millrace doctor`, then `millrace check RECIPE` and `millrace run RECIPE`.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
convert = typer.Typer(no_args_is_help=True, help="Turn checkpoints into one another, file by file.")
verify = typer.Typer(no_args_is_help=True, help="Prove that weights, logits and layouts are what they should be.")
data = typer.Typer(no_args_is_help=True, help="Look at training data before a stage draws from them.")
app.add_typer(convert, name="convert")
app.add_typer(verify, name="verify")
app.add_typer(data, name="data")

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Values that replace the recipe's; a stage is addressed by its name."
    ),
]
AcceptChanges = Annotated[
    bool, typer.Option("--accept-changes", help="Go on although changes of the recipe touch what the run has done.")
]
FromStage = Annotated[
    str | None, typer.Option("--from", metavar="STAGE", help="Run this stage and all after it again.")
]
UntilStage = Annotated[str | None, typer.Option("--until", metavar="STAGE", help="The last stage to run now.")]
HfFolder = Annotated[Path, typer.Option("--hf", help="Folder of the Hugging Face checkpoint.")]
Card = Annotated[Path | None, typer.Option(help="Write the result as a small YAML file as well.")]
Tp = Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")]
Pp = Annotated[int, typer.Option(min=1, help="Pipeline-parallel stages.")]
Cp = Annotated[int, typer.Option(min=1, help="Context-parallel ranks.")]
Dp = Annotated[int | None, typer.Option(min=1, help="Data-parallel replicas [default: as many as ep needs]")]
Ep = Annotated[int, typer.Option(min=1, help="Expert-parallel ranks.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option(help="Data type that is written; auto: each tensor as in the source."),
]
Processes = Annotated[
    int | None, typer.Option(min=1, help="Files written side by side [default: one for each core, at most 8]")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
OutFolder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Where train.jsonl and held_out.jsonl are written.")]
DataSeed = Annotated[int, typer.Option(help="What the rows are drawn from.")]
TrainRows = Annotated[int, typer.Option(min=1, help="Rows to train on.")]
HeldOutRows = Annotated[int, typer.Option(min=1, help="Rows to measure on.")]
Etp = Annotated[int | None, typer.Option(min=1, help="Tensor-parallel ranks of one expert [default: 1]")]


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        Console().print(f"millrace {version('millrace')}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version and exit.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where in the code an error arose.")] = False,
) -> None:
    """Options of every command."""


@app.command()
def check(
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).")] = None,
    overrides: Overrides = None,
    explain: Annotated[str | None, typer.Option(metavar="KEY", help="Explain one key, or a section's keys.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="List all keys with type, default and meaning.")] = False,
    cluster: Annotated[
        str | None,
        typer.Option(metavar="NAME_OR_FILE", help="Also say what this cluster's nodes and GPUs cannot do."),
    ] = None,
) -> None:
    """Say everything that is wrong with a recipe, in under a second and without a GPU.

    Examples:

    * `millrace check recipes/laptop/dense.yaml`
    * `millrace check recipes/laptop/dense.yaml parallel.tp=4 stages.sft.optimizer.lr=1e-5`
    * `millrace check recipes/qwen3/cascade-8b.yaml precision.fp8=blockwise --cluster dgx-h100`
    * `millrace check --explain trainer.recompute`
    * `millrace check --schema`
    """
    out = Console(highlight=False, markup=False, soft_wrap=True)
    if schema or explain:
        from millrace.config.explain import explain as explained
        from millrace.config.explain import listing_text

        out.print(explained(explain) if explain else listing_text())
        return
    if recipe is None:
        raise ConfigError("check needs a recipe: millrace check RECIPE (or --explain KEY, or --schema)")
    from millrace.config.loading import load_recipe
    from millrace.config.rules import recipe_warnings, require_runnable

    loaded = load_recipe(recipe, overrides or ())
    require_runnable(loaded)
    for warning in recipe_warnings(loaded):
        sys.stderr.write(f"warning: {warning}\n")
    if cluster is not None:
        from millrace.planning.cluster_plan import plan_on_cluster
        from millrace.planning.clusters import cluster_named

        plan_on_cluster(loaded, cluster_named(cluster))
    ranks, stages = loaded.parallel.world_size, ", ".join(stage.name for stage in loaded.stages)
    out.print(f"{recipe}: fine. {ranks} trainer rank{'s' if ranks > 1 else ''}, stages: {stages}")


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    cluster: Annotated[
        str | None,
        typer.Option(metavar="NAME_OR_FILE", help="Plan for this cluster: a name in slurm/clusters/, or a file."),
    ] = None,
    suggest: Annotated[
        bool, typer.Option("--suggest", help="Search layouts and placements that fit the cluster, the fastest first.")
    ] = False,
    scale: Annotated[
        bool, typer.Option("--scale", help="Simulate the slowest stage's step on 8 to 16,384 GPUs.")
    ] = False,
    measured: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Say how far the simulation is from the steps of this run.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the plan for the cluster as one HTML page as well.")
    ] = None,
) -> None:
    """Show what a recipe will start: ranks and their places, layers, parameters, bytes, batches.

    With --cluster: which node runs what, the memory that each role needs of a GPU and of its host, what does not fit
    with the changes that help most, and an estimate of each stage's step. Exit code 1: something does not fit.

    Examples:

    * `millrace plan recipes/laptop/dense.yaml`
    * `millrace plan recipes/laptop/dense.yaml parallel.dp=2 --json`
    * `millrace plan recipes/qwen3/cascade-8b.yaml --cluster dgx-h100 --page plan.html`
    * `millrace plan recipes/qwen3/cascade-8b.yaml --cluster dgx-h100 --suggest`
    * `millrace plan recipes/laptop/cascade.yaml --cluster cpu fleet.transport=disk --measured runs/laptop-cascade`
    """
    from millrace.config.loading import load_recipe
    from millrace.config.plan import make_plan, render_text, to_json
    from millrace.config.rules import require_runnable

    loaded = load_recipe(recipe, overrides or ())
    if cluster is not None:
        _plan_on_cluster(loaded, cluster, as_json=as_json, suggest=suggest, scale=scale, measured=measured, page=page)
        return
    if suggest or scale or measured is not None or page is not None:
        raise ConfigError("--suggest, --scale, --measured and --page plan for a cluster; add --cluster NAME_OR_FILE")
    require_runnable(loaded)
    made = make_plan(loaded)
    Console(highlight=False, markup=False, soft_wrap=True).print(to_json(made) if as_json else render_text(made))


@app.command()
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    accept_changes: AcceptChanges = False,
    from_: FromStage = None,
    until: UntilStage = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
) -> None:
    """Run a recipe on this machine, or resume it where it stopped. Ctrl-C saves and stops; twice ends it at once.

    Exit code 3: a stage's gate failed and the recipe says to stop then.

    Examples:

    * `millrace run recipes/laptop/dense.yaml`
    * `millrace run recipes/laptop/dense.yaml run_dir=runs/hot stages.rl-math.sampling.temperature=1.2`
    * `millrace run recipes/laptop/cascade.yaml --until mopd --dry-run`
    * `millrace run recipes/laptop/cascade.yaml --from mopd stages.mopd.optimizer.lr=1e-4`
    """
    from millrace.config.loading import load_recipe
    from millrace.config.rules import require_runnable
    from millrace.launch.local import launch
    from millrace.launch.run_dir import locked
    from millrace.launch.starting import Options, foresee, start

    say = Console(highlight=False, markup=False, soft_wrap=True).print
    loaded = load_recipe(recipe, overrides or ())
    require_runnable(loaded)
    run_dir, options = Path(loaded.run_dir), Options(from_, until, accept_changes)
    if dry_run:
        say("\n".join(foresee(loaded, run_dir, options)))
        return
    with locked(run_dir):
        for line in start(loaded, run_dir, options):
            say(line)
        code = launch(loaded, run_dir, until)
    raise typer.Exit(code)


@app.command()
def serve(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Start a recipe's engines and keep them up for one run after the other, until Ctrl-C.

    A run that finds its engines up starts in seconds. It names them by `fleet.engines=0` and `fleet.addresses`; all
    must know the secret in the environment variable MILLRACE_FLEET_TOKEN.

    Example:

    * `MILLRACE_FLEET_TOKEN=$(openssl rand -hex 16) millrace serve recipes/laptop/dense.yaml fleet.engines=2`
    """
    from millrace.config.loading import load_recipe
    from millrace.rollout.serve import serve as serve_fleet

    loaded = load_recipe(recipe, overrides or ())
    if not loaded.fleet.engines:
        raise ConfigError("serve: fleet.engines is 0; say how many servers are to be started, as fleet.engines=1")
    say = Console(highlight=False, markup=False, soft_wrap=True).print
    serve_fleet(loaded.fleet, loaded.model.path, Path(loaded.run_dir), say)


@app.command()
def launch(
    recipe: RecipeFile,
    overrides: Overrides = None,
    cluster: Annotated[
        str | None, typer.Option(metavar="NAME_OR_FILE", help="Cluster of slurm/clusters/, or a YAML file.")
    ] = None,
    chain: Annotated[
        bool, typer.Option("--chain", help="A job for each stage, each behind the one before it.")
    ] = False,
    executor: Annotated[
        str | None, typer.Option(metavar="slurm|local", help="Through NeMo-Run, with this executor.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="With --executor: return when it is submitted.")] = False,
    accept_changes: AcceptChanges = False,
    from_: FromStage = None,
    until: UntilStage = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job's script, and do nothing.")] = False,
) -> None:
    """Run a recipe as a Slurm job, or resume it. The job saves itself before its time is up and goes on by itself.

    Then `millrace status RUN`, `millrace logs RUN -f` and `millrace cancel RUN`, from any node.

    Examples:

    * `millrace launch recipes/qwen3/cascade-8b.yaml --cluster dgx-h100 --dry-run`
    * `millrace launch recipes/laptop/dense.yaml fleet.transport=disk --cluster cpu --until sft`
    * `millrace launch recipes/qwen3/cascade-8b.yaml --cluster my-site.yaml --chain`
    * `millrace launch recipes/qwen3/cascade-8b.yaml --cluster my-site.yaml --executor slurm`
    """
    from millrace.config.loading import load_recipe
    from millrace.config.rules import require_runnable
    from millrace.launch.run_dir import locked
    from millrace.launch.slurm import prepare, require_free, require_slurm, scripts, submit
    from millrace.launch.starting import Options, foresee, start

    say = Console(highlight=False, markup=False, soft_wrap=True).print
    loaded, options = load_recipe(recipe, overrides or ()), Options(from_, until, accept_changes)
    if executor is not None:
        _launch_experiment(loaded, executor, cluster, chain, options, detach, dry_run)
        return
    if cluster is None:
        raise ConfigError("launch needs a cluster: --cluster NAME of slurm/clusters/, or a YAML file")
    require_runnable(loaded)
    prepared, run_dir = prepare(loaded, cluster), Path(loaded.run_dir)
    sys.stderr.write("".join(f"warning: {line}\n" for line in prepared.warnings))
    told = foresee(loaded, run_dir, options)
    written = scripts(prepared, chain, until)
    if dry_run:
        say("\n".join(written.values()), end="")
        say("\n".join(f"# {line}" for line in told))
        return
    require_slurm()
    require_free(run_dir)
    with locked(run_dir):
        for line in start(loaded, run_dir, options):
            say(line)
    record = submit(prepared, written)
    say(f"Slurm job {', '.join(record.ids)} on {prepared.placement.nodes} nodes; millrace status {run_dir}")


def _launch_experiment(
    recipe: Recipe, executor: str, cluster: str | None, chain: bool, options: Options, detach: bool, dry_run: bool
) -> None:
    """Run a recipe through NeMo-Run, and fail when one of its tasks does."""
    if importlib.util.find_spec("nemo_run") is None:
        raise ConfigError(
            "NeMo-Run is not installed here, and does not go beside vLLM: make an environment that launches by "
            "constraints/nemo-run.sh and run this command with its millrace"
        )
    from millrace.launch.nemo_run import experiment

    with experiment(recipe, executor, cluster=cluster, chain=chain, options=options, dry_run=dry_run) as built:
        if dry_run:
            built.dryrun()
        else:
            built.run(detach=detach, tail_logs=not detach)


RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]


@app.command()
def status(run_dir: RunFolder) -> None:
    """Say where a run stands: what runs where, step and rate, last checkpoint, what it waits for, why it failed.

    Example: `millrace status runs/laptop-dense`
    """
    from millrace.launch.status import status_lines

    out = Console(highlight=False, markup=False, soft_wrap=True)
    out.print("\n".join(status_lines(run_dir.resolve())))


@app.command()
def cancel(run_dir: RunFolder) -> None:
    """Stop a run, wherever it runs; launched or started again, it goes on where it stood.

    Example: `millrace cancel runs/laptop-dense`
    """
    from millrace.launch.status import cancel_run

    Console(highlight=False, markup=False, soft_wrap=True).print(cancel_run(run_dir.resolve()))


@app.command()
def logs(
    run_dir: RunFolder,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Component such as rank-1 or engine-0 [default: the job]")
    ] = None,
    follow_: Annotated[bool, typer.Option("--follow", "-f", help="Go on as the log grows, until Ctrl-C.")] = False,
) -> None:
    """Print a log of a run: of its job, or of one of its components.

    Examples:

    * `millrace logs runs/laptop-dense -f`
    * `millrace logs runs/laptop-dense engine-0`
    """
    from millrace.launch.status import follow, log_file

    for text in follow(log_file(run_dir.resolve(), name), follow_):
        sys.stdout.write(text)
        sys.stdout.flush()


@app.command()
def report(
    run_dir: Annotated[Path | None, typer.Argument(metavar="RUN", help="Folder of a run.")] = None,
    metrics: Annotated[
        bool, typer.Option("--metrics", help="Print what each metric means, where it should lie and what to do else.")
    ] = False,
) -> None:
    """Write RUN/report.html: graph, matrix, curves, efficiency and rollouts of a run in any state, on one page.

    Examples:

    * `millrace report runs/laptop-dense`
    * `millrace report --metrics`
    """
    out = Console(highlight=False, markup=False, soft_wrap=True)
    if metrics:
        from millrace.observe.metrics import metrics_page

        out.print(metrics_page(), end="")
        return
    if run_dir is None:
        raise ConfigError("report needs the folder of a run: millrace report RUN (or --metrics)")
    from millrace.observe.report import write_report

    out.print(str(write_report(run_dir)))


@convert.command("hf-to-megatron")
def convert_to_megatron(
    hf: HfFolder,
    out: Annotated[Path, typer.Option(help="Folder of checkpoints; this one is written as its step 0.")],
    dtype: Dtype = "auto",
    processes: Processes = None,
    shard_gib: Annotated[float, typer.Option(min=0.0001, help="Largest .distcp file, GiB.")] = 1.0,
    overwrite: Overwrite = False,
) -> None:
    """Write a Hugging Face checkpoint as a Megatron-Core checkpoint, which any parallel layout loads.

    No process holds more than one parameter. After a kill the same command goes on.

    Example: `millrace convert hf-to-megatron --hf demo/base --out demo/base-megatron`
    """
    from millrace.converters.processes import start_server

    start_server()  # imports torch while this process does
    from millrace.conversion import hf_to_megatron, options

    hf_to_megatron(hf, out, options(dtype, processes, shard_gib, overwrite))


@convert.command("megatron-to-hf")
def convert_to_hf(
    checkpoint: Annotated[Path, typer.Option(help="A Megatron checkpoint, or a folder of which to take the latest.")],
    out: Annotated[Path, typer.Option(help="Folder of the Hugging Face checkpoint to write.")],
    dtype: Dtype = "auto",
    processes: Processes = None,
    shard_gib: Annotated[float, typer.Option(min=0.0001, help="Largest safetensors file, GiB.")] = 2.0,
    overwrite: Overwrite = False,
) -> None:
    """Write a Megatron-Core checkpoint, saved at any parallel layout, as a Hugging Face checkpoint.

    No process holds more than one parameter. After a kill the same command goes on.

    Example: `millrace convert megatron-to-hf --checkpoint runs/x/checkpoints/step-00000010 --out exported`
    """
    from millrace.converters.processes import start_server

    start_server()  # imports torch while this process does
    from millrace.conversion import megatron_to_hf, options

    megatron_to_hf(checkpoint, out, options(dtype, processes, shard_gib, overwrite))


@convert.command("adapter")
def adapter(
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint of a run with model.lora, or the folder of several.")],
    out: Annotated[Path, typer.Option(help="Folder of the PEFT adapter to write.")],
    tp: Tp = 1,
    pp: Pp = 1,
    ep: Ep = 1,
    etp: Etp = None,
    dp: Dp = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out when it exists.")] = False,
) -> None:
    """Write the LoRA adapters of a checkpoint in PEFT's format, as peft and vLLM load them.

    Example: `millrace convert adapter --checkpoint runs/x/checkpoints/step-00000010 --out adapter`
    """
    arguments = ["--checkpoint", str(checkpoint), "--out", str(out), *(["--overwrite"] if overwrite else [])]
    _on_ranks("megatron.adapter_worker", arguments, tp, pp, 1, ep, etp, dp)


@convert.command("merge")
def merge(
    hf: HfFolder,
    adapter: Annotated[Path, typer.Option(help="Folder of a PEFT adapter of that checkpoint.")],
    out: Annotated[Path, typer.Option(help="Folder of the Hugging Face checkpoint to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out when it exists.")] = False,
) -> None:
    """Write a checkpoint with a LoRA adapter merged into its weights.

    Example: `millrace convert merge --hf demo/base --adapter runs/x/adapter --out merged`
    """
    from millrace.converters.adapters import merge_adapter

    written = merge_adapter(hf, adapter, out, overwrite=overwrite)
    Console(highlight=False, markup=False, soft_wrap=True).print(f"{hf} with {adapter} -> {written}")


@verify.command()
def roundtrip(
    hf: HfFolder, tp: Tp = 1, pp: Pp = 1, cp: Cp = 1, ep: Ep = 1, etp: Etp = None, dp: Dp = None, card: Card = None
) -> None:
    """Hugging Face -> Megatron -> Hugging Face: every tensor must come back bit for bit.

    Example: `millrace verify roundtrip --hf demo/base --tp 2`
    """
    _verify("roundtrip", hf, card, tp, pp, cp, ep, etp, dp)


@verify.command()
def logits(
    hf: HfFolder, tp: Tp = 1, pp: Pp = 1, cp: Cp = 1, ep: Ep = 1, etp: Etp = None, dp: Dp = None, card: Card = None
) -> None:
    """Logits of the Megatron model against those of transformers, in float32.

    Example: `millrace verify logits --hf runs/laptop-dense/export --tp 2 --card logits.yaml`
    """
    _verify("logits", hf, card, tp, pp, cp, ep, etp, dp)


@verify.command()
def layout(
    hf: HfFolder, tp: Tp = 1, pp: Pp = 1, cp: Cp = 1, ep: Ep = 1, etp: Etp = None, dp: Dp = None, card: Card = None
) -> None:
    """Loss and gradients of a parallel layout against those of one rank.

    Example: `millrace verify layout --hf demo/base --tp 2 --pp 2`
    """
    _verify("layout", hf, card, tp, pp, cp, ep, etp, dp)


@verify.command()
def sync(
    hf: HfFolder, tp: Tp = 1, pp: Pp = 1, cp: Cp = 1, ep: Ep = 1, etp: Etp = None, dp: Dp = None, card: Card = None
) -> None:
    """Weights swapped into a running engine against a fresh engine, the trainer and transformers.

    Example: `millrace verify sync --hf demo/base --tp 2`
    """
    arguments = ["--hf", str(hf), *(["--card", str(card)] if card else [])]
    _on_ranks("cascade.verify_sync", arguments, tp, pp, cp, ep, etp, dp)


@verify.command()
def card(
    hf: HfFolder,
    out: Annotated[Path, typer.Option("--out", help="The card, a YAML file.")] = Path("card.yaml"),
    layout: Annotated[
        list[str] | None, typer.Option(help="Only at this layout, such as 'tp2 pp2'; can be given several times.")
    ] = None,
    sync: Annotated[bool, typer.Option(help="Swap weights into a running engine as well, which needs vLLM.")] = True,
) -> None:
    """Every verification of a checkpoint, at each kind of layout that fits it, recorded on one card.

    Example: `millrace verify card --hf demo/base --out base.yaml`
    """
    from millrace.launch.card import card_command, verify_all, vllm_is_there, write_card

    if sync and not vllm_is_there():
        raise MillraceError("vLLM is not installed, so no engine can take the weights; install it or add --no-sync")
    console = Console(highlight=False, soft_wrap=True)
    checks = verify_all(hf, sync=sync, only=layout or (), say=console.print)
    write_card(out, hf, checks, card_command(hf, sync, layout or ()))
    failed = [check for check in checks if not check.passed]
    for check in failed:
        console.print(f"FAILED: {check.name} at {check.layout}: {check.summary}")
    console.print(f"{len(checks) - len(failed)} of {len(checks)} checks passed; the card is {out}")
    raise typer.Exit(FAILED if failed else 0)


@data.command()
def show(
    recipe: RecipeFile,
    overrides: Overrides = None,
    domain: Annotated[str | None, typer.Option(metavar="NAME", help="Only this domain of the recipe.")] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Render only the first N rows of each file; all are checked.")
    ] = None,
) -> None:
    """Show a recipe's data as its run would read them: rows, what is wrong with them, prompt lengths, an example.

    Of each domain, and of the conversations of SFT. Nothing is started. Exit code 1: something is wrong.

    Examples:

    * `millrace data show recipes/laptop/tools.yaml`
    * `millrace data show recipes/laptop/cascade.yaml --domain math --rows 100`
    """
    from millrace.cascade.show_data import show_data
    from millrace.config.loading import load_recipe

    out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    right = show_data(load_recipe(recipe, overrides or ()), out.print, domain=domain, rows=rows)
    raise typer.Exit(0 if right else FAILED)


@data.command()
def passrate(
    recipe: RecipeFile,
    domain: Annotated[str, typer.Option(metavar="NAME", help="Domain of the recipe.")],
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers a prompt.")] = 8,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write [default: the domain's pass_rates, or a file beside its training prompts]"),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(metavar="HF_FOLDER", help="Checkpoint to measure [default: the recipe's model]")
    ] = None,
    max_prompts: Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the first N prompts.")] = None,
) -> None:
    """Measure how often a model solves each training prompt of a domain, for a stage's curriculum.

    Answers are sampled as the recipe's evaluation samples them. After a kill, or for more prompts, the same command
    goes on where the file ends.

    Examples:

    * `millrace data passrate recipes/laptop/dense.yaml --domain math`
    * `millrace data passrate recipes/laptop/dense.yaml --domain math --model runs/laptop-dense/export --samples 16`
    """
    from millrace.cascade.passrate import measure_pass_rates, measuring_recipe
    from millrace.config.loading import load_recipe
    from millrace.evaluation.pass_rates import summary

    loaded = load_recipe(recipe, overrides or ())
    measuring = measuring_recipe(loaded, domain, model)
    named = loaded.domains[domain]
    path = out or Path(named.pass_rates or Path(named.train).with_suffix(".pass_rates.jsonl"))
    rows = measure_pass_rates(measuring, path, samples=samples, max_prompts=max_prompts)
    text = f"{summary(rows)}\nwritten to {path}; a stage's curriculum reads it as domains.{domain}.pass_rates"
    Console(highlight=False, markup=False, soft_wrap=True).print(text)


@data.command()
def tools(
    out: OutFolder,
    seed: DataSeed = 1,
    train: TrainRows = 1000,
    held_out: HeldOutRows = 128,
    most_calls: Annotated[int, typer.Option(min=1, help="Most calls that a task takes.")] = 6,
    offer: Annotated[
        Literal["all", "needed"],
        typer.Option(help="Offer all 27 tools with each task, or the few that it takes: about 4,000 tokens less."),
    ] = "all",
) -> None:
    """Write tasks for the environment workplace_assistant, with the calls that solve them.

    They are about the office that Millrace generates: leave the domain's `tables` out. The same seed writes the same
    rows.

    Example: `millrace data tools data/tools --train 2000 --most-calls 2 --offer needed`
    """
    from millrace.environments.workplace.generate import generated_office
    from millrace.environments.workplace.tasks import distinct_tasks

    tasks = distinct_tasks(generated_office(), seed, train + held_out, most_calls=most_calls)
    _write_rows(out, [task.row(offer) for task in tasks], held_out)


@data.command("long-context")
def long_context(
    out: OutFolder,
    tokenizer: Annotated[Path, typer.Option(metavar="HF_FOLDER", help="Checkpoint whose tokenizer counts.")],
    seed: DataSeed = 1,
    train: TrainRows = 1000,
    held_out: HeldOutRows = 128,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt, at most.")] = 32000,
    needed: Annotated[int, typer.Option(min=1, help="Documents that a question takes.")] = 5,
) -> None:
    """Write questions over many documents for the environment long_context.

    Prompts are filled with documents that the question does not need up to the length; the chat template comes on top.
    The same seed writes the same rows.

    Example: `millrace data long-context data/long --tokenizer models/Qwen3-8B --tokens 30000`
    """
    from millrace.data.tokenizer import ChatTokenizer
    from millrace.environments.long_context_tasks import make_rows

    encode = ChatTokenizer(tokenizer).encode
    rows = make_rows(lambda text: len(encode(text)), seed=seed, rows=train + held_out, tokens=tokens, needed=needed)
    _write_rows(out, list(rows), held_out)


@app.command()
def doctor() -> None:
    """Say what is installed and usable here, and what each absence costs. Exit code 0: the laptop path works.

    Example: `millrace doctor`
    """
    from millrace.doctor import examine, table, usable

    findings = examine()
    Console().print(table(findings))
    raise typer.Exit(0 if usable(findings) else FAILED)


def _write_rows(out: Path, rows: list[dict[str, Any]], held_out: int) -> None:
    """Write generated rows to train.jsonl and, the first of them, to held_out.jsonl."""
    out.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", rows[held_out:]), ("held_out", rows[:held_out])):
        lines = [json.dumps({"id": f"{name}-{i}", **row}, ensure_ascii=False) for i, row in enumerate(part)]
        (out / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        Console(highlight=False, markup=False, soft_wrap=True).print(f"{out / f'{name}.jsonl'}: {len(lines)} rows")


def _plan_on_cluster(
    recipe: Recipe,
    name: str,
    *,
    as_json: bool,
    suggest: bool,
    scale: bool,
    measured: Path | None,
    page: Path | None,
) -> None:
    from millrace.planning.clusters import cluster_named
    from millrace.planning.command import as_text, planned, to_json, write_page

    made = planned(recipe, cluster_named(name), suggest=suggest, scale=scale, measured=measured)
    Console(highlight=False, markup=False, soft_wrap=True).print(to_json(made) if as_json else as_text(made))
    if page is not None:
        write_page(made, page)
    raise typer.Exit(0 if made.plan is None or made.plan.fits else FAILED)


def _verify(
    what: str, hf: Path, card: Path | None, tp: int, pp: int, cp: int, ep: int, etp: int | None, dp: int | None
) -> None:
    arguments = [what, "--hf", str(hf), *(["--card", str(card)] if card else [])]
    _on_ranks("megatron.verify_worker", arguments, tp, pp, cp, ep, etp, dp)


def _on_ranks(
    module: str,
    arguments: list[str],
    tp: int,
    pp: int,
    cp: int,
    ep: int,
    etp: int | None,
    dp: int | None,
) -> None:
    """Run a module of millrace on as many ranks as its layout has, and exit as it does."""
    from millrace.config.schema import TrainerConfig
    from millrace.launch.local import run_ranks, trainer_environment

    etp = etp or 1
    # Experts take their ranks from tp x cp x dp, so without a word on dp it is the least that gives them enough.
    dp = dp or ep * etp // math.gcd(tp * cp, ep * etp)
    ranks = tp * pp * cp * dp
    sizes = {"tp": tp, "pp": pp, "cp": cp, "ep": ep, "etp": etp, "dp": dp}
    arguments = [*arguments, *(text for key, size in sizes.items() for text in (f"--{key}", str(size)))]
    environment = trainer_environment(TrainerConfig(), ranks)
    # The logs of the ranks stay where one fails, for the failure names them.
    logs = Path(tempfile.mkdtemp(prefix="millrace-"))
    code = run_ranks(f"millrace.{module}", arguments, ranks, environment, logs)
    shutil.rmtree(logs)
    raise typer.Exit(code)


def main() -> None:
    """Entry point of `millrace`: errors that a user can mend are sentences, not tracebacks."""
    try:
        app()
    except MillraceError as error:
        if "--traceback" in sys.argv:
            raise
        problems = error.problems if isinstance(error, ConfigError) else [str(error)]
        sys.stderr.write("".join(f"{problem}\n" for problem in problems))
        if len(problems) > 1:
            sys.stderr.write(f"{len(problems)} problems\n")
        sys.exit(REFUSED if isinstance(error, ConfigError) else FAILED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
