"""Whole checkpoints from one format to the other, file by file, without a model in memory.

A conversion is a list of files to write, each with the parameters that go into it. Processes write the files side by
side; each holds one parameter at a time. A file gets its name when it is complete and on the disk, so that a
conversion that was killed goes on with the files that are missing. The folder as a whole gets its name at the end.

Which part of a parameter Megatron-Core stores under which key is not known here: `Part`s say it, and they come from
Megatron-Core itself (`millrace.megatron.skeleton`).
"""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from millrace.converters import processes
from millrace.converters.errors import ConversionError
from millrace.converters.mapping import Entry
from millrace.converters.mapping import Mapping as WeightMapping
from millrace.converters.rules import Shape
from millrace.converters.safetensors_io import PLAN, HFReader, LazyTensor, header_of
from millrace.converters.torch_dist import (
    OutputFile,
    StoredTensor,
    append_tensor,
    memory_of,
    overlap,
    partial_of,
    read_box,
    settle_file,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Data types that weights may have."""

OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Job = TypeVar("Job", "ShardJob", "HFJob")


@dataclass(frozen=True)
class Part:
    """A part of a parameter that a Megatron checkpoint stores under a key of its own, or at a place of its own."""

    key: str
    at: Shape
    """Its corner in the stored tensor."""
    shape: Shape
    """Its shape there."""
    start: int
    """Where it starts in the parameter, in elements."""
    stride: Shape
    """Its strides in the parameter."""

    def of(self, parameter: Tensor) -> Tensor:
        """This part of a contiguous parameter, as a view."""
        return parameter.as_strided(self.shape, self.stride, parameter.storage_offset() + self.start)


@dataclass(frozen=True)
class Layout:
    """How Megatron-Core stores a model: the parts of each parameter, by canonical name, and the size of each key."""

    parts: Mapping[str, tuple[Part, ...]]
    sizes: Mapping[str, Shape]


@dataclass(frozen=True)
class Weight:
    """A parameter to convert."""

    entry: Entry
    parts: tuple[Part, ...]
    stored: torch.dtype
    """Data type of the source."""
    written: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that are written, vocabulary padding not counted."""
        return sum(math.prod(shape) for shape in self.entry.hf.values()) * self.written.itemsize


# Hugging Face -> Megatron


@dataclass(frozen=True)
class ShardJob:
    """One `.distcp` file of a Megatron checkpoint."""

    path: Path
    record: Path
    """File that says what the finished file holds, as long as the checkpoint is not finished."""
    source: Path
    weights: tuple[Weight, ...]

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights)


@dataclass(frozen=True)
class Written:
    """What a file holds, for the checkpoint's tables."""

    size: int
    crc32: int
    pieces: tuple[tuple[str, Shape, int, int], ...]
    """Key, corner, first byte and number of bytes of each piece."""


def check_hf(mapping: WeightMapping, reader: HFReader, dtype: torch.dtype | None) -> None:
    """Raise ConversionError naming the first tensor of a Hugging Face checkpoint that is missing, has no place, or is
    of another shape or data type than it should be.

    Without a `dtype` to bring them to, tensors of one kind must have one: else shards of two checkpoints are mixed.
    """
    mapping.check_names(reader.names)
    first_of_kind: dict[str, LazyTensor] = {}
    for entry in mapping:
        sources = [reader.lazy(name) for name in entry.hf]
        for source, shape in zip(sources, entry.hf.values(), strict=True):
            _check_source(source, shape)
            if dtype is None and entry.dtype is None:
                _check_same_dtype(source, first_of_kind.setdefault(_kind(source.name), source))
                _check_same_dtype(source, sources[0])


def weights_of_hf(mapping: WeightMapping, layout: Layout, reader: HFReader, dtype: torch.dtype | None) -> list[Weight]:
    """What is to be written of a Hugging Face checkpoint that `check_hf` has passed; `dtype` None keeps each tensor's
    own."""
    weights = []
    for entry in mapping:
        if not entry.is_copy:
            stored = reader.lazy(next(iter(entry.hf))).dtype
            weights.append(Weight(entry, layout.parts[entry.name], stored, entry.dtype or dtype or stored))
    return weights


def _check_source(source: LazyTensor, shape: Shape) -> None:
    if source.shape != shape:
        raise ConversionError(
            f"{source.name} in {source.file} has shape {list(source.shape)}, but config.json asks for {list(shape)}"
        )
    if source.dtype not in FLOATS:
        raise ConversionError(
            f"{source.name} in {source.file} is {dtype_name(source.dtype)}, where weights must be "
            f"{', '.join(map(dtype_name, FLOATS))}; start from the checkpoint's original, before it was quantized"
        )


