"""The command line of Millrace. Its commands are thin: each reads its arguments and calls the part that does the work.

Neither this nor `commands` imports torch, Megatron-Core or transformers, so that help, `check` and `plan` answer at
once.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.console import Console

from millrace.commands.arguments import FAILED, REFUSED
from millrace.commands.checks import check, doctor, plan
from millrace.commands.convert import convert
from millrace.commands.data import data
from millrace.commands.following import cancel, logs, report, status
from millrace.commands.runs import launch, run, serve
from millrace.commands.verify import verify
from millrace.config.errors import ConfigError
from millrace.errors import MillraceError

app = typer.Typer(
    help="Post-training of language models: Megatron-Core trains, vLLM samples, recipes say what is done.\n\n"
    "Start with `millrace doctor`, then `millrace check RECIPE` and `millrace run RECIPE`.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (check, plan, run, serve, launch, status, cancel, logs, report, doctor):
    app.command()(command)
app.add_typer(convert, name="convert")
app.add_typer(verify, name="verify")
app.add_typer(data, name="data")


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
    except OSError as error:  # a folder that cannot be written, a full disk
        if error.filename is None or "--traceback" in sys.argv:
            raise
        sys.stderr.write(f"{error.filename}: {error.strerror}; millrace --traceback ... shows where it arose\n")
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
