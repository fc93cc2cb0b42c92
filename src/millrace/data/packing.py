"""Which sequences share a micro-batch, and which data-parallel rank trains on what.

Both questions are answered from the lengths alone, deterministically, so that every rank computes the same answer
without asking another.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from millrace.data.errors import DataError


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Sequences to bins of at most `capacity` tokens, by first-fit decreasing.

    First-fit decreasing needs at most 11/9 of the fewest possible bins plus 6/9 (Dósa, 2007). A sequence is never cut.
    O(B log B) for B sequences.

    Args:
        lengths: tokens of each sequence, at least 1 each.
        capacity: tokens of one bin.

    Returns:
        The indices of each bin, ascending; the bins in the order in which they were opened.

    Raises:
        DataError: a sequence is empty or longer than the capacity.
    """
    for index, length in enumerate(lengths):
        if length > capacity:
            raise DataError(
                f"sequence {index} has {length} tokens, but a micro-batch holds {capacity}: "
                "raise trainer.max_tokens_per_micro_batch or shorten the sequence"
            )
        if length < 1:
            raise DataError(f"sequence {index} has {length} tokens: an empty sequence cannot be packed")
    bins: list[list[int]] = []
    free = _FreeSpace(len(lengths), capacity)
    for index in _longest_first(lengths):
        where = free.take_first(lengths[index])
        if where == len(bins):
            bins.append([])
        bins[where].append(index)
    return [sorted(members) for members in bins]


def split_balanced(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Sequences to `parts` ranks with about the same number of tokens each (longest processing time first).

    The largest part exceeds the best possible one by at most a third (Graham, 1969).

    Args:
        lengths: tokens of each sequence.
        parts: number of ranks, at least 1.

    Returns:
        `parts` lists of ascending indices; every index stands in exactly one. With fewer sequences than ranks some are
        empty.
    """
    if parts < 1:
        raise ValueError(f"cannot split {len(lengths)} sequences into {parts} parts")
    members: list[list[int]] = [[] for _ in range(parts)]
    loads = [(0, 0, part) for part in range(parts)]  # tokens, sequences, part: ties go to the part with fewer sequences
    for index in _longest_first(lengths):
        tokens, count, part = loads[0]
        members[part].append(index)
        heapq.heapreplace(loads, (tokens + lengths[index], count + 1, part))
    return [sorted(part) for part in members]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))


class _FreeSpace:
    """The free tokens of each bin in a tournament tree, so that the first bin that fits is found in O(log B)."""

    def __init__(self, bins: int, capacity: int) -> None:
        self._leaves = 1 << max(bins - 1, 0).bit_length()
        self._tree = [capacity] * (2 * self._leaves)

    def take_first(self, size: int) -> int:
        """Take `size` tokens from the first bin that has them free, and say which it was."""
        tree, node = self._tree, 1
        while node < self._leaves:
            node *= 2
            if tree[node] < size:
                node += 1
        tree[node] -= size
        where = node - self._leaves
        while node > 1:
            node //= 2
            tree[node] = max(tree[2 * node], tree[2 * node + 1])
        return where
