"""Causal attention in plain torch, for padded batches and packed sequences, also those that ranks share.

Legend: T tokens of a micro-batch, S sequence length, L keys that a query may see, B batch, N heads, G key/value heads,
D head dimension, CP context-parallel ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from millrace.megatron.context import whole_sequences


class PackedAttention(MegatronModule):
    """Causal attention over torch's scaled_dot_product_attention, for padded batches and packed sequences.

    A packed micro-batch attends within each of its sequences only. Sequences of equal length go through one call, so
    the memory is linear in the number of tokens and many short sequences cost few calls. Under context parallelism the
    keys and values of all ranks come to each, which attends from its own chunks of the sequences.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale
        self.window: int | None = None
        """Tokens that a query sees, itself included; None: all before it."""
        self.cp_group = parallel_state.get_context_parallel_group() if pg_collection is None else pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **unused: Any,
    ) -> Tensor:
        """query [S, B, N, D], key and value [S, B, G, D] -> [S, B, N * D], or packed: [T / CP, N, D], [T / CP, G, D] ->
        [T / CP, N, D]."""
        if packed_seq_params is None:
            batch_first = (t.transpose(0, 1) for t in (query, key, value))
            return self._attend(*batch_first).transpose(0, 1).flatten(2)
        cp = self.cp_group.size()
        lengths = _segment_lengths(packed_seq_params, query.shape[0] * cp)
        if cp > 1:
            return self._attend_from_chunks(query, key, value, lengths)
        pieces = [t.split(lengths) for t in (query, key, value)]
        outputs = [query] * len(lengths)
        for members in _by_length(lengths):
            stacked = (torch.stack([piece[i] for i in members]) for piece in pieces)
            for i, output in zip(members, self._attend(*stacked).unbind(), strict=True):
                outputs[i] = output
        return torch.cat(outputs)

    def _attend_from_chunks(self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
        """The two chunks of each sequence that this rank holds attend to all that stands before them."""
        cp, rank = self.cp_group.size(), self.cp_group.rank()
        keys, values = (whole_sequences(t, lengths, self.cp_group).split(lengths) for t in (key, value))
        chunks = query.split([n // (2 * cp) for n in lengths for _ in range(2)])
        ends = [chunk * n // (2 * cp) for n in lengths for chunk in (rank + 1, 2 * cp - rank)]
        outputs = [query] * len(chunks)
        for members in _by_length(list(zip(ends, (chunk.shape[0] for chunk in chunks), strict=True))):
            seen = slice(ends[members[0]])
            stacked = (
                torch.stack([chunks[i] for i in members]),
                torch.stack([keys[i // 2][seen] for i in members]),
                torch.stack([values[i // 2][seen] for i in members]),
            )
            for i, output in zip(members, self._attend(*stacked).unbind(), strict=True):
                outputs[i] = output
        return torch.cat(outputs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, S, N, D], [B, L, G, D] twice -> [B, S, N, D]; the queries are the last S of the L tokens."""
        repeats = query.shape[2] // key.shape[2]
        if repeats > 1:  # the memory-linear CPU kernel takes equal head counts only
            key, value = (t.repeat_interleave(repeats, dim=2) for t in (key, value))
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        channels = value.shape[-1]
        if channels < key.shape[-1]:  # nor does it take values with fewer channels than the keys
            value = F.pad(value, (0, key.shape[-1] - channels))
        mask = self._mask(query.shape[2], key.shape[2], query.device)
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.scale
        )
        return output[..., :channels].transpose(1, 2)

    def _mask(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """bool [S, L]: what each query sees; None for all that stands before it in a square, which needs no mask."""
        if queries == keys and (self.window is None or self.window >= keys):
            return None
        at = torch.arange(keys, device=device)
        distance = at[keys - queries :, None] - at
        return (distance >= 0) & (distance < (self.window or keys))


def _segment_lengths(packed: PackedSeqParams, tokens: int) -> list[int]:
    bounds = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
    edges = bounds.tolist()
    if edges[-1] != tokens:
        raise ValueError(f"cu_seqlens ends at {edges[-1]}, but the packed micro-batch has {tokens} tokens")
    return [end - start for start, end in itertools.pairwise(edges)]


def _by_length(lengths: Sequence[Any]) -> list[list[int]]:
    """Indices of the sequences of each length."""
    groups: dict[Any, list[int]] = {}
    for i, length in enumerate(lengths):
        groups.setdefault(length, []).append(i)
    return list(groups.values())
