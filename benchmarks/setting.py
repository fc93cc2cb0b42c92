"""What the training benchmarks share: the model, the batch's lengths, the layout, the statistics of a race."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from millrace.config.model_shape import ModelShape
from millrace.config.schema import ModelConfig, OptimizerConfig, ParallelConfig

OPTIMIZER = OptimizerConfig(lr=1e-4, betas=(0.9, 0.95), clip_grad=1.0)


def qwen3_shape(layers: int, hidden: int, vocab: int) -> ModelShape:
    """A Qwen3-style dense model with heads of 64 channels, two query heads a key/value head, 3 x hidden wide."""
    config = {
        "model_type": "qwen3",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128,
        "head_dim": 64,
        "intermediate_size": 3 * hidden,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "attention_bias": False,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }
    return shape_of(config)


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """The model that a config.json describes."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        return ModelShape.from_hf(folder)


def model_config() -> ModelConfig:
    return ModelConfig(path="(random)", dtype="bfloat16" if torch.cuda.is_available() else "float32")


def parallel_config() -> ParallelConfig:
    """Tensor parallelism, with sequence parallelism, over all ranks that torchrun has started."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    return ParallelConfig(tp=ranks, sequence_parallel=ranks > 1)


def lognormal_lengths(count: int, median_tokens: float, sigma: float, longest: int, seed: int = 0) -> list[int]:
    """Lengths of `count` sequences, log-normal and cut off at `longest`."""
    normal = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    lengths = (median_tokens * (sigma * normal).exp()).round().long().clamp(2, longest)
    return lengths.tolist()


def race(runners: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of each runner in each round. They take turns, so that a noisy machine disturbs all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(warm_up + rounds):
        # Each round starts with another one: whoever runs after the same neighbour every time has warm or cold caches.
        names = list(runners)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            _barrier()
            start = time.perf_counter()
            runners[name]()
            _barrier()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], slow: str, fast: str) -> tuple[float, float, float]:
    """Median of the rounds' ratios slow / fast, and their lower and upper quartile."""
    ratios = sorted(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))
    return median(ratios), ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]


def say(line: str) -> None:
    """Write one line from rank 0."""
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def _barrier() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()
