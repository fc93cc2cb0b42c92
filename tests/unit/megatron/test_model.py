from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import write_checkpoint

from millrace.config.model_shape import LatentAttentionShape, MambaShape, ModelShape
from millrace.config.schema import ParallelConfig
from millrace.megatron.model import check_context_parallelism, check_layout, rope_inverse_frequencies
from millrace.megatron.topology import LayoutError


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    return ModelShape.from_hf(write_checkpoint("qwen3_moe", tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    return ModelShape.from_hf(write_checkpoint("qwen3", tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize(
    ("layout", "sentence"),
    [
        ({"tp": 4, "sequence_parallel": True}, "parallel.tp is 4, which does not divide the model's 2 key/value heads"),
        ({"pp": 5}, "parallel.pp is 5, but the model has 4 layers"),
        ({"ep": 3, "dp": 3}, "parallel.ep is 3, which does not divide the model's 4 experts"),
        ({"tp": 2}, "set parallel.sequence_parallel=true"),
        ({"etp": 5}, "parallel.etp is 5, which does not divide the model's 64 columns of an expert"),
    ],
)
def test_a_layout_that_cannot_hold_the_model_is_refused(
    layout: dict[str, int], sentence: str, shape: ModelShape
) -> None:
    with pytest.raises(LayoutError, match=sentence):
        check_layout(shape, ParallelConfig(**layout))


def test_tensor_parallelism_must_divide_the_heads_and_groups_of_mamba_layers(tmp_path: Path) -> None:
    hybrid = ModelShape.from_hf(write_checkpoint("nemotron_h", tmp_path, num_key_value_heads=4))
    check_layout(hybrid, ParallelConfig(tp=2))
    with pytest.raises(LayoutError, match="tp is 4, which does not divide the model's 2 groups of a Mamba layer"):
        check_layout(hybrid, ParallelConfig(tp=4))


def test_latent_attention_under_tensor_parallelism_needs_sequence_parallelism(dense: ModelShape) -> None:
    latent = LatentAttentionShape(q_rank=None, kv_rank=16, nope_dim=16, rope_dim=16, v_dim=16)
    shape = replace(dense, latent_attention=latent)
    check_layout(shape, ParallelConfig(tp=2, sequence_parallel=True))
    with pytest.raises(LayoutError, match="latent attention, which needs sequence parallelism"):
        check_layout(shape, ParallelConfig(tp=2))


def test_expert_ranks_without_experts_are_refused(dense: ModelShape) -> None:
    with pytest.raises(LayoutError, match="the model has no experts"):
        check_layout(dense, ParallelConfig(dp=2, ep=2))


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ],
    ids=["plain", "linear", "llama3"],
)
def test_rope_frequencies_are_those_of_transformers(scaling: dict[str, float] | None, dense: ModelShape) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=1,
        head_dim=64,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5, **(scaling or {})},
    )
    found = rope_inverse_frequencies(replace(dense, head_dim=64, rope_theta=5e5, rope_scaling=scaling))
    torch.testing.assert_close(found, LlamaRotaryEmbedding(config).inv_freq, rtol=1e-6, atol=0)


def test_mamba_layers_share_sequences_through_transformer_engine_only(dense: ModelShape) -> None:
    mamba = MambaShape(heads=8, head_dim=16, groups=2, state=16, conv_kernel=4, chunk=32)
    cpu = torch.device("cpu")
    check_context_parallelism(dense, ParallelConfig(cp=2), cpu)
    check_context_parallelism(replace(dense, mamba=mamba), ParallelConfig(), cpu)
    with pytest.raises(LayoutError, match="Mamba layers through Transformer Engine only"):
        check_context_parallelism(replace(dense, mamba=mamba), ParallelConfig(cp=2), cpu)
