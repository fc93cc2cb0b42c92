"""Commands that run on the ranks of a parallel layout."""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer

Tp = Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")]
Pp = Annotated[int, typer.Option(min=1, help="Pipeline-parallel stages.")]
Cp = Annotated[int, typer.Option(min=1, help="Context-parallel ranks.")]
Dp = Annotated[int | None, typer.Option(min=1, help="Data-parallel replicas [default: as many as ep needs]")]
Ep = Annotated[int, typer.Option(min=1, help="Expert-parallel ranks.")]
Etp = Annotated[int | None, typer.Option(min=1, help="Tensor-parallel ranks of one expert [default: 1]")]


def on_ranks(
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
