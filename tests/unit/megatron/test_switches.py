"""What the trainer's switches mean to Megatron-Core, and to the environment of a rank."""

import pytest
import torch
from tiny_checkpoints import write_checkpoint

from millrace.config.model_shape import ModelShape
from millrace.config.schema import OptimizerConfig, ParallelConfig, TrainerConfig
from millrace.launch.local import trainer_environment
from millrace.megatron.data_parallel import data_parallel_settings
from millrace.megatron.model import check_dispatcher, check_recomputation
from millrace.megatron.model_config import transformer_config
from millrace.megatron.optimizer import optimizer_settings
from millrace.megatron.topology import LayoutError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    return ModelShape.from_hf(write_checkpoint("qwen3_moe", tmp_path_factory.mktemp("experts")))


@pytest.mark.parametrize(
    ("switches", "fields"),
    [
        (
            {},
            {
                "recompute_granularity": None,
                "moe_token_dispatcher_type": "alltoall",
                "moe_permute_fusion": False,
                "deterministic_mode": False,
            },
        ),
        ({"recompute": "selective"}, {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}),
        (
            {"recompute": "full"},
            {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        ),
        (
            {"recompute": "selective", "recompute_modules": ("layernorm", "moe")},
            {"recompute_granularity": "selective", "recompute_modules": ["layernorm", "moe"]},
        ),
        (
            {"recompute": "full", "recompute_method": "block", "recompute_layers": 2},
            {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
        ),
        (
            {"token_dispatcher": "deepep"},
            {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"},
        ),
        ({"deterministic": True}, {"deterministic_mode": True}),
        # Fused permutation is Transformer Engine's, so without it the plain one is taken.
        ({"permute_fusion": True}, {"moe_permute_fusion": False, "moe_grouped_gemm": False}),
    ],
    ids=["none", "selective", "full", "modules", "block", "deepep", "deterministic", "permute"],
)
def test_switches_of_the_model(switches: dict[str, object], fields: dict[str, object], experts: ModelShape) -> None:
    config = transformer_config(experts, ParallelConfig(), TrainerConfig(**switches), torch.float32, CPU)
    assert {name: getattr(config, name) for name in fields} == fields


def test_permute_fusion_and_grouped_products_come_with_transformer_engine(experts: ModelShape) -> None:
    from millrace.megatron import model_config

    options = [model_config._expert_options(experts, True, asked) for asked in (False, True)]
    assert [option["moe_permute_fusion"] for option in options] == [False, True]
    assert all(option["moe_grouped_gemm"] for option in options)
    assert not model_config._expert_options(experts, False, False)["moe_grouped_gemm"]


@pytest.mark.parametrize("overlap", [False, True])
def test_overlapped_gradient_reduction_is_a_field_of_data_parallelism(overlap: bool) -> None:
    settings = data_parallel_settings(TrainerConfig(overlap_gradient_reduction=overlap, distributed_optimizer=True))
    assert settings.overlap_grad_reduce is overlap and settings.use_distributed_optimizer
    assert settings.grad_reduce_in_fp32 and not settings.overlap_param_gather


@pytest.mark.parametrize("overlap", [False, True])
def test_data_parallelism_and_the_optimizer_agree_on_who_gathers_parameters(overlap: bool) -> None:
    trainer = TrainerConfig(
        distributed_optimizer=True, overlap_gradient_reduction=True, overlap_parameter_gather=overlap
    )
    assert data_parallel_settings(trainer).overlap_param_gather is overlap
    assert optimizer_settings(OptimizerConfig(), trainer, torch.bfloat16).overlap_param_gather is overlap


def test_what_a_rank_must_know_before_it_starts_stands_in_its_environment() -> None:
    plain = trainer_environment(TrainerConfig(), 1)
    names = ("PYTORCH_CUDA_ALLOC_CONF", "NVTE_ALLOW_NONDETERMINISTIC_ALGO", "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")
    assert not set(names) & set(plain)
    asked = trainer_environment(TrainerConfig(expandable_segments=True, deterministic=True), 1)
    assert [asked[name] for name in names] == ["expandable_segments:True", "0", ":4096:8", "Ring"]


def test_deepep_that_is_not_installed_says_how_to_get_it() -> None:
    check_dispatcher(TrainerConfig())
    with pytest.raises(LayoutError, match="deep_ep is not installed; build it from"):
        check_dispatcher(TrainerConfig(token_dispatcher="deepep"))


def test_modules_that_transformer_engine_computes_again_are_refused_without_it() -> None:
    check_recomputation(TrainerConfig(recompute="selective", recompute_modules=("core_attn", "mlp", "moe")), CPU)
    with pytest.raises(LayoutError, match="names layernorm, which Megatron-Core computes again on CUDA, through"):
        check_recomputation(TrainerConfig(recompute="selective", recompute_modules=("core_attn", "layernorm")), CPU)