def _check_same_dtype(one: LazyTensor, other: LazyTensor) -> None:
    if one.dtype != other.dtype:
        raise ConversionError(
            f"{one.name} in {one.file} is {dtype_name(one.dtype)}, but {other.name} in {other.file} is "
            f"{dtype_name(other.dtype)}: are these files of one checkpoint? If so, give --dtype to write all alike"
        )


def _kind(name: str) -> str:
    """The name without the numbers of layer and expert: such tensors have one data type in one checkpoint."""
    return re.sub(r"\.\d+\.", ".N.", name)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write_shard(job: ShardJob) -> Written:
    """Write one `.distcp` file, which `settle` then gives its name. Runs in a process of its own."""
    reader = _reader(job.source)
    pieces = []
    with _writing(job.path) as file:
        for weight in job.weights:
            parameter = _parameter(weight, reader)
            for part in weight.parts:
                start, length = append_tensor(file, part.of(parameter).contiguous())
                pieces.append((part.key, part.at, start, length))
    return Written(file.size, file.crc32, tuple(pieces))


def read_record(job: ShardJob) -> Written | None:
    """What a `.distcp` file holds; None when it is not finished."""
    try:
        found = json.loads(job.record.read_text(encoding="utf-8"))
        size = job.path.stat().st_size
    except FileNotFoundError:
        return None
    pieces = tuple((key, tuple(at), start, length) for key, at, start, length in found["pieces"])
    return Written(found["size"], found["crc32"], pieces) if size == found["size"] else None


def _parameter(weight: Weight, reader: HFReader) -> Tensor:
    whole = weight.entry.to_megatron([reader.lazy(name).read() for name in weight.entry.hf])
    return whole.to(weight.written).contiguous()


@functools.lru_cache(maxsize=1)
def _reader(path: Path) -> HFReader:
    return HFReader(path)


# Megatron -> Hugging Face


@dataclass(frozen=True)
class HFJob:
    """One safetensors file of a Hugging Face checkpoint."""

    path: Path
    source: Path
    """Folder of the `.distcp` files."""
    weights: tuple[Weight, ...]
    stored: Mapping[str, StoredTensor]
    """The tensors that the weights are read from."""

    @property
    def tensors(self) -> dict[str, tuple[torch.dtype, Shape]]:
        return {name: (weight.written, shape) for weight in self.weights for name, shape in weight.entry.hf.items()}

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(header_of(self.tensors)) + self.nbytes


def weights_of_checkpoint(
    mapping: WeightMapping, layout: Layout, stored: Mapping[str, StoredTensor], folder: Path, dtype: torch.dtype | None
) -> list[Weight]:
    """What is to be written of a Megatron checkpoint, with every tensor checked.

    Optimizer state and Transformer Engine's extra states are not read. Raises ConversionError naming the first tensor
    that is missing, has no place, or is of another shape or data type than it should be.
    """
    for key in stored:
        if key not in layout.sizes and not key.startswith("optimizer.") and "_extra_state" not in key:
            raise ConversionError(f"{folder} holds {key}, for which the model has no parameter")
    weights = []
    for entry in mapping:
        if entry.is_copy:
            continue
        parts = layout.parts[entry.name]
        for part in parts:
            if part.key not in stored:
                raise ConversionError(f"{folder} lacks {part.key}, which config.json asks for")
            _check_stored(part, stored[part.key], layout.sizes[part.key], entry, folder)
        found = stored[parts[0].key].dtype
        weights.append(Weight(entry, parts, found, entry.dtype or dtype or found))
    return weights


def _check_stored(part: Part, stored: StoredTensor, size: Shape, entry: Entry, folder: Path) -> None:
    if stored.dtype not in FLOATS:
        raise ConversionError(
            f"{part.key} in {folder} is {dtype_name(stored.dtype)}, where weights must be "
            f"{', '.join(map(dtype_name, FLOATS))}"
        )
    needed, fits = part.shape, stored.shape == size
    if entry.rule.kind == "vocabulary":
        # How many rows pad the vocabulary depends on the layout that the checkpoint was saved at.
        rows = next(iter(entry.hf.values()))[0]
        needed = (rows, *part.shape[1:])
        fits = stored.shape[1:] == size[1:] and stored.shape[0] >= rows
    if not fits:
        raise ConversionError(
            f"{part.key} in {folder} has shape {list(stored.shape)}, but config.json asks for {list(size)}"
        )
    shared = (overlap(part.at, needed, chunk.at, chunk.shape) for chunk in stored.chunks)
    if sum(math.prod(box[1]) for box in shared if box) != math.prod(needed):
        raise ConversionError(f"{folder} does not hold all of {part.key}: pieces of it are missing")


