"""Live engines that multiply in FP8: one that was given weights computes what one that was started with them does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_policy import TransformersPolicy
from tiny_checkpoints import write_checkpoint

from millrace.config.schema import FleetConfig
from millrace.rollout.cpu_fp8 import fp8_problem
from millrace.rollout.fleet import Fleet
from millrace.rollout.server import engine_device
from millrace.rollout.types import Request, SamplingParams
from millrace.rollout.weight_sync import WeightSync

pytestmark = pytest.mark.skipif(
    engine_device() == "cpu" and fp8_problem() is not None, reason=f"no engine in FP8 can run here: {fp8_problem()}"
)
CONFIG = FleetConfig(
    quantization="fp8",
    max_model_len=256,
    max_num_seqs=8,
    kv_cache_bytes=64 << 20,
    bucket_bytes=256 << 10,
    probe_tolerance=2.0,
)
PROMPTS = [[(7 * n + 5 * i) % 300 for i in range(40)] for n in range(4)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("fp8")
    sizes = dict(hidden_size=256, intermediate_size=512, head_dim=64)
    return [write_checkpoint("qwen3", root / str(seed), seed=seed, dtype="bfloat16", **sizes) for seed in (1, 2)]


@pytest.fixture(scope="module")
def fleets(checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Fleet]]:
    root = tmp_path_factory.mktemp("runs")
    fleets = [Fleet(CONFIG, str(path), root / path.name) for path in checkpoints]
    try:
        for fleet in fleets:
            fleet.start()
        for fleet in fleets:
            fleet.wait_ready()
        yield fleets
    finally:
        for fleet in fleets:
            fleet.close()


def test_weights_are_quantised_at_the_sync_as_at_the_start(fleets: list[Fleet], checkpoints: list[Path]) -> None:
    swapped, fresh = fleets
    fresh.serve_checkpoint()
    sync = WeightSync(TransformersPolicy(checkpoints[1]), swapped, CONFIG, SimpleNamespace(rank=0, world=1))
    for version in range(3):  # again and again into layers that are quantised already
        report = sync.push(version)
        assert report.held > 0, "what stays in bfloat16 is still read back"
        assert swapped.prompt_logprobs(PROMPTS) == fresh.prompt_logprobs(PROMPTS)
    asked = [Request("a", tuple(PROMPTS[0]), SamplingParams(max_tokens=24, temperature=0.0))]
    assert swapped.generate(asked)[0][0].answer == fresh.generate(asked)[0][0].answer


def test_the_mismatch_is_that_of_fp8_and_no_more(fleets: list[Fleet], checkpoints: list[Path]) -> None:
    scores = torch.tensor(fleets[1].prompt_logprobs(PROMPTS))
    policy = TransformersPolicy(checkpoints[1])
    expected = torch.tensor([policy.sequence_logprobs(tuple(prompt)) for prompt in PROMPTS])
    mean = float((scores - expected).abs()[:, 1:].mean())
    # Logits of the tiny model spread widely, so that the roundings of E4M3 show: log-probs are -14 on average.
    assert 0.05 < mean < 1.0, mean
