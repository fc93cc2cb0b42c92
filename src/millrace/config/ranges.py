"""The range of every number in a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from millrace.config.schema import (
    AgentConfig,
    CheckpointConfig,
    CurriculumConfig,
    DomainConfig,
    EvaluationConfig,
    FleetConfig,
    GateConfig,
    JudgeConfig,
    KlConfig,
    LoraConfig,
    MismatchConfig,
    MopdStage,
    OffPolicyConfig,
    OptimizerConfig,
    ParallelConfig,
    PlacementConfig,
    PolicyLossConfig,
    PrecisionConfig,
    PythonToolConfig,
    Recipe,
    RlhfStage,
    RlStage,
    SamplingConfig,
    SamplingStage,
    SftStage,
    SweAgenticConfig,
    TrainerConfig,
    TurnsConfig,
)


@dataclass(frozen=True)
class Range:
    low: float = float("-inf")
    high: float = float("inf")
    above: bool = False
    """Whether low itself is outside."""
    below: bool = False
    """Whether high itself is outside."""

    def __contains__(self, value: float) -> bool:
        enough = value > self.low if self.above else value >= self.low
        return enough and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low = f"{'above' if self.above else 'at least'} {self.low:g}"
        return low if self.high == float("inf") else f"{low} and {'below' if self.below else 'at most'} {self.high:g}"


_COUNT, _FROM_ZERO, _POSITIVE = Range(1), Range(0), Range(0, above=True)
_SHARE = Range(0, 1, above=True)

RANGES: dict[type, dict[str, Range]] = {
    LoraConfig: {"rank": _COUNT, "alpha": _POSITIVE, "dropout": Range(0, 1, below=True)},
    PrecisionConfig: {
        "amax_history": _COUNT,
        **dict.fromkeys(("margin", "first_layers_bf16", "last_layers_bf16"), _FROM_ZERO),
    },
    ParallelConfig: dict.fromkeys(("tp", "pp", "cp", "dp", "ep", "etp"), _COUNT),
    OptimizerConfig: {
        **dict.fromkeys(("min_lr", "warmup_steps", "warmup_from", "weight_decay", "clip_grad"), _FROM_ZERO),
        "lr": _POSITIVE,
        "eps": _POSITIVE,
        "decay_steps": _COUNT,
        "betas": Range(0, 1, below=True),
    },
    TrainerConfig: {
        **dict.fromkeys(("max_tokens_per_micro_batch", "threads_per_rank", "logprob_chunk_tokens"), _COUNT),
        "collective_timeout_s": _POSITIVE,
    },
    CheckpointConfig: {"every": _FROM_ZERO, "keep": _COUNT},
    FleetConfig: {
        **dict.fromkeys(("tensor_parallel", "max_model_len", "max_num_seqs", "threads_per_engine"), _COUNT),
        **dict.fromkeys(("kv_cache_bytes", "bucket_bytes"), _COUNT),
        **dict.fromkeys(("engines", "max_restarts"), _FROM_ZERO),
        **dict.fromkeys(("start_timeout_s", "request_timeout_s", "heartbeat_s", "probe_tolerance"), _POSITIVE),
        "gpu_memory_utilization": _SHARE,
    },
    PlacementConfig: {"trainer_nodes": _COUNT, **dict.fromkeys(("server_nodes", "verifier_nodes"), _FROM_ZERO)},
    AgentConfig: {"port": Range(0, 65535), "concurrency": _COUNT},
    DomainConfig: {"verify_timeout_s": _POSITIVE},
    TurnsConfig: {
        **dict.fromkeys(("most", "turn_tokens"), _COUNT),
        **dict.fromkeys(("episode_s", "step_s", "open_s"), _POSITIVE),
    },
    SweAgenticConfig: {
        **dict.fromkeys(("at_once", "output_characters", "memory_mb", "processes", "file_mb"), _COUNT),
        **dict.fromkeys(("command_s", "tests_s"), _POSITIVE),
    },
    PythonToolConfig: {
        **dict.fromkeys(("calls", "output_characters"), _COUNT),
        **dict.fromkeys(("call_s", "all_calls_s"), _POSITIVE),
    },
    SamplingConfig: {"temperature": _FROM_ZERO, "top_p": _SHARE, "max_response_tokens": _COUNT},
    EvaluationConfig: {"every": _FROM_ZERO, "samples": _COUNT, "max_prompts": _COUNT},
    PolicyLossConfig: {"clip_low": _SHARE, "clip_high": _POSITIVE},
    OffPolicyConfig: {"low": _FROM_ZERO, "high": _POSITIVE},
    KlConfig: {"coefficient": _FROM_ZERO},
    MismatchConfig: {"stop_above": _POSITIVE, "mask_above": _POSITIVE},
    SftStage: {**dict.fromkeys(("steps", "global_batch"), _COUNT), "epochs": _POSITIVE, "max_length": Range(2)},
    SamplingStage: dict.fromkeys(
        ("steps", "prompts_per_step", "samples_per_prompt", "dynamic_sampling_max_rounds"), _COUNT
    ),
    RlStage: {"updates_per_batch": _COUNT},
    RlhfStage: {
        **dict.fromkeys(("think_length_weight", "answer_length_weight", "think_bonus", "answer_bonus"), _FROM_ZERO),
        "bonus_share": _SHARE,
    },
    MopdStage: {"top_k": _COUNT, "ratio_low": _FROM_ZERO, "ratio_high": _POSITIVE, "advantage_clip": _POSITIVE},
    CurriculumConfig: dict.fromkeys(("above", "below"), Range(0, 1)),
    GateConfig: {"max_drop": _FROM_ZERO},
    JudgeConfig: {
        **dict.fromkeys(("max_tokens", "concurrency"), _COUNT),
        **dict.fromkeys(("temperature", "retries"), _FROM_ZERO),
        "top_p": _SHARE,
        "timeout_s": _POSITIVE,
    },
    Recipe: {"seed": _FROM_ZERO},
}


def range_problems(recipe: Recipe) -> list[str]:
    """Every number of the recipe that is out of its range, one sentence each."""
    problems = list(_outside(recipe, ""))
    for stage in recipe.stages:
        if isinstance(stage, SamplingStage) and stage.sampling.temperature == 0:
            problems.append(
                f"stages.{stage.name}.sampling.temperature is 0, which draws the same answer for a whole group; "
                "use 1.0 or so"
            )
    return problems


def _outside(section: Any, path: str) -> Iterator[str]:
    ranges = {name: range_ for base in type(section).__mro__ for name, range_ in RANGES.get(base, {}).items()}
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), f"{path}{field.name}"
        if field.name in ranges:
            numbers = value if isinstance(value, tuple) else (value,)
            wrong = [n for n in numbers if n is not None and n not in ranges[field.name]]
            yield from (f"{key} is {n}; it must be {ranges[field.name]}" for n in wrong)
        elif dataclasses.is_dataclass(value):
            yield from _outside(value, f"{key}.")
        elif isinstance(value, dict):
            for name, item in value.items():
                if dataclasses.is_dataclass(item):
                    yield from _outside(item, f"{key}.{name}.")
        elif isinstance(value, tuple):
            for item in value:
                if dataclasses.is_dataclass(item):
                    yield from _outside(item, f"{key}.{getattr(item, 'name', '')}.")
