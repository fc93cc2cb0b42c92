"""LoRA adapters as entries of the mapping, and as a folder in PEFT's format.

An adapter of one Megatron parameter is two parameters (Hu et al., 2021): `A` takes the input down to the rank and `B`
leads from there to the output, W + scaling * B A. Megatron fuses several Hugging Face modules into one linear (q, k and
v; gate and up), PEFT adapts each module by itself, and so does this: the modules' A lie one below the other, and the
rows of the fused B belong to one module each, in the order that the base parameter's own rule gives them. Names,
shapes, cuts and fusing all come from the base entry, so that a family's table is the only list of them.

The factors of `x.linear_qkv.weight` are the parameters `x.linear_qkv.lora.A` and `x.linear_qkv.lora.B`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from millrace.converters.errors import ConversionError
from millrace.converters.mapping import Entry, Mapping
from millrace.converters.rules import Replicated, Row, Shape, Source
from millrace.converters.safetensors_io import HFReader, write_hf

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ALL_LINEAR = "all-linear"
PEFT_PREFIX = "base_model.model."

_WEIGHT = ".weight"


@dataclass(frozen=True)
class Stacked:
    """Every rank holds the whole of several HF tensors, one below the other."""

    kind: str = "replicated"

    def local_shape(self, shapes: Sequence[Shape], tp: int) -> Shape:
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def shard(self, sources: Sequence[Source], tp: int, rank: int) -> Tensor:
        return torch.cat([source[:] for source in sources])

    def merge(self, shards: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        return list(shards[0].split([shape[0] for shape in shapes]))


@dataclass(frozen=True)
class AdapterEntry:
    """The adapter of one Megatron parameter."""

    base: Entry
    modules: tuple[str, ...]
    """Which of the base's HF modules have one, by their names in the checkpoint, in the base's order."""
    a: Entry
    b: Entry

    def row_owners(self, tp: int, rank: int) -> Tensor:
        """For each row of the base's shard the place in `modules` of the module it belongs to; -1 for a module without
        an adapter."""
        if self.base.rule.kind == "row":
            return torch.zeros(self.base.local_shape(tp)[0], dtype=torch.long)
        places = {module: place for place, module in enumerate(self.modules)}
        markers = [
            torch.full((shape[0], 1), places.get(name.removesuffix(_WEIGHT), -1), dtype=torch.long)
            for name, shape in self.base.hf.items()
        ]
        return self.base.rule.shard(markers, tp, rank)[:, 0]


def adapter_entries(mapping: Mapping, rank: int, targets: Collection[str]) -> dict[str, AdapterEntry]:
    """The adapters of a model by the names of their base parameters.

    `targets` are the last parts of HF module names (q_proj), or `all-linear`. Raises ConversionError for a target that
    the model does not have.
    """
    found = {entry.name: _adapter(entry, rank, targets) for entry in mapping if is_linear(entry)}
    entries = {name: adapter for name, adapter in found.items() if adapter is not None}
    known = {_last(module) for entry in mapping if is_linear(entry) for module in hf_modules(entry)}
    if unknown := sorted(set(targets) - known - {ALL_LINEAR}):
        raise ConversionError(f"the model has no linear layer {unknown[0]}; it has {', '.join(sorted(known))}")
    return entries


def is_linear(entry: Entry) -> bool:
    """Whether the entry is the weight of a linear that is cut over tensor-parallel ranks: what can have an adapter."""
    matrices = all(len(shape) == 2 for shape in entry.hf.values())
    return entry.rule.kind in ("column", "sections", "row") and entry.name.endswith(_WEIGHT) and matrices


def hf_modules(entry: Entry) -> list[str]:
    return [name.removesuffix(_WEIGHT) for name in entry.hf]


def _last(module: str) -> str:
    return module.rsplit(".", 1)[-1]


def _adapter(base: Entry, rank: int, targets: Collection[str]) -> AdapterEntry | None:
    chosen = {
        name.removesuffix(_WEIGHT): shape
        for name, shape in base.hf.items()
        if ALL_LINEAR in targets or _last(name.removesuffix(_WEIGHT)) in targets
    }
    if not chosen:
        return None
    stem = base.name.removesuffix(_WEIGHT) + ".lora."
    into = {f"{PEFT_PREFIX}{module}.lora_A.weight": (rank, shape[1]) for module, shape in chosen.items()}
    out = {f"{PEFT_PREFIX}{module}.lora_B.weight": (shape[0], rank) for module, shape in chosen.items()}
    row = base.rule.kind == "row"
    a = Entry(stem + "A", into, Row() if row else Stacked(), base.layer, base.expert)
    b = Entry(stem + "B", out, Replicated() if row else base.rule, base.layer, base.expert)
    return AdapterEntry(base, tuple(chosen), a, b)


def scaling(rank: int, alpha: float, *, rank_stabilised: bool) -> float:
    """What B A is multiplied by: alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023)."""
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)


@dataclass(frozen=True)
class AdapterSettings:
    """What PEFT's adapter_config.json says of an adapter that can be expressed here."""

    rank: int
    alpha: float
    rank_stabilised: bool
    targets: tuple[str, ...]
    """Last parts of module names, or `all-linear`."""
    dropout: float = 0.0


