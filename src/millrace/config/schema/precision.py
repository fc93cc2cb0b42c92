"""FP8 in the trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Fp8Recipe = Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8"]
Fp8Format = Literal["e4m3", "hybrid"]


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    fp8: Fp8Recipe = "none"
    """How the linear layers' products are computed in FP8. none: in `model.dtype`, bfloat16 if not said otherwise;
    delayed: one scale a tensor, from the largest values of earlier steps; tensorwise: one scale a tensor, from its own
    largest value; blockwise: a scale for 1 x 128 inputs and gradients and for 128 x 128 weights; mxfp8: a scale for 32
    numbers. Embeddings, norms, attention, routers and the output layer stay in `model.dtype`. What checkpoints, exports
    and engines get was never rounded to FP8."""
    format: Fp8Format | None = None
    """e4m3 everywhere, or hybrid: e4m3 for inputs and weights, e5m2 for gradients. When absent hybrid with delayed and
    tensorwise, e4m3 with blockwise and mxfp8."""
    amax_history: int = 1024
    """delayed: over how many steps the largest values are remembered."""
    amax_algorithm: Literal["max", "most_recent"] = "max"
    """delayed: scale by the largest value remembered, or by the last step's."""
    margin: int = 0
    """delayed: scales leave this many powers of two of room above the largest value."""
    power_of_two_scales: bool = True
    """blockwise: round scales down to powers of two; false keeps them as float32."""
    parameters: bool = False
    """tensorwise, blockwise, mxfp8: keep the weights of linear layers on the GPU in FP8 alone, rather than in
    `model.dtype` with copies in FP8. Checkpoints, exports and engines get the optimizer's float32 master weights in
    `model.dtype`, gathered one at a time. Needs `trainer.distributed_optimizer`. Frozen models have no masters and stay
    in `model.dtype`. Tested with a stand-in for Transformer Engine's tensors on CPU ranks; it has not been run on a
    GPU."""
    first_layers_bf16: int = 0
    """Layers at the start of the model that stay in `model.dtype`; not with delayed."""
    last_layers_bf16: int = 0
    """Layers at its end that stay in `model.dtype`; not with delayed."""
    pad_experts: bool = False
    """Let the router fill up each expert's tokens to the multiple that FP8 products need, rather than copying them into
    padded tensors behind it."""
    emulate: bool = False
    """Emulate FP8 on CPU ranks: round the linear layers' inputs, weights and gradients to FP8 with the recipe's scales
    and multiply them in float32. Shows what a recipe does to loss and log-probs; it saves neither time nor memory."""

    @property
    def chosen_format(self) -> Fp8Format:
        return self.format or ("hybrid" if self.fp8 in ("delayed", "tensorwise") else "e4m3")

    @property
    def computes_fp8(self) -> bool:
        """Whether products are computed in FP8, rather than in the model's type or by the emulation."""
        return self.fp8 != "none" and not self.emulate
