"""Arguments that several commands take, and the exit codes of all."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

FAILED, REFUSED = 1, 2

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
