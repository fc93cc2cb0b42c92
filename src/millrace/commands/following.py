"""What looks at a run, and stops it: status, cancel, logs and report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from millrace.commands.output import plain
from millrace.config.errors import ConfigError

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]


def status(run_dir: RunFolder) -> None:
    """Say where a run stands: what runs where, step and rate, last checkpoint, what it waits for, why it failed.

    Example: `millrace status runs/laptop-dense`
    """
    from millrace.launch.status import status_lines

    plain().print("\n".join(status_lines(run_dir.resolve())))


def cancel(run_dir: RunFolder) -> None:
    """Stop a run, wherever it runs; launched or started again, it goes on where it stood.

    Example: `millrace cancel runs/laptop-dense`
    """
    from millrace.launch.status import cancel_run

    plain().print(cancel_run(run_dir.resolve()))


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
    out = plain()
    if metrics:
        from millrace.observe.metrics import metrics_page

        out.print(metrics_page(), end="")
        return
    if run_dir is None:
        raise ConfigError("report needs the folder of a run: millrace report RUN (or --metrics)")
    from millrace.observe.report import write_report

    out.print(str(write_report(run_dir)))
