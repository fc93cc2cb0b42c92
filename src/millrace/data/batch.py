"""A batch of sequences of unequal length, as flat tensors.

Legend: N tokens of all sequences together, B sequences.

Every stream is aligned with the tokens: entry t speaks about token t given the tokens before it in the same sequence.
The first token of a sequence is never predicted, so its log-prob is 0 and its weight must be 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    tokens: Tensor
    """int64 [N]"""
    lengths: Tensor
    """int64 [B], sums to N"""
    streams: Mapping[str, Tensor] = field(default_factory=dict)
    """float32 [N] each: `weight`, `advantage`, `rollout_logp`, `old_logp`, `reference_logp`, ..."""

    def __post_init__(self) -> None:
        n = self.tokens.numel()
        if int(self.lengths.sum()) != n:
            raise ValueError(f"lengths sum to {int(self.lengths.sum())}, but there are {n} tokens")
        for name, values in self.streams.items():
            if values.shape != (n,):
                raise ValueError(f"stream {name!r} has shape {tuple(values.shape)}, expected ({n},)")

    @classmethod
    def from_sequences(
        cls, tokens: Sequence[Sequence[int]], streams: Mapping[str, Sequence[Sequence[float]]] | None = None
    ) -> TokenBatch:
        """Lay sequences (and per-token streams of the same lengths) behind one another."""
        flat = torch.tensor([t for seq in tokens for t in seq], dtype=torch.int64)
        lengths = torch.tensor([len(seq) for seq in tokens], dtype=torch.int64)
        flat_streams = {
            name: torch.tensor([v for seq in values for v in seq], dtype=torch.float32)
            for name, values in (streams or {}).items()
        }
        return cls(flat, lengths, flat_streams)

    def __len__(self) -> int:
        return self.lengths.numel()

    @property
    def offsets(self) -> Tensor:
        """int64 [B + 1]: where each sequence starts, and the end."""
        return torch.cat([self.lengths.new_zeros(1), self.lengths.cumsum(0)])

    @property
    def segment_ids(self) -> Tensor:
        """int64 [N]: the sequence each token belongs to."""
        return torch.repeat_interleave(torch.arange(len(self), device=self.lengths.device), self.lengths)

    def positions(self, indices: Sequence[int]) -> Tensor:
        """int64: where the tokens of the given sequences stand, in the order given."""
        offsets = self.offsets.tolist()
        if not len(indices):
            return torch.empty(0, dtype=torch.int64)
        return torch.cat([torch.arange(offsets[i], offsets[i + 1]) for i in indices])

    def select(self, indices: Sequence[int]) -> TokenBatch:
        """The given sequences, in the order given."""
        where = self.positions(indices)
        return TokenBatch(
            self.tokens[where],
            self.lengths[torch.tensor(list(indices), dtype=torch.int64)],
            {name: values[where] for name, values in self.streams.items()},
        )

    def with_streams(self, **streams: Tensor) -> TokenBatch:
        return replace(self, streams={**self.streams, **streams})

    def sequences(self) -> Iterator[Tensor]:
        """The token ids of one sequence after the other."""
        return iter(self.tokens.split(self.lengths.tolist()))
