"""What can be said before anything runs: check, plan and doctor."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from millrace.commands.arguments import FAILED, Overrides, RecipeFile
from millrace.commands.output import plain
from millrace.config.errors import ConfigError

if TYPE_CHECKING:
    from millrace.config.schema import Recipe


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
    out = plain()
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
    plain().print(to_json(made) if as_json else render_text(made))


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
    plain().print(to_json(made) if as_json else as_text(made))
    if page is not None:
        write_page(made, page)
    raise typer.Exit(0 if made.plan is None or made.plan.fits else FAILED)


def doctor() -> None:
    """Say what is installed and usable here, and what each absence costs. Exit code 0: the laptop path works.

    Example: `millrace doctor`
    """
    from millrace.doctor import examine, table, usable

    findings = examine()
    Console().print(table(findings))
    raise typer.Exit(0 if usable(findings) else FAILED)
