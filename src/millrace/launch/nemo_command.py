"""`nemo millrace launch`: a command of NeMo-Run's own, found through the package's entry points.

NeMo-Run reads the annotations of the function as objects, so that they are not postponed here, and knows no unions.
"""

import shlex

import nemo_run as run

from millrace.config.loading import load_recipe
from millrace.launch.nemo_run import experiment
from millrace.launch.starting import Options


@run.cli.entrypoint(namespace="millrace", name="launch", type="experiment")
def launch(
    ctx: run.cli.RunContext,
    recipe: str,
    cluster: str = "",
    overrides: str = "",
    chain: bool = False,
    until: str = "",
) -> None:
    """Run a recipe of Millrace: `nemo millrace launch recipe=FILE cluster=NAME_OR_FILE [chain=True] [until=STAGE]`.

    `overrides` of the recipe are one text, KEY=VALUE and spaces between them.
    """
    executor = getattr(ctx, "executor", None) or ("slurm" if cluster else "local")
    loaded = load_recipe(recipe, shlex.split(overrides))
    options = Options(until=until or None)
    with experiment(
        loaded, executor, cluster=cluster or None, chain=chain, options=options, dry_run=ctx.dryrun
    ) as built:
        if ctx.dryrun:
            built.dryrun()
        else:
            built.run(detach=ctx.detach, tail_logs=not ctx.detach)
