"""`millrace convert`: checkpoints between Hugging Face's format and Megatron-Core's, without a model in memory.

Files are written side by side by processes that hold one parameter each (`millrace.converters.streaming`). A Megatron
checkpoint written so belongs to no layout: any ranks load it. One that ranks saved, at whatever layout, is converted as
it lies. Interrupted or killed, the same command goes on with the files that are missing.
"""

from __future__ import annotations

import importlib
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from millrace.checkpoint_store import (
    FACTS,
    HF_FOLDER,
    SHARDS,
    CheckpointStore,
    FileRecord,
    checkpoint_facts,
    file_record,
    flush_to_disk,
    read_json,
    read_manifest,
    readable_bytes,
    remove,
    write_json,
    write_manifest,
)
from millrace.config.model_shape import ModelShape
from millrace.converters.errors import ConversionError
from millrace.converters.mapping import mapping_for
from millrace.converters.processes import Workers, alone, default_processes
from millrace.converters.safetensors_io import HFReader, Manifest, copy_companions, publish, unfinished
from millrace.converters.streaming import (
    HFJob,
    Job,
    Layout,
    ShardJob,
    Weight,
    Written,
    check_hf,
    dtype_name,
    identity_of,
    in_files,
    open_unfinished,
    read_record,
    require_space,
    saying_write_problems,
    settle,
    weights_of_checkpoint,
    weights_of_hf,
    write_hf_file,
    write_shard,
)
from millrace.converters.torch_dist import StoredTensor

SHARD_BYTES = 1 << 30
"""Size of a `.distcp` file, and so the most that a kill costs each process."""
HF_SHARD_BYTES = 2 << 30

_STEP = "step-00000000"
_SLACK_BYTES = 16 << 20
"""Room for tables, tokenizer and configs."""
_LINE_SECONDS = 30.0
"""Between two lines of progress where there is no terminal."""


@dataclass(frozen=True)
class Options:
    """What both ways have in common."""

    dtype: str | None = None
    """float32 or bfloat16; None: each tensor as it is stored."""
    processes: int = 0
    """0: one for each core, up to eight."""
    shard_bytes: int = SHARD_BYTES
    """Largest file, unless one parameter is larger."""
    overwrite: bool = False

    def workers(self) -> Workers:
        return Workers(self.processes or default_processes())

    @property
    def torch_dtype(self) -> torch.dtype | None:
        return None if self.dtype is None else getattr(torch, self.dtype)


def options(dtype: str, processes: int | None, shard_gib: float, overwrite: bool) -> Options:
    """The options of a command line, where `auto` is a data type."""
    return Options(None if dtype == "auto" else dtype, processes or 0, int(shard_gib * (1 << 30)), overwrite)


def hf_to_megatron(hf: Path, out: Path, options: Options) -> Path:
    """Write a Hugging Face checkpoint as step 0 of the checkpoints in `out`; the folder of the new checkpoint.

    Raises ConversionError where the checkpoint is not what its config.json says, where space is short, and where step 0
    is there and may not be replaced.
    """
    shape = ModelShape.from_hf(hf)
    mapping, reader = mapping_for(shape), HFReader(hf)
    final, folder = out / _STEP, out / f".{_STEP}.converting"
    _refuse_existing(final, options)
    check_hf(mapping, reader, options.torch_dtype)
    files = {reader.lazy(name).file for name in reader.names}
    with _unfinished(folder, {hf / "config.json", *files}, options), options.workers() as workers:
        with alone(_ask_megatron, shape) as asked:
            importlib.import_module("millrace.converters.torch_metadata")  # takes a second, and is needed at the end
        layout, small = asked.result()
        weights = weights_of_hf(mapping, layout, reader, options.torch_dtype)
        aside, records = folder / "checkpoint", folder / "records"
        for part in (aside / SHARDS, aside / HF_FOLDER, records):
            part.mkdir(parents=True, exist_ok=True)
        jobs = [
            ShardJob(aside / SHARDS / f"__0_{number}.distcp", records / f"{number}.json", hf, group)
            for number, group in enumerate(in_files(weights, options.shard_bytes), start=1)
        ]
        finished = [job for job in jobs if read_record(job) is not None]
        _run(workers, write_shard, jobs, finished, f"{hf} -> {final}")
        with saying_write_problems(aside):
            for name, content in small.items():
                (aside / SHARDS / name).write_bytes(content)
            _write_table(aside / SHARDS, jobs)
            copy_companions(hf, aside / HF_FOLDER)
            _publish(aside, shape, jobs, CheckpointStore(out, keep=1))
            remove(folder)
    return final