def write_adapter_config(
    folder: Path, settings: AdapterSettings, base: str | Path, entries: Iterable[AdapterEntry]
) -> None:
    """Write adapter_config.json; the targets are written out as the names of the modules that have an adapter."""
    alpha = int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": settings.rank,
        "lora_alpha": alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rank_stabilised,
        "target_modules": sorted({_last(module) for entry in entries for module in entry.modules}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


_NOT_EXPRESSED = (
    "use_dora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layer_replication",
    "target_parameters",
    "exclude_modules",
    "trainable_token_indices",
    "lora_bias",
    "fan_in_fan_out",
)
"""PEFT's options with which an adapter is not what its two factors say."""


def read_adapter_config(folder: str | Path) -> AdapterSettings:
    """The settings of an adapter in PEFT's format. Raises ConversionError, in one sentence, for anything that is not
    plain LoRA of linear layers."""
    file = Path(folder) / ADAPTER_CONFIG
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(
            f"{file} does not exist: an adapter is a folder with {ADAPTER_CONFIG} and {ADAPTER_FILE}"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConversionError(f"{file} cannot be read: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ConversionError(f"{file}: only adapters of peft_type LORA can be read")
    for option in _NOT_EXPRESSED:
        if config.get(option):
            raise ConversionError(f"{file}: {option} is {config[option]!r}, which plain LoRA cannot express")
    if config.get("bias", "none") != "none":
        raise ConversionError(f"{file}: bias is {config['bias']!r}; only adapters without biases can be read")
    modules = config.get("target_modules")
    named = [modules] if isinstance(modules, str) else modules
    if not named or not all(isinstance(name, str) for name in named):
        raise ConversionError(f"{file}: target_modules must name modules, not {modules!r}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
        raise ConversionError(f"{file}: r and lora_alpha must be numbers, not {rank!r} and {alpha!r}")
    targets = tuple(dict.fromkeys(_last(name) for name in named))
    dropout = float(config.get("lora_dropout") or 0.0)
    return AdapterSettings(rank, float(alpha), bool(config.get("use_rslora")), targets, dropout)


def check_adapter_names(names: Collection[str], entries: Iterable[AdapterEntry], file: Path) -> None:
    """Raise ConversionError when an adapter's file lacks a factor, or holds one that has no place."""
    expected = {name for entry in entries for name in (*entry.a.hf, *entry.b.hf)}
    if missing := sorted(expected - set(names)):
        raise ConversionError(f"{file} lacks {missing[0]}, which the targets ask for ({len(missing)} in all)")
    if extra := sorted(set(names) - expected):
        raise ConversionError(f"{file} holds {extra[0]}, for which the model has no adapter ({len(extra)} in all)")


def merge_adapter(
    hf: str | Path, adapter: str | Path, out: str | Path, *, max_shard_bytes: int = 2 << 30, overwrite: bool = False
) -> Path:
    """Write the checkpoint `hf` with a PEFT adapter merged into it to `out`, one tensor at a time.

    Products are taken in float32 at least, and each weight is rounded once to its own type. Raises ConversionError for
    an adapter that is not plain LoRA, or whose factors do not fit the checkpoint.
    """
    settings = read_adapter_config(adapter)
    factor = scaling(settings.rank, settings.alpha, rank_stabilised=settings.rank_stabilised)
    base, factors = HFReader(hf), HFReader(Path(adapter) / ADAPTER_FILE)
    left = set(factors.names)

    def merged() -> Iterator[tuple[str, Tensor]]:
        for name in base.names:
            a, b = (f"{PEFT_PREFIX}{name.removesuffix(_WEIGHT)}.lora_{x}.weight" for x in "AB")
            weight = base.tensor(name)
            if a in factors and b in factors:
                weight = _with_adapter(name, weight, factors.tensor(a), factors.tensor(b), factor)
                left.difference_update((a, b))
            yield name, weight
        if left:
            raise ConversionError(f"{adapter} holds {min(left)}, for which {hf} has no weight, or not both factors")

    return write_hf(out, merged(), source=hf, max_shard_bytes=max_shard_bytes, overwrite=overwrite)


def _with_adapter(name: str, weight: Tensor, a: Tensor, b: Tensor, factor: float) -> Tensor:
    if (b.shape[0], a.shape[-1]) != tuple(weight.shape) or b.shape[-1] != a.shape[0]:
        raise ConversionError(
            f"{name} has shape {list(weight.shape)}, which an adapter of shapes {list(b.shape)} and {list(a.shape)} "
            "does not fit"
        )
    dtype = torch.promote_types(a.dtype, torch.float32)
    return (weight.to(dtype) + (b.to(dtype) @ a.to(dtype)) * factor).to(weight.dtype)
