"""The changes that would help most where memory is short, found by trying them.

Each is written as overrides that can be pasted behind the recipe's name, and is judged by the bytes that it saves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from millrace.config.cluster import ClusterConfig
from millrace.config.model_shape import ModelShape
from millrace.config.rules import layout_of_recipe
from millrace.config.schema import FleetConfig, MopdStage, Recipe, SamplingStage, SftStage
from millrace.planning.memory import MemoryModel, Shortage, program_limits

Overrides = dict[str, Any]
"""Key of a recipe -> value."""


@dataclass(frozen=True, kw_only=True)
class Change:
    overrides: Overrides
    saves: int
    """Bytes, of a GPU or of a node."""

    def __str__(self) -> str:
        return written(self.overrides)


def written(overrides: Mapping[str, Any]) -> str:
    """Overrides as they are typed behind a recipe."""
    return " ".join(f"{key}={_value(value)}" for key, value in overrides.items())


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def changed(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """The recipe with these values; a stage is addressed by its name."""
    for key, value in overrides.items():
        recipe = _with(recipe, key.split("."), value)
    return recipe


def _with(section: Any, path: list[str], value: Any) -> Any:
    first, rest = path[0], path[1:]
    if is_dataclass(section) and not isinstance(section, type):
        assert first in {field.name for field in fields(section)}, first
        return replace(section, **{first: _with(getattr(section, first), rest, value) if rest else value})
    if isinstance(section, tuple):  # of stages
        return tuple(_with(stage, rest, value) if stage.name == first else stage for stage in section)
    return {**section, first: _with(section[first], rest, value)}


def helpful_changes(
    recipe: Recipe, cluster: ClusterConfig, shape: ModelShape, shortage: Shortage, most: int = 3
) -> list[Change]:
    """The changes that save the most bytes of what is short, the best first."""
    before = _needed(MemoryModel(recipe, cluster, shape), shortage.role)
    found = []
    for overrides in candidates(recipe, shape, shortage.role, on_cpu=not cluster.node.gpus):
        other = changed(recipe, overrides)
        if layout_of_recipe(other, shape):
            continue
        saved = before - _needed(MemoryModel(other, cluster, shape), shortage.role)
        if saved > 0:
            found.append(Change(overrides=overrides, saves=saved))
    return sorted(found, key=lambda change: -change.saves)[:most]


def _needed(model: MemoryModel, role: str) -> int:
    """Bytes that one rank of a role needs; of a node, all that its kinds of ranks need."""
    if role.startswith("trainer"):
        return max(one.device_bytes for one in model.trainer)
    if role == "verifier":
        assert model.verifier is not None
        return model.verifier.host_bytes * model.cluster.node.cores
    if role.startswith("node"):
        roles = [*model.trainer, *model.servers()]
        return sum((one.host_bytes + one.device_bytes * model.on_cpu) * one.ranks for one in roles)
    return next(model.shortfall_of_cache(one) for one in model.servers() if one.name == role)


def candidates(recipe: Recipe, shape: ModelShape, role: str, *, on_cpu: bool) -> Iterator[Overrides]:
    """Changes that may save memory of a role; some do not fit the model or the cluster."""
    if role.startswith("trainer"):
        yield from _of_trainer(recipe, shape)
    elif role.startswith("node"):
        yield from _of_trainer(recipe, shape)
        yield from _of_hosts(recipe)
        for key, fleet in _fleets(recipe).items():
            yield from _of_engine(key, fleet, on_cpu=on_cpu)
    elif role == "verifier":
        yield from _of_programs(recipe)
    else:
        yield from _of_engine(_key_of(recipe, role), _fleets(recipe)[_key_of(recipe, role)], on_cpu=on_cpu)


def _of_trainer(recipe: Recipe, shape: ModelShape) -> Iterator[Overrides]:
    p, trainer = recipe.parallel, recipe.trainer
    for recompute in ("selective", "full"):
        if trainer.recompute not in (recompute, "full"):
            yield {"trainer.recompute": recompute}
    if not trainer.distributed_optimizer and p.dp * p.cp > 1:
        yield {"trainer.distributed_optimizer": True}
    half = trainer.max_tokens_per_micro_batch // 2
    lengths = _longest(recipe)
    if lengths and max(lengths.values()) > half:
        # A micro-batch holds at least one sequence, so the longest ones get shorter as well.
        yield {"trainer.max_tokens_per_micro_batch": half, **{key: half for key, n in lengths.items() if n > half}}
    else:
        yield {"trainer.max_tokens_per_micro_batch": half}
    if p.tp > 1 and not p.sequence_parallel:
        yield {"parallel.sequence_parallel": True}
    for axis in ("tp", "cp", "pp"):
        more: Overrides = {f"parallel.{axis}": 2 * getattr(p, axis)}
        if axis == "tp":
            more["parallel.sequence_parallel"] = True
        yield more if p.dp % 2 else {**more, "parallel.dp": p.dp // 2}
    if shape.num_experts:
        yield {"parallel.ep": 2 * p.ep}
    if trainer.logprob_chunk_tokens > 256:
        yield {"trainer.logprob_chunk_tokens": 256}
    for stage in recipe.stages:
        if isinstance(stage, MopdStage) and stage.placement == "resident":
            yield {f"stages.{stage.name}.placement": "time_shared"}


def _of_hosts(recipe: Recipe) -> Iterator[Overrides]:
    for stage in recipe.stages:
        if isinstance(stage, MopdStage) and stage.placement == "time_shared":
            yield {f"stages.{stage.name}.placement": "served"}
    if recipe.fleet.bucket_bytes > 2**26:
        yield {"fleet.bucket_bytes": 2**26}


def _of_programs(recipe: Recipe) -> Iterator[Overrides]:
    """Half of what the largest programs, or their compilers, may take."""
    limits = program_limits(recipe)
    half = max(limits.values()) // 2
    yield {key: half for key, limit in limits.items() if limit > half}


def _of_engine(key: str, fleet: FleetConfig, *, on_cpu: bool) -> Iterator[Overrides]:
    yield {f"{key}.tensor_parallel": 2 * fleet.tensor_parallel}
    yield {f"{key}.max_model_len": fleet.max_model_len // 2}
    if fleet.dtype == "float32":
        yield {f"{key}.dtype": "bfloat16"}
    if on_cpu:
        yield {f"{key}.kv_cache_bytes": fleet.kv_cache_bytes // 2}
        yield {f"{key}.kv_cache_bytes": fleet.kv_cache_bytes * 2}
    elif fleet.gpu_memory_utilization < 0.92:
        yield {f"{key}.gpu_memory_utilization": 0.92}


def _longest(recipe: Recipe) -> dict[str, int]:
    """The keys that say how long sequences of training are."""
    lengths = {f"stages.{s.name}.max_length": s.max_length for s in recipe.stages if isinstance(s, SftStage)}
    if any(isinstance(stage, SamplingStage) for stage in recipe.stages):
        lengths["fleet.max_model_len"] = recipe.fleet.max_model_len
    return lengths


def _fleets(recipe: Recipe) -> dict[str, FleetConfig]:
    fleets = {"fleet": recipe.fleet} if recipe.samples else {}
    fleets |= {f"judges.{name}.engine": judge.engine for name, judge in recipe.judges_used.items() if judge.model}
    return fleets | {
        f"stages.{stage.name}.teacher_engine": stage.teacher_engine
        for stage in recipe.stages
        if isinstance(stage, MopdStage) and stage.placement == "served"
    }


def _key_of(recipe: Recipe, role: str) -> str:
    if role.startswith("judge-"):
        return f"judges.{role.removeprefix('judge-')}.engine"
    return "fleet" if role == "engine" else next(key for key in _fleets(recipe) if key.endswith("teacher_engine"))
