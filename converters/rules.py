"""How one Megatron parameter is cut out of Hugging Face tensors, and put back.

A rule knows nothing of names and files. It turns the HF tensors of one parameter into the shard of one tensor-parallel
rank (`shard`) and the shards of all ranks into the HF tensors (`merge`). Both only move values, so that a round trip is
bitwise. `shard` indexes its sources with slices alone: a source may be a tensor or a lazy slice of a file, of which
only the rank's own part is then read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from millrace.converters.errors import ConversionError

Shape = tuple[int, ...]


class Source(Protocol):
    """A tensor, or the lazy slice of a file that behaves like one."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, index: Any) -> Tensor: ...


class Rule(Protocol):
    kind: str
    """column, sections, row, vocabulary or replicated."""

    def local_shape(self, shapes: Sequence[Shape], tp: int) -> Shape:
        """Shape of one rank's shard, given the shapes of the HF tensors."""

    def shard(self, sources: Sequence[Source], tp: int, rank: int) -> Tensor:
        """The shard of tensor-parallel rank `rank` of `tp`."""

    def merge(self, shards: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        """The HF tensors from the shards of all ranks, in rank order. May return views of the shards."""


def _divide(size: int, parts: int, what: str) -> int:
    if size % parts:
        raise ConversionError(f"{size} {what} cannot be cut evenly over {parts} tensor-parallel ranks")
    return size // parts


def _join(pieces: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate; one piece is returned as it is, without a copy."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim=dim)


@dataclass(frozen=True)
class Replicated:
    """Every rank holds the whole tensor."""

    kind: str = "replicated"

    def local_shape(self, shapes: Sequence[Shape], tp: int) -> Shape:
        return shapes[0]

    def shard(self, sources: Sequence[Source], tp: int, rank: int) -> Tensor:
        return sources[0][:]

    def merge(self, shards: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        return [shards[0]]


@dataclass(frozen=True)
class Column:
    """Rows (output features) are cut over the ranks.

    Several HF tensors stand one after the other within each rank's shard: Megatron's fc1 is [gate; up] per rank. With
    `groups` they are interleaved: Megatron's qkv is, for each key/value group, the group's queries, its key, its value.
    """

    groups: int | None = None
    kind: str = "column"

    def _blocks(self, tp: int) -> int:
        return 1 if self.groups is None else _divide(self.groups, tp, "key/value groups")

    def local_shape(self, shapes: Sequence[Shape], tp: int) -> Shape:
        self._blocks(tp)
        return (sum(_divide(shape[0], tp, "rows") for shape in shapes), *shapes[0][1:])

    def shard(self, sources: Sequence[Source], tp: int, rank: int) -> Tensor:
        blocks = self._blocks(tp)
        parts = []
        for source in sources:
            rows = _divide(source.shape[0], tp, "rows")
            part = source[rank * rows : (rank + 1) * rows]
            parts.append(part.reshape(blocks, rows // blocks, *part.shape[1:]))
        return _join(parts, dim=1).flatten(0, 1)

    def merge(self, shards: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        tp = len(shards)
        blocks = self._blocks(tp)
        sizes = [_divide(shape[0], tp, "rows") // blocks for shape in shapes]
        cut = [shard.unflatten(0, (blocks, sum(sizes))).split(sizes, dim=1) for shard in shards]
        return [_join([pieces[n].flatten(0, 1) for pieces in cut], dim=0) for n in range(len(shapes))]


@dataclass(frozen=True)
class Sections:
    """One tensor of several blocks of rows; each block is cut over the ranks by itself.

    A rank's shard of Mamba's input projection is its part of z, then of x, of B, of C and of the time steps.
    """

    sizes: tuple[int, ...]
    """Rows of each block."""
    kind: str = "sections"

    def local_shape(self, shapes: Sequence[Shape], tp: int) -> Shape:
        return (sum(_divide(size, tp, "rows of a block") for size in self.sizes), *shapes[0][1:])

    def shard(self, sources: Sequence[Source], tp: int, rank: int) -> Tensor:
        pieces, first = [], 0
        for size in self.sizes:
            rows = _divide(size, tp, "rows of a block")
            pieces.append(sources[0][first + rank * rows : first + (rank + 1) * rows])
            first += size
        return _join(pieces, dim=0)

    def merge(self, shards: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        if len(shards) == 1:
            return [shards[0]]
        local = [size // len(shards) for size in self.sizes]
        cut = [shard.split(local) for shard in shards]
        return [torch.cat([pieces[n] for n in range(len(local)) for pieces in cut])]


@dataclass(frozen=True)
class Row:
    """Columns (input features) are cut over the ranks."""

    kind: str = "row"

    def local_shape(self, shapes: Sequence[Shape], tp: int) -> Shape:
        rows, columns = shapes[0]
        return rows, _divide(columns, tp, "columns")

    def shard(self, sources: Sequence[Source], tp: int, rank: int) -> Tensor:
        columns = _divide(sources[0].shape[1], tp, "columns")
        return sources[0][:, rank * columns : (rank + 1) * columns]

    def merge(self, shards: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        return [_join(shards, dim=1)]


@dataclass(frozen=True)
class Vocabulary:
    """Rows are cut over the ranks after zero rows were added, so that they divide; the zero rows are dropped again."""

    padded_rows: Callable[[int], int]
    """Rows with padding for a number of ranks."""
    kind: str = "vocabulary"

    def local_shape(self, shapes: Sequence[Shape], tp: int) -> Shape:
        return (_divide(self.padded_rows(tp), tp, "padded vocabulary rows"), *shapes[0][1:])

    def shard(self, sources: Sequence[Source], tp: int, rank: int) -> Tensor:
        source = sources[0]
        rows = _divide(self.padded_rows(tp), tp, "padded vocabulary rows")
        first = min(rank * rows, source.shape[0])
        present = source[first : min(first + rows, source.shape[0])]
        missing = rows - present.shape[0]
        if not missing:
            return present
        return torch.cat([present, present.new_zeros(missing, *present.shape[1:])])

    def merge(self, shards: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        return [_join(shards, dim=0)[: shapes[0][0]]]
