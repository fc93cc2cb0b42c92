"""The log-prob head of a policy: what the hidden states of a micro-batch say about its tokens.

Legend: T tokens of a micro-batch, TP tensor-parallel ranks, H hidden size, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from millrace.config.model_shape import ModelShape
from millrace.megatron.divergence import Divergence, TaughtTokens, taught_logprobs
from millrace.megatron.logprobs import token_logprobs, vocabulary_logits, whole_hidden
from millrace.megatron.microbatch import MicroBatch
from millrace.megatron.model import HiddenStateModel
from millrace.megatron.parameter_gather import ParameterGather
from millrace.megatron.topology import Topology


class PolicyHead:
    """Of a model whose last pipeline stage is on this rank; on other ranks it is not to be used.

    `hidden` is always the model's output: [T, H], or with sequence parallelism this rank's [T / TP, H]. The model never
    calls the head's module, so that nothing else would gather its weight: `gather` does, where updates leave it in
    parts. `chunk`: tokens whose logits exist at one time.
    """

    def __init__(
        self,
        module: HiddenStateModel,
        shape: ModelShape,
        topology: Topology,
        *,
        chunk: int,
        gather: ParameterGather | None,
    ) -> None:
        self._module = module
        self._topology = topology
        self._gather = gather
        self._sequence_parallel = module.config.sequence_parallel
        self._settings: dict[str, Any] = {
            "vocab_size": shape.vocab_size,
            "chunk": chunk,
            "group": topology.tp_group,
            "sequence_parallel": self._sequence_parallel,
        }

    @property
    def weight(self) -> Tensor:
        """This rank's rows [V / TP, H], whole."""
        weight = self._module.head_weight
        if self._gather is not None:
            self._gather.finish_of([weight])
        return weight

    def whole(self, hidden: Tensor) -> Tensor:
        """The hidden states of all tokens [T, H]."""
        return whole_hidden(hidden, self._topology.tp_group, self._sequence_parallel)

    def logprobs(
        self, micro_batch: MicroBatch, hidden: Tensor, rows: Tensor, *, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs (and entropies) of the tokens behind `rows`, aligned with the shown tokens [shown]; elsewhere 0.

        Under context parallelism each rank gives those of its own tokens, and all get all: a loss sees whole sequences.
        """
        rows, places = micro_batch.computed_here(rows)
        logp, entropies = token_logprobs(
            hidden,
            self.weight,
            micro_batch.tokens[rows + 1],
            rows=places,
            temperature=temperature,
            entropy=entropy,
            **self._settings,
        )
        aligned = partial(micro_batch.aligned, rows, group=self._topology.cp_group)
        return aligned(logp), (None if entropies is None else aligned(entropies))

    def taught(
        self, micro_batch: MicroBatch, hidden: Tensor, divergence: Divergence, *, temperature: float, entropy: bool
    ) -> TaughtTokens:
        """As `logprobs` of the trained tokens, and the divergence to the teachers where one speaks."""
        return taught_logprobs(
            hidden,
            self.weight,
            micro_batch,
            divergence,
            temperature=temperature,
            entropy=entropy,
            context=self._topology.cp_group,
            **self._settings,
        )

    def logits(self, micro_batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Places in the batch of the tokens that this rank computes, and their logits [tokens, V] in float32."""
        values = vocabulary_logits(
            hidden, self.weight, self._settings["vocab_size"], self._topology.tp_group, self._sequence_parallel
        )
        shown, places = micro_batch.computed_here(torch.arange(micro_batch.real, device=values.device))
        return micro_batch.positions.to(values.device)[shown], values[places].float()
