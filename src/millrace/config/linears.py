"""The linear layers of a model that a LoRA adapter can stand on, counted without torch.

What is trained goes by the converters' mapping, which knows names and shapes of every tensor; here are only the few
sizes that `millrace check` and `millrace plan` need. A test holds the two together for every family.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from millrace.config.model_shape import ModelShape

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Linear:
    name: str
    """Last part of its Hugging Face name."""
    inputs: int
    outputs: int
    row: bool = False
    """Whether tensor-parallel ranks cut its inputs; else its outputs."""
    expert: bool = False
    """Whether every routed expert of the layer has one."""

    def adapter_parameters(self, rank: int, ranks: int) -> int:
        """Of an adapter's two factors, on one of `ranks` tensor-parallel ranks; one factor is cut, each rank holds the
        other."""
        cut, whole = (self.inputs, self.outputs) if self.row else (self.outputs, self.inputs)
        return rank * (cut // ranks + whole)


def linears(shape: ModelShape, layer: int) -> tuple[Linear, ...]:
    """The linears of one layer that are cut over tensor-parallel ranks."""
    kind = shape.layers[layer]
    found: list[Linear] = []
    if kind.mixer == "attention":
        found += _attention(shape)
    if kind.mixer == "mamba":
        found += _mamba(shape)
    if kind.ffn == "dense":
        found += _feed_forward(shape, shape.hidden_size, shape.ffn_hidden_size)
    if kind.ffn == "experts":
        found += _feed_forward(shape, shape.moe_latent_size or shape.hidden_size, shape.moe_ffn_hidden_size, True)
        if shape.shared_ffn_hidden_size:
            found += _feed_forward(shape, shape.hidden_size, shape.shared_ffn_hidden_size)
    return tuple(found)


def _attention(shape: ModelShape) -> Iterator[Linear]:
    hidden, heads = shape.hidden_size, shape.num_heads
    if (latent := shape.latent_attention) is not None:
        queries = heads * (latent.nope_dim + latent.rope_dim)
        if latent.q_rank is None:
            yield Linear("q_proj", hidden, queries)
        else:
            yield Linear("q_b_proj", latent.q_rank, queries)
        yield Linear("kv_b_proj", latent.kv_rank, heads * (latent.nope_dim + latent.v_dim))
        yield Linear("o_proj", heads * latent.v_dim, hidden, row=True)
        return
    yield Linear("q_proj", hidden, heads * shape.head_dim)
    yield Linear("k_proj", hidden, shape.num_kv_heads * shape.head_dim)
    yield Linear("v_proj", hidden, shape.num_kv_heads * shape.head_dim)
    yield Linear("o_proj", heads * shape.head_dim, hidden, row=True)


def _mamba(shape: ModelShape) -> Iterator[Linear]:
    assert shape.mamba is not None
    yield Linear("in_proj", shape.hidden_size, shape.mamba.inner + shape.mamba.convolved + shape.mamba.heads)
    yield Linear("out_proj", shape.mamba.inner, shape.hidden_size, row=True)


_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def _feed_forward(shape: ModelShape, hidden: int, width: int, expert: bool = False) -> Iterator[Linear]:
    names = _MIXTRAL if shape.family == "mixtral" else {}
    for name in ("gate_proj", "up_proj") if shape.gated else ("up_proj",):
        yield Linear(names.get(name, name), hidden, width, expert=expert)
    yield Linear(names.get("down_proj", "down_proj"), width, hidden, row=True, expert=expert)


def adapted(shape: ModelShape, layer: int, targets: Sequence[str]) -> list[Linear]:
    """The linears of a layer that `model.lora.targets` names."""
    return [linear for linear in linears(shape, layer) if ALL_LINEAR in targets or linear.name in targets]


def linear_names(shape: ModelShape) -> list[str]:
    """The targets that a model has, in the order of its layers."""
    return list(dict.fromkeys(linear.name for n in range(shape.num_layers) for linear in linears(shape, n)))
