"""The table of a torch.distributed.checkpoint folder: which tensors there are, and where their pieces lie."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from millrace.converters.errors import ConversionError
from millrace.converters.rules import Shape
from millrace.converters.torch_dist import Chunk, StoredTensor

METADATA = ".metadata"
METADATA_TYPES = {
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(("torch.distributed.checkpoint.metadata", name) for name in vars(torch_metadata) if "Metadata" in name),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
}
"""What torch's checkpoint metadata is made of, besides data types."""


class _OnlyFormatTypes(pickle.Unpickler):
    """Reads torch's checkpoint metadata, and refuses a pickle that names anything else, since unpickling runs code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in METADATA_TYPES and not (module == "torch" and _is_data_type(name)):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def _is_data_type(name: str) -> bool:
    return isinstance(getattr(torch, name, None), torch.dtype)


def read_metadata(folder: Path) -> Metadata:
    """The table of a checkpoint. Raises ConversionError when it is missing, damaged, or holds more than such a
    table."""
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            found = _OnlyFormatTypes(file).load()
    except (pickle.UnpicklingError, EOFError, OSError) as error:
        raise ConversionError(f"{path} is not read: {error}") from None
    if not isinstance(found, Metadata):
        raise ConversionError(f"{path} is not read: it holds no table of tensors")
    return found


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint by key; objects that are no tensors are left out.

    Raises ConversionError where a file is missing or shorter than the table says, before anything is read.
    """
    table = read_metadata(folder)
    sizes = {file.name: file.stat().st_size for file in folder.glob("*.distcp")}
    found = {}
    for key, described in table.state_dict_metadata.items():
        if isinstance(described, BytesStorageMetadata):
            continue
        chunks = tuple(_chunk(folder, table, sizes, key, tuple(c.offsets), tuple(c.sizes)) for c in described.chunks)
        found[key] = StoredTensor(tuple(described.size), described.properties.dtype, chunks)
    return found


def _chunk(folder: Path, table: Metadata, sizes: dict[str, int], key: str, at: Shape, shape: Shape) -> Chunk:
    info = (table.storage_data or {}).get(MetadataIndex(key, torch.Size(at)))
    if info is None:
        raise ConversionError(f"{folder / METADATA} does not say in which file {key} lies")
    file, end = folder / info.relative_path, info.offset + info.length
    if info.relative_path not in sizes:
        raise ConversionError(f"{file}, which holds {key}, is missing")
    if sizes[info.relative_path] < end:
        raise ConversionError(
            f"{file}, which holds {key}, is truncated: it has {sizes[info.relative_path]} bytes where at least {end} "
            "are needed"
        )
    if getattr(info, "transform_descriptors", None):
        raise ConversionError(f"{key} in {file} is stored compressed, which is not supported")
    return Chunk(at, shape, info.relative_path, info.offset, info.length)


def write_metadata(folder: Path, table: Metadata) -> None:
    """Write the table, aside and then renamed; the last file of a checkpoint."""
    aside = folder / (METADATA + ".writing")
    with aside.open("wb") as file:
        pickle.dump(table, file)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(folder / METADATA)


def with_places(
    table: Metadata, dtypes: Mapping[str, torch.dtype], places: Mapping[tuple[str, Shape], tuple[str, int, int]]
) -> Metadata:
    """A table of tensors, completed: data type of each key, and file, first byte and length of each piece, which is
    given by key and corner. Raises ConversionError for a piece that was not written."""
    described, stored = {}, dict(table.storage_data or {})
    for key, tensor in table.state_dict_metadata.items():
        described[key] = tensor
        if isinstance(tensor, TensorStorageMetadata):
            described[key] = replace(tensor, properties=replace(tensor.properties, dtype=dtypes[key]))
            for number, chunk in enumerate(tensor.chunks):
                if (key, tuple(chunk.offsets)) not in places:
                    raise ConversionError(f"{key} was not written at {list(chunk.offsets)}")
                place = _StorageInfo(*places[key, tuple(chunk.offsets)])
                stored[MetadataIndex(key, chunk.offsets, number)] = place
    return Metadata(described, table.planner_data, stored)
