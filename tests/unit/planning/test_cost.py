from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from millrace.config.cluster import ClusterConfig, NodeConfig
from millrace.config.errors import ConfigError
from millrace.config.model_shape import ModelShape
from millrace.config.schema import FleetConfig
from millrace.planning.cost import Decoding
from millrace.planning.engines import cache_shape, engine_weight_bytes, sequences_that_fit
from millrace.planning.flops import forward_flops, train_flops
from millrace.planning.hardware import GPUS, gpu_of

DENSE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}
EXPERTS = DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 768,
}


def shape(tmp_path: Path, facts: dict[str, Any]) -> ModelShape:
    (tmp_path / "config.json").write_text(json.dumps(facts))
    return ModelShape.from_hf(tmp_path)


@pytest.mark.parametrize("facts", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_a_token_costs_two_operations_for_each_parameter_it_meets(tmp_path: Path, facts: dict[str, Any]) -> None:
    model = shape(tmp_path, facts)
    flops = forward_flops(model, 0)
    assert flops.attention == 0
    assert flops.total == pytest.approx(2 * model.active_parameter_count(), rel=1e-4)


def test_attention_grows_with_the_sequence_and_is_all_that_does(tmp_path: Path) -> None:
    model = shape(tmp_path, DENSE)
    short, long = forward_flops(model, 1000), forward_flops(model, 4000)
    assert long.attention == 4 * short.attention == 36 * 2 * 32 * 128 * 2 * 2000
    assert (long.dense, long.head) == (short.dense, short.head)


def test_training_costs_three_forward_passes_and_what_is_computed_again(tmp_path: Path) -> None:
    model = shape(tmp_path, DENSE)
    forward = forward_flops(model, 2000)
    assert train_flops(model, 2000, "none") == 3 * forward.total
    assert train_flops(model, 2000, "selective") == 3 * forward.total + forward.attention
    assert train_flops(model, 2000, "full") == 4 * forward.total - forward.head


def test_the_weights_of_an_engine_are_those_of_the_model(tmp_path: Path) -> None:
    model = shape(tmp_path, EXPERTS)
    whole = engine_weight_bytes(model, FleetConfig())
    assert whole == pytest.approx(2 * model.parameter_count(), rel=1e-3)
    assert 4 * engine_weight_bytes(model, FleetConfig(tensor_parallel=4)) == pytest.approx(whole, rel=0.01)


def test_the_cache_is_shared_by_ranks_until_each_has_one_head(tmp_path: Path) -> None:
    model = shape(tmp_path, DENSE)
    sizes = [cache_shape(model, FleetConfig(tensor_parallel=tp)).per_token for tp in (1, 2, 8, 16)]
    assert sizes == [36 * 2 * 8 * 128 * 2, 36 * 2 * 4 * 128 * 2, 36 * 2 * 128 * 2, 36 * 2 * 128 * 2]
    assert sequences_that_fit(10 * 1000 * sizes[0], cache_shape(model, FleetConfig()), 1000) == 10
    assert sequences_that_fit(999 * sizes[0], cache_shape(model, FleetConfig()), 1000) == 0


def test_decoding_is_bound_by_memory_and_reads_the_experts_that_are_chosen(tmp_path: Path) -> None:
    model, gpu = shape(tmp_path, EXPERTS), GPUS["h100"]
    decoding = Decoding.of(model, FleetConfig(), gpu, 1000)
    bandwidth = 0.6 * gpu.memory_bytes_s
    whole = engine_weight_bytes(model, FleetConfig())
    assert (decoding.seconds(256) - decoding.fixed_s) * bandwidth == pytest.approx(
        whole + 256 * decoding.cache, rel=1e-3
    )
    one = (decoding.seconds(1) - decoding.fixed_s) * bandwidth
    assert one == pytest.approx(decoding.weights + decoding.experts * 4 / 64 + decoding.cache)
    assert decoding.seconds(64) < 64 * decoding.seconds(1)


def test_speeds_are_told_for_gpus_that_are_known() -> None:
    def cluster(**node: Any) -> ClusterConfig:
        return ClusterConfig(name="c", nodes=1, node=NodeConfig(cores=8, memory_gib=100, **node))

    assert gpu_of(cluster(gpus=8, gpu="h200")) == GPUS["h200"]
    with pytest.raises(ConfigError, match=r"node\.gpu of c is 'rtx', whose speed is not known; name one of a100, h100"):
        gpu_of(cluster(gpus=8, gpu="rtx"))
    with pytest.raises(ConfigError, match="no GPUs: times are told from a measured run alone"):
        gpu_of(cluster(gpus=0))
