"""The facts of a model that decide how it is built, cut and converted, and what follows from them.

They are read from a Hugging Face config.json (see `hf_config`) with nothing but the standard library, so that `millrace
check` needs neither torch nor transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

VOCAB_ROWS_PER_RANK = 64
"""Padded vocabulary rows of one tensor-parallel rank are a multiple of this, which keeps the last matmul aligned."""

Activation = Literal["silu", "relu2", "gelu_tanh"]
"""`relu2` is the square of relu."""


@dataclass(frozen=True)
class LayerShape:
    """What one layer consists of: a mixer, a feed-forward part, or one behind the other."""

    mixer: Literal["attention", "mamba"] | None = "attention"
    ffn: Literal["dense", "experts"] | None = "dense"
    window: int | None = None
    """Tokens that its attention looks back on, itself included; None: all of them."""


@dataclass(frozen=True, kw_only=True)
class MambaShape:
    """Sizes of the Mamba-2 mixers; all of a model are alike."""

    heads: int
    head_dim: int
    groups: int
    """Heads of a group share B and C."""
    state: int
    conv_kernel: int
    chunk: int
    """Tokens of one chunk of the scan; it decides speed and rounding, not the result."""

    @property
    def inner(self) -> int:
        """Channels of the mixer."""
        return self.heads * self.head_dim

    @property
    def convolved(self) -> int:
        """Channels that go through the convolution: the mixer's, and B and C of every group."""
        return self.inner + 2 * self.groups * self.state


@dataclass(frozen=True, kw_only=True)
class LatentAttentionShape:
    """Sizes of multi-head latent attention (DeepSeek-V2, 2024)."""

    q_rank: int | None
    """Rank of the queries' projection; None: a full matrix."""
    kv_rank: int
    nope_dim: int
    """Channels of a query or key that are not rotated."""
    rope_dim: int
    v_dim: int


