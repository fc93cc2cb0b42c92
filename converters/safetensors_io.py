"""Hugging Face checkpoints on disk: reading slices of them, and writing sharded ones.

Reading: `HFReader` looks at the headers of all files at once, so that a missing or truncated file is found before the
first tensor is loaded; tensors and slices of them are then read where they are needed.

Writing, with one process or with many, none of which holds the whole model:

    prepare_export(path)                                    # rank 0, then a barrier
    writer = HFWriter(path, rank=rank)                      # every rank
    writer.add(name, tensor)                                # ... the tensors that it owns
    manifest = writer.close()                               # gathered to rank 0 by the caller
    publish(path, manifests, source=hf_folder)              # rank 0: index, config, tokenizer, rename

Everything is written into `path` + ".writing" and renamed as a whole, so that a folder of that name is always complete.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from millrace.converters.errors import ConversionError
from millrace.converters.rules import Shape
from millrace.converters.torch_dist import read_into

INDEX = "model.safetensors.index.json"
PLAN = "conversion.json"
"""In a folder that is not finished: what a conversion is converting, so that it can go on after a kill."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICENSE*")
"""What an export takes over from its source besides weights: config, tokenizer, chat template, generation config."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file; indexing it with slices reads only that part."""

    file: Path
    name: str
    shape: Shape
    dtype: torch.dtype
    start: int
    """Where its bytes start in the file."""
    _handle: Callable[[], Any] = field(repr=False, compare=False)
    """safetensors' view of the file, which maps it into memory."""

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def __getitem__(self, index: Any) -> Tensor:
        try:
            return self._handle().get_slice(self.name)[index]
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{self.name} cannot be read from {self.file}: {error}") from error

    def read(self) -> Tensor:
        """The whole tensor in memory of its own; indexing maps the file, whose pages then count as the process's."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        try:
            read_into(self.file, self.start, tensor)
        except (EOFError, OSError) as error:
            raise ConversionError(f"{self.name} cannot be read from {self.file}: {error}") from error
        return tensor


class HFReader:
    """The tensors of a Hugging Face checkpoint (its folder, or one safetensors file), by name.

    Raises ConversionError when the folder holds no safetensors, when a file that the index names is missing or
    truncated, or when the index and the files disagree: files of two checkpoints are then mixed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._tensors: dict[str, LazyTensor] = {}
        if self.path.suffix == ".safetensors":
            self._open(self.path)
            return
        weight_map = _read_index(self.path)
        files = sorted(set(weight_map.values())) if weight_map is not None else [_single_file(self.path)]
        for file in files:
            self._open(self.path / file)
        if weight_map is not None:
            self._check_index(weight_map)

    def _check_index(self, weight_map: dict[str, str]) -> None:
        index = self.path / INDEX
        for name, file in weight_map.items():
            if name not in self._tensors or self._tensors[name].file.name != file:
                raise ConversionError(f"{index} places {name} in {file}, but that file does not hold it")
        for name, tensor in self._tensors.items():
            if name not in weight_map:
                raise ConversionError(
                    f"{tensor.file} holds {name}, which {index} does not name: are these files of one checkpoint?"
                )

    def _open(self, file: Path) -> None:
        header = read_header(file)
        handle = cache(partial(safe_open, file, framework="pt", device="cpu"))
        data = _data_start(file)
        for name, facts in header.items():
            if facts["dtype"] not in DTYPES:
                raise ConversionError(f"{name} in {file} has data type {facts['dtype']}, which is not supported")
            if name in self._tensors:
                raise ConversionError(f"{name} is both in {self._tensors[name].file} and in {file}")
            start, end = facts["data_offsets"]
            tensor = LazyTensor(file, name, tuple(facts["shape"]), DTYPES[facts["dtype"]], data + start, handle)
            if end - start != tensor.nbytes:
                raise ConversionError(f"{file} is damaged: {name} has {end - start} bytes, not {tensor.nbytes}")
            self._tensors[name] = tensor

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    @cached_property
    def total_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def lazy(self, name: str) -> LazyTensor:
        """The tensor without its values: has a shape and a dtype, and is read by indexing."""
        if name not in self._tensors:
            raise ConversionError(f"{self.path} holds no tensor {name}, which config.json asks for")
        return self._tensors[name]

    def tensor(self, name: str) -> Tensor:
        return self.lazy(name)[...]


