"""The files of torch.distributed.checkpoint, in which Megatron-Core keeps its checkpoints, one tensor at a time.

A folder holds `.metadata`, a table of what is stored where (see `torch_metadata`), and `.distcp` files, which are
archives of `torch.save` one behind the other: one for each stored piece (chunk) of a tensor. `append_tensor` writes a
piece, `read_box` reads any box of a tensor, whatever pieces it was saved in; neither holds more than that.
"""

from __future__ import annotations

import ctypes
import io
import math
import os
import pickle
import zipfile
import zlib
from collections.abc import Callable, Sequence
from ctypes import c_int64
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from millrace.converters.errors import ConversionError
from millrace.converters.rules import Shape

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
}

_WRITE_BYTES = 16 << 20
"""Bytes handed to the system at once, so that progress shows and a stop is heard within a large tensor."""

_LIBC = ctypes.CDLL(None)
_SYNC_FILE_RANGE_WRITE = 2


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy; valid while the tensor lives."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B") if size else memoryview(b"")


def read_into(file: Path, start: int, tensor: Tensor) -> None:
    """Fill a contiguous tensor with the bytes of a file from `start` on. Raises OSError, EOFError at its end."""
    left = memory_of(tensor)
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        while len(left):
            count = stream.readinto(left)
            if not count:
                raise EOFError(f"{file} ends {len(left)} bytes too early")
            left = left[count:]


class OutputFile:
    """A file that is written from front to back, counted and checksummed on the way.

    Until `settle_file` it has the suffix `.partial`. `progress` is told the bytes as they are written, and may raise to
    stop.
    """

    def __init__(
        self, path: Path, progress: Callable[[int], None] = lambda count: None, *, checksum: bool = True
    ) -> None:
        self.size = 0
        self.crc32 = 0
        self.problem: Exception | None = None
        """What a write failed with; torch.save hides it behind an error of its own."""
        self._progress = progress
        self._checksum = checksum
        self._started = 0
        self._partial = partial_of(path)
        self._stream = self._partial.open("wb", buffering=1 << 20)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            for start in range(0, len(view), _WRITE_BYTES):
                piece = view[start : start + _WRITE_BYTES]
                if self._checksum:
                    self.crc32 = zlib.crc32(piece, self.crc32)
                self._stream.write(piece)
                self.size += len(piece)
                if self.size - self._started >= _WRITE_BYTES:
                    self._start_disk()
                self._progress(len(piece))
        except Exception as problem:
            self.problem = problem
            raise
        return len(view)

    def _start_disk(self) -> None:
        """Let the disk begin, without waiting for it: the system itself waits until a tenth of its memory is full."""
        self._stream.flush()
        if hasattr(_LIBC, "sync_file_range"):
            count = self.size - self._started
            _LIBC.sync_file_range(self._stream.fileno(), c_int64(self._started), c_int64(count), _SYNC_FILE_RANGE_WRITE)
        self._started = self.size

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()

    def give_up(self) -> None:
        """Remove what was written."""
        self._partial.unlink(missing_ok=True)
        self._stream.close()


def partial_of(path: Path) -> Path:
    """What a file is called until it is settled."""
    return path.with_name(path.name + ".partial")