def _ask_megatron(shape: ModelShape) -> tuple[Layout, dict[str, bytes]]:
    """The layout of the model's checkpoints, and their small files, which hold no tensor. In a process of its own:
    Megatron-Core stays out of the others."""
    warnings.simplefilter("ignore")  # Megatron-Core says at import what it does not find
    from millrace.megatron.skeleton import megatron_layout

    with tempfile.TemporaryDirectory() as folder:
        layout = megatron_layout(shape, Path(folder))
        return layout, {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def _write_table(shards: Path, jobs: Sequence[ShardJob]) -> None:
    """Complete the table that Megatron-Core made: data types, and which file holds what."""
    from millrace.converters.torch_metadata import read_metadata, with_places, write_metadata  # takes a second

    dtypes = {part.key: weight.written for job in jobs for weight in job.weights for part in weight.parts}
    places = {
        (key, at): (job.path.name, start, length) for job in jobs for key, at, start, length in _written(job).pieces
    }
    write_metadata(shards, with_places(read_metadata(shards), dtypes, places))


def _written(job: ShardJob) -> Written:
    record = read_record(job)
    assert record is not None, job.path
    return record


def _publish(aside: Path, shape: ModelShape, jobs: Sequence[ShardJob], store: CheckpointStore) -> None:
    facts = checkpoint_facts(shape, None, step=0, policy_step=0, optimizer_step=0)
    write_json(aside / FACTS, {**facts, "state": {}, "keep_always": True, "sequence": store.next_sequence()})
    records = {
        job.path.relative_to(aside).as_posix(): FileRecord(_written(job).size, _written(job).crc32) for job in jobs
    }
    for path in sorted(path for path in aside.rglob("*") if path.is_file()):
        name = path.relative_to(aside).as_posix()
        if name not in records:
            flush_to_disk(path)
            records[name] = file_record(path)
    write_manifest(aside, records)
    store.publish(aside, _STEP)


def megatron_to_hf(checkpoint: Path, out: Path, options: Options) -> Path:
    """Write a Megatron checkpoint as a Hugging Face checkpoint; its folder.

    `checkpoint` is one checkpoint, or a folder of them of which the latest is taken. Raises ConversionError where it is
    damaged or not what its config.json says, where space is short, and where `out` is there and may not be replaced.
    """
    _refuse_existing(out, options)
    checkpoint = find_checkpoint(checkpoint)
    if read_json(checkpoint / FACTS).get("lora") is not None:
        raise ConversionError(
            f"{checkpoint} holds adapters and no whole model; take them out with `millrace convert adapter`, and put "
            "them into the weights they adapt with `millrace convert merge`"
        )
    source, shards = checkpoint / HF_FOLDER, checkpoint / SHARDS
    shape = ModelShape.from_hf(source)
    mapping = mapping_for(shape)
    _check_sizes(checkpoint)
    folder = unfinished(out)
    files = {source / "config.json", *(path for path in shards.iterdir() if path.is_file())}
    with _unfinished(folder, files, options), options.workers() as workers:
        with alone(_ask_megatron, shape) as asked:
            stored = _stored_tensors(shards)
        layout, _ = asked.result()
        weights = weights_of_checkpoint(mapping, layout, stored, shards, options.torch_dtype)
        groups = in_files(weights, options.shard_bytes)
        jobs = [
            HFJob(
                folder / f"model-{number:05d}-of-{len(groups):05d}.safetensors",
                shards,
                group,
                {part.key: stored[part.key] for weight in group for part in weight.parts},
            )
            for number, group in enumerate(groups, start=1)
        ]
        finished = [job for job in jobs if job.path.is_file() and job.path.stat().st_size == job.size]
        _run(workers, write_hf_file, jobs, finished, f"{checkpoint} -> {out}")
        manifest = {job.path.name: {name: _nbytes(*facts) for name, facts in job.tensors.items()} for job in jobs}
        publish(out, [Manifest(manifest)], source=source, dtype=_config_dtype(shape, weights))
    return out


def _stored_tensors(shards: Path) -> dict[str, StoredTensor]:
    from millrace.converters.torch_metadata import stored_tensors  # takes a second

    return stored_tensors(shards)


def _nbytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _config_dtype(shape: ModelShape, weights: Sequence[Weight]) -> str | None:
    """What config.json must say where it says another data type than the weights have: that of most bytes."""
    held: dict[str, int] = {}
    for weight in weights:
        name = dtype_name(weight.written)
        held[name] = held.get(name, 0) + weight.nbytes
    return None if shape.torch_dtype in held else max(held, key=lambda name: held[name])


def find_checkpoint(path: Path) -> Path:
    """`path` when it is a checkpoint, else the latest one in it. Raises ConversionError when there is none."""
    if (path / FACTS).is_file():
        return path
    latest = CheckpointStore(path, keep=1).latest() if path.is_dir() else None
    if latest is None:
        raise ConversionError(f"{path} is no checkpoint and holds none")
    return latest


def _check_sizes(checkpoint: Path) -> None:
    """Raises ConversionError for a file that is missing or of another size than it was written with; what is inside
    shows when it is read."""
    for name, record in read_manifest(checkpoint).items():
        file = checkpoint / name
        size = file.stat().st_size if file.is_file() else None
        if size != record.size:
            there = "is missing" if size is None else f"has {size} bytes instead of {record.size}"
            raise ConversionError(f"{file} {there}: the checkpoint is not whole")


def _refuse_existing(final: Path, options: Options) -> None:
    if final.exists() and not options.overwrite:
        raise ConversionError(f"{final} exists already; remove it, name another folder, or give --overwrite")


@contextmanager
def _unfinished(folder: Path, sources: Iterable[Path], options: Options) -> Iterator[None]:
    """The folder of an unfinished conversion, with what the same conversion finished in it before a kill."""
    plan = {"from": identity_of(sources), "dtype": options.dtype, "shard_bytes": options.shard_bytes}
    with saying_write_problems(folder):
        lock = open_unfinished(folder, plan)
    try:
        yield
    finally:
        os.close(lock)


def _run(
    workers: Workers, work: Callable[[Job], Written], jobs: Sequence[Job], finished: Sequence[Job], what: str
) -> None:
    """Write the files that are missing, showing how far it is."""
    there = sum(job.nbytes for job in finished)
    total = sum(job.nbytes for job in jobs)
    missing = [job for job in jobs if job not in finished]
    require_space(jobs[0].path.parent, total - there + _SLACK_BYTES)
    started = time.monotonic()
    if finished:
        _say(f"{len(finished)} of {len(jobs)} files are finished already")
    try:
        with _progress(total, there) as progress:
            workers.run(work, missing, progress, settle)
    except KeyboardInterrupt:
        raise ConversionError("stopped; the same command goes on where it stopped") from None
    seconds = time.monotonic() - started
    dtypes = sorted({dtype_name(weight.written) for job in jobs for weight in job.weights})
    _say(
        f"{what}: {readable_bytes(total - there)} of {' and '.join(dtypes)} in {seconds:.1f} s "
        f"({readable_bytes((total - there) / max(seconds, 1e-9))}/s, {workers.processes} processes)"
    )


@contextmanager
def _progress(total: int, there: int) -> Iterator[Callable[[int], None]]:
    """A bar with bytes and bytes a second; where there is no terminal, a line now and then."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(total, there)
        return
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("writing", total=total, completed=there)
        yield lambda count: progress.advance(task, count)


class _Lines:
    """Progress for log files."""

    def __init__(self, total: int, there: int) -> None:
        self.total = total
        self.written = there
        self.new = 0
        self.started = self.told = time.monotonic()

    def __call__(self, count: int) -> None:
        self.written += count
        self.new += count
        now = time.monotonic()
        if now - self.told >= _LINE_SECONDS:
            self.told = now
            speed = readable_bytes(self.new / (now - self.started))
            _say(f"{readable_bytes(self.written)} of {readable_bytes(self.total)} written, {speed}/s")


def _say(sentence: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(sentence, markup=False)
