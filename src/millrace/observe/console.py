"""What a person sees of a run: one line a step, a bar for what takes long, a table at the end. Rank 0 only."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from millrace.observe.metrics import format_value

LINE = {
    "sft": ("loss", "grad_norm", "lr", "tokens", "time/train"),
    "rl": ("reward/mean", "reward/length", "entropy", "grad_norm", "mismatch/mean", "time/step"),
    "rlhf": ("reward/mean", "reward/length", "kl", "grad_norm", "mismatch/mean", "time/step"),
    "mopd": ("reverse_kl", "reward/length", "entropy", "grad_norm", "mismatch/mean", "time/step"),
}
"""The six numbers that matter, by type of stage."""

log = logging.getLogger("millrace")


class RunConsole:
    """The terminal of a run. Bars are drawn only on a terminal; lines always, and in the log file as well."""

    def __init__(self, run_dir: Path) -> None:
        self.console = Console(highlight=False)
        self._log_file = logging.FileHandler(run_dir / "logs" / "run.log", encoding="utf-8")
        self._log_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        terminal = _Terminal(self.console)
        terminal.setFormatter(logging.Formatter("%(asctime)s  %(message)s", datefmt="%H:%M:%S"))
        log.setLevel(logging.INFO)
        log.propagate = False
        log.handlers = [self._log_file, terminal]

    def say(self, sentence: str) -> None:
        log.info(sentence)

    def step(self, kind: str, stage: str, step: int, steps: int, values: Mapping[str, float]) -> None:
        numbers = "  ".join(
            f"{_short(name)} {format_value(name, values[name])}" for name in LINE[kind] if name in values
        )
        log.info(f"{stage} {step}/{steps}  {numbers}")
        if kind in ("rl", "rlhf") and values.get("groups/without_variance") == 1:
            log.warning(
                f"{stage} {step}/{steps}: within each group all rewards are equal, so no reward taught anything; the "
                "prompts are too hard or too easy for this model, or its answers are not understood (see the report)"
            )

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Bar]:
        """A progress bar that vanishes when its work is done."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            yield Bar(progress, progress.add_task(what, total=total, note=""))

    def matrix(self, title: str, rows: Mapping[str, Mapping[str, str]]) -> None:
        """A table of stages by domains."""
        table = Table(title=title, title_justify="left")
        table.add_column("after")
        domains = list(dict.fromkeys(domain for scores in rows.values() for domain in scores))
        for domain in domains:
            table.add_column(domain, justify="right")
        for label, scores in rows.items():
            table.add_row(label, *(scores.get(domain, "") for domain in domains))
        self.console.print(table)

    def close(self) -> None:
        self._log_file.close()
        log.handlers = []


def _short(name: str) -> str:
    """What a metric is called on the line of a step."""
    return "reward" if name == "reward/mean" else name.removeprefix("reward/").removeprefix("time/")


class _Terminal(logging.Handler):
    """Log lines above the progress bar, one line each: a file or a pipe gets them unwrapped as well."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else None
        self._console.print(self.format(record), style=style, markup=False, soft_wrap=True)


class Bar:
    def __init__(self, progress: Progress, task) -> None:
        self._progress, self._task = progress, task

    def update(self, done: int, note: str = "") -> None:
        self._progress.update(self._task, completed=done, note=note)
