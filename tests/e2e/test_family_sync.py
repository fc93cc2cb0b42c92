"""A live engine of each family: started with weights A and given weights B, it computes what transformers does with B.

The engines take turns, and each one starts while the one before it is tested.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_policy import TransformersPolicy
from safetensors.torch import load_file, save_file
from tiny_checkpoints import FAMILIES, YARN, write_checkpoint

from millrace.config.schema import FleetConfig
from millrace.rollout.fleet import Fleet
from millrace.rollout.types import Request, SamplingParams
from millrace.rollout.weight_sync import SAMPLE_PERIOD, SyncMismatch, WeightSync, _sampler

ALONE = SimpleNamespace(rank=0, world=1)
NEVER = (319,)
"""A stop token that replaces the model's own and hardly ever comes."""
CONFIG = FleetConfig(
    max_model_len=512,
    max_num_seqs=16,
    kv_cache_bytes=64 << 20,
    bucket_bytes=256 << 10,
)


@dataclass(frozen=True)
class Model:
    checkpoint: dict[str, Any]
    left_out: dict[str, str]
    """Tensors that are worth forgetting, with the parameter that the engine must then miss."""
    tolerance: float = 1e-4
    """Largest |log p - log p of transformers in float32| of a token."""


# transformers alone clamps Mamba's time steps from below, to time_step_min; vLLM and Megatron-Core never do.
HYBRID: dict[str, Any] = dict(family="nemotron_h", time_step_min=0.0)
MODELS = {
    "llama": Model(
        dict(
            family="llama",
            rope_scaling=dict(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
        ),
        {"model.layers.1.mlp.up_proj.weight": "model.layers.1.mlp.gate_up_proj"},
    ),
    "qwen2": Model(dict(family="qwen2"), {"model.layers.1.self_attn.k_proj.bias": "model.layers.1.self_attn.qkv_proj"}),
    "mixtral": Model(
        dict(family="mixtral"),
        {"model.layers.1.block_sparse_moe.experts.3.w2.weight": "model.layers.1.block_sparse_moe.experts"},
    ),
    "gemma3": Model(
        dict(family="gemma3_text"),
        {"model.layers.2.post_feedforward_layernorm.weight": "model.layers.2.post_feedforward_layernorm.weight"},
    ),
    "deepseek_v3": Model(
        dict(family="deepseek_v3", rope_scaling=YARN),
        {
            "model.layers.1.mlp.gate.e_score_correction_bias": "model.layers.1.mlp.gate.e_score_correction_bias",
            "model.layers.2.mlp.experts.5.gate_proj.weight": "model.layers.2.mlp.experts",
        },
    ),
    # The widths that vLLM's kernel for latent attention has, which multiplies with matrices derived from kv_b_proj.
    "deepseek_v3 latent": Model(
        dict(family="deepseek_v3", kv_lora_rank=512, qk_rope_head_dim=64, num_hidden_layers=2),
        {"model.layers.1.self_attn.kv_b_proj.weight": "model.layers.1.self_attn.kv_b_proj.weight"},
    ),
    "nemotron_h": Model(
        dict(HYBRID, hybrid_override_pattern="ME*-MEM"),
        {
            "backbone.layers.4.mixer.A_log": "model.layers.4.mixer.A",
            "backbone.layers.0.mixer.conv1d.bias": "model.layers.0.mixer.conv1d.bias",
            "backbone.layers.5.mixer.experts.2.up_proj.weight": "model.layers.5.mixer.experts",
        },
    ),
    "nemotron_h in bfloat16": Model(
        dict(HYBRID, dtype="bfloat16"),
        {"backbone.layers.3.mixer.dt_bias": "model.layers.3.mixer.dt_bias"},
        tolerance=0.25,
    ),
}


@dataclass
class Stand:
    model: Model
    fleet: Fleet
    policy: TransformersPolicy
    checkpoints: list[Path]

    def push(self, version: int, policy: TransformersPolicy | None = None) -> Any:
        return WeightSync(policy or self.policy, self.fleet, self.fleet.config, ALONE).push(version)


@pytest.fixture(scope="module")
def stand_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Stand]]:
    root = tmp_path_factory.mktemp("families")
    started: dict[str, Stand] = {}

    def start(name: str) -> Stand:
        model = MODELS[name]
        paths = [write_checkpoint(path=root / f"{name} {seed}", seed=seed, **model.checkpoint) for seed in (1, 2)]
        dtype = model.checkpoint.get("dtype", "float32")
        config = dataclasses.replace(CONFIG, dtype=dtype, probe_tolerance=model.tolerance)
        fleet = Fleet(config, str(paths[0]), root / f"run {name}")
        fleet.start()
        return Stand(model, fleet, TransformersPolicy(paths[0]), paths)

    def stand_of(name: str) -> Stand:
        order = list(MODELS)
        for due in order[order.index(name) :][:2]:
            if due not in started:
                started[due] = start(due)
        started[name].fleet.wait_ready()
        return started[name]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # an engine computes and another one starts beside this process
    try:
        yield stand_of
    finally:
        torch.set_num_threads(threads)
        for stand in started.values():
            stand.fleet.close()


