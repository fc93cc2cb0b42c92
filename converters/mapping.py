"""The one mapping between Hugging Face tensors and Megatron-Core parameters.

Import, export, weight sync and verification all go through `mapping_for`. A family is a table of lines (see
`families/`); a `Mapping` is that table written out for one model: an `Entry` for each Megatron parameter, under its
canonical name, with the names and shapes of its HF tensors and the rule that leads from one to the other.

Canonical names are Megatron-Core's own, with layers and experts numbered over the whole model:
`decoder.layers.7.self_attention.linear_qkv.weight`, `decoder.layers.7.mlp.experts.42.linear_fc1.weight`.
`canonical_name` translates what a rank's module calls a parameter, whichever layer spec built it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from millrace.converters.errors import ConversionError
from millrace.converters.rules import Column, Replicated, Row, Rule, Sections, Shape, Source, Vocabulary

FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "mixtral",
    "deepseek_v3",
    "gemma3_text",
    "nemotron_h",
)

Kind = Literal["column", "gqa", "sections", "row", "vocabulary", "replicated"]
"""How a line is cut: `gqa` is a column interleaved per key/value group, `sections` a column in several blocks of rows,
each of them cut by itself."""

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"


class LayerFacts(Protocol):
    """What a mapping must know about a layer; `LayerShape` has it."""

    @property
    def mixer(self) -> str | None: ...

    @property
    def ffn(self) -> str | None: ...


class ModelFacts(Protocol):
    """What a mapping must know about a model; `ModelShape` has it. A family's own sizes may be asked for besides."""

    family: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    tied_embeddings: bool
    qk_norm: bool
    attention_bias: bool
    num_experts: int
    moe_ffn_hidden_size: int
    shared_ffn_hidden_size: int
    moe_latent_size: int
    mamba: Any
    """`MambaShape` or None"""
    latent_attention: Any
    """`LatentAttentionShape` or None"""
    prediction_layers: int

    @property
    def layers(self) -> Sequence[LayerFacts]: ...

    @property
    def num_layers(self) -> int: ...

    def padded_vocab_size(self, tp: int) -> int: ...


@dataclass(frozen=True)
class Line:
    """One line of a family's table: a Megatron parameter and the HF tensors it is made of.

    `hf` gives each HF name its dimensions as words ("q hidden"), see `dimensions`; in a line of kind `sections` the
    first dimension names its blocks ("z+x hidden"). Names are relative to the layer, or to the expert, where the line
    stands in such a part of the table.
    """

    megatron: str
    kind: Kind
    hf: dict[str, str]
    dtype: torch.dtype | None = None
    """What it is stored in on both sides, whatever the model's data type is; None: that."""


@dataclass(frozen=True)
class Family:
    """The table of a model family."""

    model: tuple[Line, ...]
    """Parameters outside the layers."""
    layer: Callable[[ModelFacts, int], tuple[Line, ...]]
    """Parameters of layer n, relative to `decoder.layers.n.` and `hf_layer`."""
    hf_layer: str = "model.layers.{layer}."
    expert: tuple[Line, ...] = ()
    """Parameters of one expert, relative to `decoder.layers.n.mlp.experts.e.` and `hf_expert`."""
    hf_expert: str = "model.layers.{layer}.mlp.experts.{expert}."
    dimensions: Callable[[ModelFacts], dict[str, int]] = field(default=lambda facts: dimensions(facts))
    unread: Callable[[ModelFacts], tuple[str, ...]] = field(default=lambda facts: ())
    """How the names of HF tensors begin that a checkpoint may hold and that have no place in the model."""


