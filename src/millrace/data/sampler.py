"""The order in which rows are drawn: shuffled epochs, with a state from which drawing goes on exactly."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from millrace.data.curriculum import ChosenRows
from millrace.data.errors import DataError


class EpochSampler:
    """Indices 0..size-1, each exactly once an epoch, in an order of its own each epoch.

    An epoch's order depends on seed, stream and epoch alone, so the state is a position.

    Args:
        size: number of rows, at least 1.
        seed: 0 or more.
        stream: tells apart samplers with one seed.
    """

    def __init__(self, size: int, seed: int, stream: int = 0) -> None:
        if size < 1:
            raise DataError("cannot draw from a data set without rows")
        self.size, self._seed, self._stream = size, seed, stream
        self._epoch, self._position = 0, 0
        self._order = self._order_of(0)

    @property
    def drawn(self) -> int:
        """Indices drawn so far."""
        return self._epoch * self.size + self._position

    def next(self, n: int) -> list[int]:
        """The next n indices; where an epoch ends among them, the next one follows."""
        taken: list[int] = []
        while len(taken) < n:
            if self._position == self.size:
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._order_of(self._epoch)
            end = min(self.size, self._position + n - len(taken))
            taken += self._order[self._position : end].tolist()
            self._position = end
        return taken

    def state_dict(self) -> dict[str, Any]:
        return {"size": self.size, "seed": self._seed, "epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            DataError: it was taken of other data or with another seed, so that going on would repeat or skip rows.
        """
        for name, own in (("size", self.size), ("seed", self._seed)):
            if state[name] != own:
                raise DataError(
                    f"the checkpoint's sampler has {name} {state[name]}, but the data set and recipe give {own}: "
                    "resume with the same data and seed, or start the stage afresh"
                )
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._order_of(self._epoch)

    def _order_of(self, epoch: int) -> np.ndarray:
        # NumPy promises the bits of PCG64 for ever, but not what permutation() makes of them.
        bits = np.random.PCG64(np.random.SeedSequence([self._seed, self._stream, epoch])).random_raw(self.size)
        return np.argsort(bits, kind="stable")


class CurriculumSampler(EpochSampler):
    """The rows that a curriculum chose, each exactly once an epoch: shuffled, or from the highest pass rate to the
    lowest, where rows of one pass rate are shuffled among themselves anew each epoch."""

    def __init__(self, chosen: ChosenRows, seed: int, stream: int = 0) -> None:
        self._chosen = chosen
        super().__init__(len(chosen), seed, stream)

    def next(self, n: int) -> list[int]:
        return [self._chosen.rows[place] for place in super().next(n)]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "rows": self._mark()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if state.get("rows") != self._mark():
            raise DataError(
                "the checkpoint's sampler drew other rows or in another order than the curriculum and the pass rates "
                "now give: resume with the same ones, or start the stage afresh"
            )

    def _mark(self) -> str:
        return hashlib.sha256(repr((self._chosen.rows, self._chosen.rates)).encode()).hexdigest()[:16]

    def _order_of(self, epoch: int) -> np.ndarray:
        shuffled = super()._order_of(epoch)
        if self._chosen.rates is None:
            return shuffled
        return shuffled[np.argsort(-np.array(self._chosen.rates)[shuffled], kind="stable")]


class MixedSampler:
    """Rows of several domains, in proportion to their sizes at every moment.

    Each draw goes to the domain that is furthest behind its share, so that a batch of any size holds each domain's
    share up to rounding, and all domains end an epoch together.

    Args:
        rows: of each domain the number of its rows, or those that a curriculum chose.
        seed: 0 or more.
    """

    def __init__(self, rows: Mapping[str, int | ChosenRows], seed: int) -> None:
        if not rows:
            raise DataError("cannot draw from no domains")
        self._samplers = {name: _sampler(rows[name], seed, zlib.crc32(name.encode())) for name in sorted(rows)}
        self._total = sum(sampler.size for sampler in self._samplers.values())

    def next(self, n: int) -> list[tuple[str, int]]:
        """The next n rows as (domain, index)."""
        return [self._next_one() for _ in range(n)]

    def state_dict(self) -> dict[str, Any]:
        return {name: sampler.state_dict() for name, sampler in self._samplers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; a DataError if it was taken of other domains, data or seed."""
        if state.keys() != self._samplers.keys():
            raise DataError(
                f"the checkpoint's sampler draws from {', '.join(sorted(state))}, the stage from "
                f"{', '.join(self._samplers)}: resume with the same domains, or start the stage afresh"
            )
        for name, sampler in self._samplers.items():
            sampler.load_state_dict(state[name])

    def _next_one(self) -> tuple[str, int]:
        samplers = self._samplers
        draws = 1 + sum(sampler.drawn for sampler in samplers.values())
        name = max(samplers, key=lambda name: draws * samplers[name].size - self._total * samplers[name].drawn)
        return name, samplers[name].next(1)[0]


def _sampler(rows: int | ChosenRows, seed: int, stream: int) -> EpochSampler:
    return EpochSampler(rows, seed, stream) if isinstance(rows, int) else CurriculumSampler(rows, seed, stream)