def _read_index(path: Path) -> dict[str, str] | None:
    """Tensor name to file name, None when the checkpoint has no index."""
    file = path / INDEX
    if not file.exists():
        return None
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ConversionError(f"{file} is not a valid index ({error!r}); fetch it again") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{file} names no tensors; fetch it again")
    return weight_map


def _single_file(path: Path) -> str:
    found = sorted(file.name for file in path.glob("*.safetensors"))
    if "model.safetensors" in found:
        return "model.safetensors"
    if len(found) == 1:
        return found[0]
    if found:
        raise ConversionError(f"{path} holds {len(found)} safetensors files, but no {INDEX} that names their tensors")
    if not path.exists():
        raise ConversionError(f"{path} does not exist; name the folder of a Hugging Face checkpoint")
    hint = "; convert its .bin files to safetensors first" if list(path.glob("*.bin")) else ""
    raise ConversionError(f"{path} holds no safetensors file{hint}")


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """dtype, shape and data_offsets of every tensor of a safetensors file, which is checked to be whole."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0] if size >= 8 else 0
            text = stream.read(length) if 8 + length <= size else b""
    except FileNotFoundError:
        raise ConversionError(f"{file} is missing; fetch it again") from None
    if not text:
        raise ConversionError(f"{file} is truncated: {size} bytes do not even hold its header; fetch it again")
    try:
        header = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ConversionError(f"{file} is damaged: its header is not valid JSON; fetch it again") from None
    header.pop("__metadata__", None)
    expected = 8 + length + max((facts["data_offsets"][1] for facts in header.values()), default=0)
    if size != expected:
        what = "truncated" if size < expected else "damaged"
        raise ConversionError(f"{file} is {what}: it has {size} bytes, its header asks for {expected}; fetch it again")
    return header


def _data_start(file: Path) -> int:
    with file.open("rb") as stream:
        return 8 + int(struct.unpack("<Q", stream.read(8))[0])


def header_of(tensors: Mapping[str, tuple[torch.dtype, Shape]]) -> bytes:
    """The first bytes of a safetensors file whose tensors follow in this order, one behind the other."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values start at a multiple of eight
    return struct.pack("<Q", len(text)) + text


@dataclass(frozen=True)
class Manifest:
    """What one writer wrote: file name in the unfinished folder -> bytes of each tensor in it."""

    files: dict[str, dict[str, int]]


def unfinished(path: str | Path) -> Path:
    """Where an export to `path` is written before it is renamed."""
    path = Path(path)
    return path.with_name(path.name + ".writing")


def prepare_export(path: str | Path, *, overwrite: bool = False) -> None:
    """Make the folder that writers write into, without leftovers of an export that was interrupted.

    Raises ConversionError when `path` exists and may not be overwritten. With several ranks only rank 0 calls it.
    """
    if Path(path).exists() and not overwrite:
        raise ConversionError(f"{path} exists already; remove it or name another folder for the export")
    try:
        shutil.rmtree(unfinished(path), ignore_errors=True)
        unfinished(path).mkdir(parents=True)
    except OSError as error:
        raise ConversionError(f"{path} cannot be written: {error.strerror}") from error


class HFWriter:
    """Collects tensors into safetensors files of at most `max_shard_bytes` (one tensor may be larger).

    Holds the tensors of the file that is being filled: on the CPU these are the caller's own tensors, which therefore
    must not change until the file is written.
    """

    def __init__(self, path: str | Path, *, max_shard_bytes: int = 2 << 30, rank: int = 0) -> None:
        self.folder = unfinished(path)
        self.max_shard_bytes = max_shard_bytes
        self.rank = rank
        self._files: dict[str, dict[str, int]] = {}
        self._open: dict[str, Tensor] = {}
        self._open_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._open and self._open_bytes + size > self.max_shard_bytes:
            self._flush()
        self._open[name] = tensor.detach().cpu().contiguous()
        self._open_bytes += size

    def close(self) -> Manifest:
        """Write what is left and say what was written."""
        self._flush()
        return Manifest(self._files)

    def _flush(self) -> None:
        if not self._open:
            return
        file = f"rank-{self.rank:05d}-{len(self._files):05d}.safetensors"
        try:
            save_file(self._open, self.folder / file, metadata={"format": "pt"})
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{self.folder / file} cannot be written: {error}") from error
        self._files[file] = {name: t.numel() * t.element_size() for name, t in self._open.items()}
        self._open, self._open_bytes = {}, 0


