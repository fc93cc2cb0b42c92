"""What starts a run or its engines: run, serve and launch."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from millrace.commands.arguments import AcceptChanges, FromStage, Overrides, RecipeFile, UntilStage
from millrace.commands.output import plain
from millrace.config.errors import ConfigError

if TYPE_CHECKING:
    from millrace.config.schema import Recipe
    from millrace.launch.starting import Options


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

    say = plain().print
    loaded = load_recipe(recipe, overrides or ())
    require_runnable(loaded)
    run_dir, options = Path(loaded.run_dir), Options(from_, until, accept_changes)
    if dry_run:
        say("\n".join(foresee(loaded, run_dir, options)))
        return
    with locked(run_dir):
        for line in start(loaded, run_dir, options):
            say(line)
        ranks = loaded.parallel.world_size
        say(f"starting {ranks} trainer rank{'s' if ranks > 1 else ''}; logs are in {run_dir / 'logs'}")
        code = launch(loaded, run_dir, until)
    raise typer.Exit(code)


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
    say = plain().print
    serve_fleet(loaded.fleet, loaded.model.path, Path(loaded.run_dir), say)


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

    say = plain().print
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