def settle_file(path: Path) -> None:
    """Give a file that was written whole its name, when it is on the disk."""
    descriptor = os.open(partial_of(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    partial_of(path).rename(path)


def append_tensor(file: OutputFile, tensor: Tensor) -> tuple[int, int]:
    """Append one piece, a contiguous CPU tensor, to a `.distcp` file; where it starts and how many bytes it takes."""
    start = file.size
    # torch.save writes the whole storage: give it one that is this piece, without a copy.
    own = torch.frombuffer(memory_of(tensor), dtype=tensor.dtype).view(tensor.shape) if tensor.numel() else tensor
    try:
        torch.save(own, cast(IO[bytes], file))  # of a file it only writes
    except RuntimeError:
        if file.problem is not None:
            raise file.problem from None
        raise
    return start, file.size - start


@dataclass(frozen=True)
class Chunk:
    """A stored piece of a tensor: its place in the tensor, and in the files."""

    at: Shape
    shape: Shape
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint, as its metadata describes it."""

    shape: Shape
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


def overlap(one_at: Shape, one: Shape, other_at: Shape, other: Shape) -> tuple[Shape, Shape] | None:
    """Corner and shape of what two boxes share, None when they share nothing."""
    low = tuple(max(a, b) for a, b in zip(one_at, other_at, strict=True))
    high = tuple(min(a + m, b + n) for a, m, b, n in zip(one_at, one, other_at, other, strict=True))
    if any(a >= b for a, b in zip(low, high, strict=True)):
        return None
    return low, tuple(b - a for a, b in zip(low, high, strict=True))


def read_box(folder: Path, key: str, stored: StoredTensor, at: Shape, target: Tensor) -> int:
    """Fill `target` with the box of a stored tensor whose corner is `at`; the number of elements that were found.

    Only the rows that are needed are read; a piece that is read whole is held against the checksum in its archive.
    Raises ConversionError naming key and file.
    """
    found = 0
    for chunk in stored.chunks:
        shared = overlap(at, tuple(target.shape), chunk.at, chunk.shape)
        if shared is None:
            continue
        corner, shape = shared
        into = target[_slices(corner, at, shape)]
        _read_part(folder / chunk.file, key, chunk, stored.dtype, _minus(corner, chunk.at), into)
        found += math.prod(shape)
    return found


def _minus(one: Shape, other: Shape) -> Shape:
    return tuple(a - b for a, b in zip(one, other, strict=True))


def _slices(corner: Shape, origin: Shape, shape: Shape) -> tuple[slice, ...]:
    return tuple(slice(c - o, c - o + n) for c, o, n in zip(corner, origin, shape, strict=True))


def _read_part(file: Path, key: str, chunk: Chunk, dtype: torch.dtype, corner: Shape, into: Tensor) -> None:
    """Read the part of one piece that starts at `corner` and has the shape of `into`."""
    try:
        record = _locate(file, chunk)
        if record.dtype != dtype:
            raise ValueError(f"it is {record.dtype}, but the table says {dtype}")
        if record.shape != chunk.shape:
            raise ValueError(f"it has shape {list(record.shape)}, but the table says {list(chunk.shape)}")
        first = _flat(corner, record.stride)
        last = _flat(tuple(c + n - 1 for c, n in zip(corner, into.shape, strict=True)), record.stride)
        count = last + 1 - first
        direct = into.is_contiguous() and into.stride() == record.stride and count == into.numel()
        data = into if direct else torch.empty(count, dtype=dtype)
        read_into(file, record.start + first * dtype.itemsize, data)
        if count == math.prod(chunk.shape) and zlib.crc32(memory_of(data)) != record.crc32:
            raise ValueError("its checksum is another one: its bytes were altered")
        if not direct:
            into.copy_(data.as_strided(into.shape, record.stride))
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise ConversionError(f"{key} cannot be read from {file}: {error}") from error


def _flat(corner: Shape, stride: Sequence[int]) -> int:
    return sum(c * s for c, s in zip(corner, stride, strict=True))


@dataclass(frozen=True)
class _Record:
    """Where the values of one `torch.save` archive lie, and what they are."""

    start: int
    crc32: int
    dtype: torch.dtype
    shape: Shape
    stride: Shape


class _Window(io.RawIOBase):
    """Part of a file as a file of its own, to read."""

    def __init__(self, stream: io.FileIO, start: int, length: int) -> None:
        self._stream = stream
        self._start = start
        self._length = length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        count = os.preadv(self._stream.fileno(), [view], self._start + self._at) if len(view) else 0
        self._at += count
        return count


def _locate(file: Path, chunk: Chunk) -> _Record:
    with file.open("rb", buffering=0) as stream:
        window = io.BufferedReader(_Window(stream, chunk.start, chunk.length), 1 << 13)
        archive = zipfile.ZipFile(window)
        names = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        values = names["data/0"]
        described = _TensorUnpickler(io.BytesIO(archive.read(names["data.pkl"]))).load()
        window.seek(values.header_offset + 26)
        name, extra = (int.from_bytes(window.read(2), "little") for _ in range(2))
    if values.compress_type != zipfile.ZIP_STORED:
        raise ValueError("it is compressed")
    dtype, offset, shape, stride = described
    start = chunk.start + values.header_offset + 30 + name + extra + offset * dtype.itemsize
    return _Record(start, values.CRC, dtype, shape, stride)


class _TensorUnpickler(pickle.Unpickler):
    """Reads what a `torch.save` archive says of its one tensor: data type, offset in its storage, shape and stride."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda dtype, offset, shape, stride, *rest: (dtype, offset, tuple(shape), tuple(stride))
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no tensor of floats needs")

    def persistent_load(self, described: Any) -> torch.dtype:
        return described[1]