def publish(
    path: str | Path,
    manifests: Sequence[Manifest],
    *,
    source: str | Path,
    dtype: str | None = None,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Number the shards, write the index, take config and tokenizer over from `source`, and rename the folder.

    `dtype` is what config.json then names as the data type (None: as in the source). `texts` are files to write
    besides, by name, in place of the source's. Raises ConversionError when two manifests hold the same tensor, or when
    there is none.
    """
    path, folder = Path(path), unfinished(path)
    try:
        index = _number_shards(folder, [pair for manifest in manifests for pair in manifest.files.items()])
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for file in folder.glob("*.safetensors"):
            file.chmod((folder / INDEX).stat().st_mode)  # save_file leaves them readable to their owner alone
        copy_companions(source, folder)
        _describe_export(folder / "config.json", dtype)
        for name, text in (texts or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / PLAN).unlink(missing_ok=True)
        put_in_place(folder, path)
    except OSError as error:
        raise ConversionError(f"{path} cannot be written: {error}") from error
    return path


def put_in_place(folder: Path, path: Path) -> None:
    """Rename a finished folder to `path`, where it replaces an earlier one."""
    _flush_to_disk(folder)
    replaced = path.with_name(path.name + ".replaced")
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
    folder.rename(path)
    shutil.rmtree(replaced, ignore_errors=True)


def _number_shards(folder: Path, shards: Sequence[tuple[str, dict[str, int]]]) -> dict[str, Any]:
    weight_map: dict[str, str] = {}
    for number, (file, tensors) in enumerate(shards, start=1):
        if twice := sorted(tensors.keys() & weight_map.keys()):
            raise ConversionError(f"{twice[0]} was written twice, by two ranks")
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / file).rename(folder / final)
        weight_map.update(dict.fromkeys(tensors, final))
    if not weight_map:
        raise ConversionError(f"{folder} received no tensors")
    total = sum(size for _, tensors in shards for size in tensors.values())
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def copy_companions(source: str | Path, target: str | Path) -> None:
    """Copy config, tokenizer, chat template and generation config of a checkpoint; weights and their index stay."""
    source, target = Path(source), Path(target)
    files = {file for pattern in COPIED for file in source.glob(pattern) if file.is_file()}
    for file in sorted(files):
        if not file.name.endswith(".index.json"):
            shutil.copyfile(file, target / file.name)


def _describe_export(file: Path, dtype: str | None) -> None:
    """Layers for multi-token prediction are not exported; a config.json that announces them must not."""
    if dtype is None and not file.is_file():
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    changes: dict[str, Any] = {}
    if dtype is not None:
        changes["dtype" if "dtype" in config else "torch_dtype"] = dtype
    if config.get("num_nextn_predict_layers"):
        changes["num_nextn_predict_layers"] = 0
    if changes:
        file.write_text(json.dumps(config | changes, indent=2) + "\n", encoding="utf-8")


def _flush_to_disk(folder: Path) -> None:
    """Make the folder's files survive a power cut before the rename makes them visible."""
    for file in [*folder.iterdir(), folder]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_hf(
    path: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    source: str | Path,
    max_shard_bytes: int = 2 << 30,
    overwrite: bool = False,
) -> Path:
    """Write a whole checkpoint from one process, streaming."""
    prepare_export(path, overwrite=overwrite)
    writer = HFWriter(path, max_shard_bytes=max_shard_bytes)
    for name, tensor in tensors:
        writer.add(name, tensor)
    return publish(path, [writer.close()], source=source)