@pytest.fixture(scope="module", params=MODELS)
def stand(request: pytest.FixtureRequest, stand_of: Callable[[str], Stand]) -> Iterator[Stand]:
    stand = stand_of(request.param)
    yield stand
    stand.fleet.close()


def requests() -> list[Request]:
    """Greedy; prompts of 5 to 305 tokens, longer than any window and than several chunks of a scan."""
    sampling = SamplingParams(max_tokens=16, temperature=0.0, stop_token_ids=NEVER)
    return [
        Request(f"p{n}", tuple((7 * i * i + 3 * i + n) % 250 for i in range(5 + 100 * n)), sampling) for n in range(4)
    ]


def assert_computes_as_policy(stand: Stand) -> None:
    for group in stand.fleet.generate(requests()):
        rollout = group[0]
        if stand.fleet.config.dtype == "float32":
            assert stand.policy.is_greedy(rollout.prompt, rollout.answer)
        expected = stand.policy.sequence_logprobs(rollout.prompt + rollout.answer)[len(rollout.prompt) :]
        assert max(abs(a - b) for a, b in zip(rollout.rollout_logp, expected, strict=True)) <= stand.model.tolerance


def test_an_engine_given_other_weights_computes_what_transformers_does_with_them(stand: Stand) -> None:
    """And given back those it was started with, it computes bit for bit what it did when it was fresh."""
    probe = [requests()[3].prompt]
    stand.fleet.serve_checkpoint()
    fresh = stand.fleet.prompt_logprobs(probe)
    # At these versions the last norm is among the tensors that are compared; every engine keeps a norm as it came.
    last_norm = FAMILIES[stand.model.checkpoint["family"]].final_norm
    versions = [version for version in range(1, 2 * SAMPLE_PERIOD + 1) if _sampler(version, False)(last_norm)]
    for version, checkpoint in zip(versions, reversed(stand.checkpoints), strict=True):
        stand.policy.load(checkpoint)
        report = stand.push(version)
        assert report.probe_max <= stand.model.tolerance
        assert 0 < report.held <= report.fingerprints
        assert_computes_as_policy(stand)
    assert stand.fleet.prompt_logprobs(probe) == fresh


def test_a_tensor_that_is_left_out_is_missed_by_name_and_would_show(stand: Stand, tmp_path: Path) -> None:
    """Also that the engine is whole again after the next update, and what a stale tensor would do to the log-probs."""
    stand.policy.load(stand.checkpoints[1])
    tokens = requests()[1].prompt
    right = stand.policy.sequence_logprobs(tokens)
    for version, (tensor, parameter) in enumerate(stand.model.left_out.items(), start=20):
        stale = load_file(stand.checkpoints[1] / "model.safetensors")
        stale[tensor] = load_file(stand.checkpoints[0] / "model.safetensors")[tensor]
        (tmp_path / "config.json").write_bytes((stand.checkpoints[1] / "config.json").read_bytes())
        save_file(stale, tmp_path / "model.safetensors", metadata={"format": "pt"})
        wrong = TransformersPolicy(tmp_path).sequence_logprobs(tokens)
        assert max(abs(a - b) for a, b in zip(right, wrong, strict=True)) > 5 * stand.model.tolerance, tensor

        with pytest.raises(SyncMismatch, match=rf"got no values, or not all, for .*\b{re.escape(parameter)}\b"):
            stand.push(version, Forgetful(stand.checkpoints[1], tensor))
    stand.push(30)
    assert_computes_as_policy(stand)


class Forgetful(TransformersPolicy):
    """Leaves one tensor out."""

    def __init__(self, checkpoint: Path, tensor: str) -> None:
        super().__init__(checkpoint)
        self._tensor = tensor

    def hf_tensors(self, **kwargs):  # type: ignore[no-untyped-def]
        return (pair for pair in super().hf_tensors() if pair[0] != self._tensor)