@dataclass(frozen=True, kw_only=True)
class LayerParameters:
    """Parameters of one layer."""

    cut: int
    """In matrices (and vectors) that are cut over the tensor-parallel ranks."""
    replicated: int
    """In those that every tensor-parallel rank holds whole."""
    expert: int = 0
    """Of one routed expert."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    family: str
    """A name in `millrace.converters.mapping.FAMILIES`."""
    layers: tuple[LayerShape, ...]
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    """Width of the dense feed-forward layers."""
    vocab_size: int
    tied_embeddings: bool
    norm_eps: float
    max_position_embeddings: int
    torch_dtype: str
    """Data type the checkpoint is stored in, as config.json names it."""
    activation: Activation = "silu"
    gated: bool = True
    """Whether feed-forward parts have a gate projection beside the up projection."""

    position: Literal["rope", "none"] = "rope"
    rope_theta: float = 1e4
    rope_scaling: dict[str, Any] | None = None
    """None for plain RoPE, else the parameters with their `rope_type`."""
    rope_local_theta: float | None = None
    """RoPE base of the layers with a window; None: as the others'."""

    qk_norm: bool = False
    attention_bias: bool = False
    """Whether the projections of queries, keys and values have biases."""
    attention_scale: float | None = None
    """Factor of the scores; None: 1 / sqrt(head_dim)."""
    latent_attention: LatentAttentionShape | None = None
    mamba: MambaShape | None = None

    num_experts: int = 0
    """0 for a dense model."""
    experts_per_token: int = 0
    moe_ffn_hidden_size: int = 0
    """Width of one expert."""
    shared_ffn_hidden_size: int = 0
    """Width of the expert that every token goes through; 0: there is none."""
    moe_latent_size: int = 0
    """Width of the space the routed experts work in; 0: the hidden size."""
    norm_topk_prob: bool = False
    """Whether the chosen experts' probabilities are scaled to sum to one."""
    router_score: Literal["softmax", "sigmoid"] = "softmax"
    router_bias: bool = False
    """Whether a bias, which is no parameter, is added to the scores for the choice of experts alone."""
    router_scale: float = 1.0
    """Factor of the chosen experts' probabilities."""
    expert_groups: int = 1
    groups_per_token: int = 1
    """Groups out of which a token's experts are chosen."""

    prediction_layers: int = 0
    """Layers for predicting several tokens ahead that the checkpoint may hold behind the others; they are not built."""

    embedding_scale: float = 1.0
    """Factor of the embeddings."""
    zero_centered_norms: bool = False
    """Whether norms multiply by 1 + weight."""
    sandwich_norms: bool = False
    """Whether attention and feed-forward parts have a norm behind them as well."""

    @classmethod
    def from_hf(cls, path: str | Path) -> ModelShape:
        """Read `path`, a checkpoint's folder or its config.json. Raises ConfigError naming every problem."""
        from millrace.config.hf_config import read_model_shape  # which builds on this module

        return read_model_shape(Path(path))

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def stage_layers(self, pp: int, pp_rank: int) -> range:
        """The layers of one of `pp` pipeline stages, as even as can be. Where the number does not divide, the stages in
        the middle hold one more, then the first: the last has the output layer besides, the first the embedding."""
        each, more = divmod(self.num_layers, pp)
        larger = [*range(1, pp - 1), 0][:more]
        first = each * pp_rank + sum(stage < pp_rank for stage in larger)
        return range(first, first + each + (pp_rank in larger))

    @property
    def has_dense_ffn(self) -> bool:
        return any(layer.ffn == "dense" for layer in self.layers)

    def padded_vocab_size(self, tp: int) -> int:
        """Smallest multiple of 64 * tp that holds the vocabulary."""
        rows = tp * VOCAB_ROWS_PER_RANK
        return -(-self.vocab_size // rows) * rows

    def layer_parameters(self, layer: int) -> LayerParameters:
        """Parameters of one layer, its norms included."""
        return self._parameters_by_kind[self.layers[layer]]

    @cached_property
    def _parameters_by_kind(self) -> dict[LayerShape, LayerParameters]:
        return {kind: self._parameters_of(kind) for kind in set(self.layers)}

    def _parameters_of(self, kind: LayerShape) -> LayerParameters:
        parts = [self._attention_parameters()] if kind.mixer == "attention" else []
        parts += [self._mamba_parameters()] if kind.mixer == "mamba" else []
        parts += [LayerParameters(cut=self._ffn_parameters(self.ffn_hidden_size), replicated=0)] * (kind.ffn == "dense")
        parts += [self._experts_parameters()] if kind.ffn == "experts" else []
        norms = len(parts) * self.hidden_size * (2 if self.sandwich_norms else 1)
        return LayerParameters(
            cut=sum(part.cut for part in parts),
            replicated=norms + sum(part.replicated for part in parts),
            expert=sum(part.expert for part in parts),
        )

    def _attention_parameters(self) -> LayerParameters:
        if (latent := self.latent_attention) is not None:
            return self._latent_attention_parameters(latent)
        outputs = self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
        cut = self.hidden_size * (outputs + self.head_dim * self.num_heads) + (outputs if self.attention_bias else 0)
        return LayerParameters(cut=cut, replicated=2 * self.head_dim if self.qk_norm else 0)

    def _latent_attention_parameters(self, latent: LatentAttentionShape) -> LayerParameters:
        queries = self.num_heads * (latent.nope_dim + latent.rope_dim)
        cut = self.num_heads * (latent.kv_rank * (latent.nope_dim + latent.v_dim) + latent.v_dim * self.hidden_size)
        replicated = self.hidden_size * (latent.kv_rank + latent.rope_dim) + latent.kv_rank
        if latent.q_rank is None:
            return LayerParameters(cut=cut + self.hidden_size * queries, replicated=replicated)
        replicated += self.hidden_size * latent.q_rank + latent.q_rank
        return LayerParameters(cut=cut + latent.q_rank * queries, replicated=replicated)

    def _mamba_parameters(self) -> LayerParameters:
        assert self.mamba is not None
        m = self.mamba
        projections = self.hidden_size * (m.inner + m.convolved + m.heads) + m.inner * self.hidden_size
        return LayerParameters(
            cut=projections + m.convolved * (m.conv_kernel + 1) + m.inner + 3 * m.heads, replicated=0
        )

    def _ffn_parameters(self, width: int, hidden: int | None = None) -> int:
        return (3 if self.gated else 2) * (hidden or self.hidden_size) * width

    def _experts_parameters(self) -> LayerParameters:
        latent = 2 * self.hidden_size * self.moe_latent_size
        return LayerParameters(
            cut=self._ffn_parameters(self.shared_ffn_hidden_size),
            replicated=self.hidden_size * self.num_experts + latent,
            expert=self._ffn_parameters(self.moe_ffn_hidden_size, self.moe_latent_size or None),
        )

    def parameter_count(self) -> int:
        """Parameters of the whole model; tied embeddings count once, vocabulary padding does not count."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self._count(embeddings, self.num_experts)

    def active_parameter_count(self) -> int:
        """Parameters that one token is multiplied with: its chosen experts', and of the vocabulary the output layer's
        (an embedding is looked up)."""
        return self._count(self.vocab_size * self.hidden_size, self.experts_per_token)

    def _count(self, embeddings: int, experts: int) -> int:
        layers = [self.layer_parameters(layer) for layer in range(self.num_layers)]
        return embeddings + self.hidden_size + sum(n.cut + n.replicated + experts * n.expert for n in layers)