def dimensions(facts: ModelFacts) -> dict[str, int]:
    """The words that stand for sizes in a family's table."""
    return {
        "vocab": facts.vocab_size,
        "hidden": facts.hidden_size,
        "head": facts.head_dim,
        "q": facts.num_heads * facts.head_dim,
        "kv": facts.num_kv_heads * facts.head_dim,
        "ffn": facts.ffn_hidden_size,
        "experts": facts.num_experts,
        "expert_ffn": facts.moe_ffn_hidden_size,
        "shared_ffn": facts.shared_ffn_hidden_size,
    }


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter of one model."""

    name: str
    """Canonical Megatron name."""
    hf: dict[str, Shape]
    """Names and shapes of its HF tensors, in the order in which the rule takes them."""
    rule: Rule
    layer: int | None = None
    expert: int | None = None
    """Number of the expert; such a parameter is cut over the expert-tensor-parallel ranks."""
    is_copy: bool = False
    """Filled at import and left out at export: the last pipeline stage's copy of a tied embedding."""
    dtype: torch.dtype | None = None
    """What it is stored in whatever the model's data type is; None: that."""

    def local_shape(self, tp: int) -> Shape:
        """Shape of one rank's shard."""
        with _naming(self.name):
            return self.rule.local_shape(list(self.hf.values()), tp)

    def to_megatron(self, sources: Sequence[Source], tp: int = 1, rank: int = 0) -> Tensor:
        """The shard of one rank, from the HF tensors (or lazy slices of them) in the order of `hf`.

        Raises ConversionError when a source has another shape than the model's configuration says.
        """
        for (name, shape), source in zip(self.hf.items(), sources, strict=True):
            if tuple(source.shape) != shape:
                raise ConversionError(
                    f"{name} has shape {list(source.shape)} in the checkpoint, but config.json asks for {list(shape)}"
                )
        with _naming(self.name):
            return self.rule.shard(sources, tp, rank)

    def to_hf(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        """The HF tensors from the shards of all ranks, in rank order. They may be views of the shards."""
        expected = self.local_shape(len(shards))
        for rank, shard in enumerate(shards):
            if tuple(shard.shape) != expected:
                raise ConversionError(
                    f"{self.name} has shape {list(shard.shape)} on rank {rank} of {len(shards)}, "
                    f"but config.json asks for {list(expected)}"
                )
        return dict(zip(self.hf, self.rule.merge(shards, list(self.hf.values())), strict=True))


class _naming:
    """Puts the parameter's name before the sentence of a ConversionError."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ConversionError):
            raise ConversionError(f"{self.name}: {error}") from error


@dataclass(frozen=True)
class Mapping:
    """All parameters of one model, in the order of the layers."""

    entries: tuple[Entry, ...]
    unread: tuple[str, ...] = ()
    """How the names of HF tensors begin that a checkpoint may hold and that have no place in the model."""
    _by_name: dict[str, Entry] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {entry.name: entry for entry in self.entries})

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> Entry:
        """The entry of a canonical Megatron name; ConversionError when there is none."""
        if name not in self._by_name:
            raise ConversionError(f"the model has a parameter {name}, for which its family's table has no line")
        return self._by_name[name]

    def hf_shapes(self) -> dict[str, Shape]:
        """Name and shape of every HF tensor of the model, in the order of export."""
        return {name: shape for entry in self.entries if not entry.is_copy for name, shape in entry.hf.items()}

    def check_names(self, names: Collection[str]) -> None:
        """Raise ConversionError when a checkpoint with these tensors lacks one, or holds one that has no place.

        A tied model may store its output layer besides; it is the embedding and is not read. Neither is what the
        family says has no place, see `unread_names`.
        """
        expected = self.hf_shapes()
        present = set(names)
        if missing := [name for name in expected if name not in present]:
            raise ConversionError(f"the checkpoint lacks {_some(missing)}, which config.json asks for")
        allowed = {"lm_head.weight"} if any(entry.is_copy for entry in self.entries) else set()
        if extra := sorted(present - set(expected) - allowed - set(self.unread_names(names))):
            raise ConversionError(f"the checkpoint holds {_some(extra)}, for which the model has no parameter")

    def unread_names(self, names: Collection[str]) -> list[str]:
        """Those of a checkpoint's tensors that are known and left out at import, so that no export holds them."""
        return [name for name in names if name.startswith(self.unread)]


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more tensors"


def mapping_for(facts: ModelFacts) -> Mapping:
    """The mapping of a model. Raises ConversionError for a family without a table."""
    if facts.family not in FAMILIES:
        raise ConversionError(f"model family {facts.family!r} is not known; known are {', '.join(FAMILIES)}")
    family: Family = import_module(f"millrace.converters.families.{facts.family}").FAMILY
    write_out = _Writer(facts, family.dimensions(facts))
    entries = [write_out(line) for line in family.model]
    if facts.tied_embeddings:
        entries = _tie(entries)
    for layer, kind in enumerate(facts.layers):
        hf_layer = family.hf_layer.format(layer=layer)
        here: dict[str, Any] = {"megatron_prefix": f"decoder.layers.{layer}.", "hf_prefix": hf_layer, "layer": layer}
        entries += [write_out(line, **here) for line in family.layer(facts, layer)]
        for expert in range(facts.num_experts if kind.ffn == "experts" else 0):
            here = {
                "megatron_prefix": f"decoder.layers.{layer}.mlp.experts.{expert}.",
                "hf_prefix": family.hf_expert.format(layer=layer, expert=expert),
                "layer": layer,
                "expert": expert,
            }
            entries += [write_out(line, **here) for line in family.expert]
    return Mapping(tuple(entries), family.unread(facts))


def _tie(entries: list[Entry]) -> list[Entry]:
    """The output layer as a copy of the embedding."""
    embedding = next(entry for entry in entries if entry.name == EMBEDDING)
    return [replace(entry, hf=embedding.hf, is_copy=True) if entry.name == OUTPUT else entry for entry in entries]


class _Writer:
    """Writes the lines of a table out for one model."""

    def __init__(self, facts: ModelFacts, sizes: dict[str, int]) -> None:
        self.facts = facts
        self.sizes = sizes
        self.rules: dict[Kind, Rule] = {
            "column": Column(),
            "gqa": Column(groups=facts.num_kv_heads),
            "row": Row(),
            "vocabulary": Vocabulary(facts.padded_vocab_size),
            "replicated": Replicated(),
        }

    def __call__(
        self,
        line: Line,
        megatron_prefix: str = "",
        hf_prefix: str = "",
        layer: int | None = None,
        expert: int | None = None,
    ) -> Entry:
        blocks = {name: [self._blocks(word) for word in words.split()] for name, words in line.hf.items()}
        hf = {hf_prefix + name: tuple(sum(sizes) for sizes in dims) for name, dims in blocks.items()}
        first = next(iter(blocks.values()))[0]
        rule = Sections(first) if line.kind == "sections" else self.rules[line.kind]
        return Entry(megatron_prefix + line.megatron, hf, rule, layer, expert, dtype=line.dtype)

    def _blocks(self, word: str) -> tuple[int, ...]:
        return tuple(int(part) if part.isdecimal() else self.sizes[part] for part in word.split("+"))


_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_LOCAL_EXPERT = re.compile(r"\.experts\.local_experts\.(\d+)\.")
_GROUPED_EXPERT = re.compile(r"\.experts\.(linear_fc[12])\.(weight|bias)(\d+)$")
_OTHER_NAMES = {
    ".self_attention.linear_qkv.layer_norm_weight": ".input_layernorm.weight",
    ".self_attention.linear_q_up_proj.layer_norm_weight": ".self_attention.q_layernorm.weight",
    ".self_attention.linear_kv_up_proj.layer_norm_weight": ".self_attention.kv_layernorm.weight",
    ".mlp.linear_fc1.layer_norm_weight": ".pre_mlp_layernorm.weight",
    ".mixer.in_proj.layer_norm_weight": ".norm.weight",
    ".mixer.conv1d_weight": ".mixer.conv1d.weight",
    ".mixer.conv1d_bias": ".mixer.conv1d.bias",
}


def canonical_name(name: str, layers: Sequence[int] | None = None, expert_offset: int = 0) -> str:
    """The canonical name of what a rank's module calls `name`.

    `layers[i]` is the number, over the whole model, of the rank's layer i (None: the rank holds all of them);
    `expert_offset` is the number of its first expert. Understood are the names of Megatron's local spec, of Transformer
    Engine's (norms fused into the next linear, experts numbered behind the weight), those that later versions of
    Megatron-Core have for a Mamba layer's convolution, and wrappers' `module.` prefixes.
    """
    name = re.sub(r"^(module\.)+", "", name)
    if layers is not None:
        name = _LAYER.sub(lambda match: f"decoder.layers.{layers[int(match[1])]}.", name)
    for other, canonical in _OTHER_NAMES.items():
        if name.endswith(other):
            return name.removesuffix(other) + canonical
    name = _LOCAL_EXPERT.sub(lambda match: f".experts.{int(match[1]) + expert_offset}.", name)
    return _GROUPED_EXPERT.sub(lambda match: f".experts.{int(match[3]) + expert_offset}.{match[1]}.{match[2]}", name)