def write_hf_file(job: HFJob) -> Written:
    """Write one safetensors file, which `settle` then gives its name. Runs in a process of its own."""
    with _writing(job.path, checksum=False) as file:
        file.write(header_of(job.tensors))
        for weight in job.weights:
            for tensor in weight.entry.to_hf([_stored_parameter(weight, job)]).values():
                values = tensor.to(weight.written).contiguous()
                file.write(memory_of(values))
    return Written(file.size, file.crc32, ())


def _stored_parameter(weight: Weight, job: HFJob) -> Tensor:
    parameter = torch.empty(weight.entry.local_shape(1), dtype=weight.stored)
    for part in weight.parts:
        read_box(job.source, part.key, job.stored[part.key], part.at, part.of(parameter))
    return parameter


# Files


def settle(job: ShardJob | HFJob, written: Written) -> None:
    """Wait until a file is on the disk, and give it its name; then a shard its record, without which it is none."""
    with saying_write_problems(job.path):
        settle_file(job.path)
        if isinstance(job, ShardJob):
            partial_of(job.record).write_text(json.dumps(asdict(written)), encoding="utf-8")
            settle_file(job.record)


@contextmanager
def _writing(path: Path, *, checksum: bool = True) -> Iterator[OutputFile]:
    """An output file that counts for the progress of all processes, and that is removed when it cannot be finished."""
    with saying_write_problems(path):
        file = OutputFile(path, processes.advance, checksum=checksum)
        try:
            yield file
            file.close()
        except BaseException:
            with suppress(OSError):  # what stopped the writing is what is to be said
                file.give_up()
            raise


@contextmanager
def saying_write_problems(path: Path) -> Iterator[None]:
    """Says an OSError in one sentence with the file's name, that of `path` where the system names none."""
    try:
        yield
    except OSError as error:
        raise ConversionError(write_problem(Path(error.filename or path), error)) from error


def write_problem(path: Path, error: OSError) -> str:
    """What a failed write says to the user."""
    if error.errno in OUT_OF_SPACE:
        return (
            f"no space left on the disk for {path} ({error.strerror}); make room there, and the same command goes on "
            "where it stopped"
        )
    return f"{path} cannot be written: {error.strerror or error}"


def in_files(weights: Sequence[Weight], limit: int) -> list[tuple[Weight, ...]]:
    """The weights in groups of at most `limit` bytes (one weight may be larger), in their order."""
    files: list[list[Weight]] = []
    held = limit
    for weight in weights:
        if not files or held + weight.nbytes > limit:
            files.append([])
            held = 0
        files[-1].append(weight)
        held += weight.nbytes
    # Wide values first: all then lie at multiples of their size in a file without gaps.
    return [tuple(sorted(group, key=lambda weight: -weight.written.itemsize)) for group in files]


def require_space(folder: Path, needed: int) -> None:
    """Raises ConversionError when the disk of `folder` has fewer than `needed` bytes free."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ConversionError(
            f"{folder} needs about {needed / 1e9:.2f} GB more, but only {free / 1e9:.2f} GB are free there: make room, "
            "or name another folder"
        )


def open_unfinished(folder: Path, plan: Mapping[str, Any]) -> int:
    """The folder of a conversion that is not finished, locked against a second one: a descriptor that holds the lock.

    What a conversion with the same plan has finished in it stays; anything else is removed. Raises ConversionError
    when another process is writing there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ConversionError(f"{folder} is being written by another conversion; wait for it or end it") from None
    if not _same_plan(folder, plan):
        _empty(folder)
        aside = folder / (PLAN + ".partial")
        aside.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
        aside.rename(folder / PLAN)
    for left in folder.rglob("*.partial"):
        left.unlink()
    return lock


def _same_plan(folder: Path, plan: Mapping[str, Any]) -> bool:
    try:
        return bool(json.loads((folder / PLAN).read_text(encoding="utf-8")) == json.loads(json.dumps(plan)))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return False


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def identity_of(files: Iterable[Path]) -> dict[str, list[int]]:
    """Size and time of change of files: enough to notice that a source is another one than it was."""
    facts = {str(file): file.stat() for file in sorted(files)}
    return {name: [found.st_size, found.st_mtime_ns] for name, found in facts.items()}
