"""What a recipe's precision means to Megatron-Core and Transformer Engine, field by field and without the latter."""

import ast
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import megatron.core
import pytest
import torch
from megatron.core.enums import Fp8Recipe
from megatron.core.transformer.transformer_config import TransformerConfig
from packaging.version import Version
from tiny_checkpoints import write_checkpoint
from without_engine import without_engine

from millrace.config.model_shape import ModelShape
from millrace.config.schema import OptimizerConfig, ParallelConfig, PrecisionConfig, TrainerConfig
from millrace.launch.local import trainer_environment
from millrace.megatron.data_parallel import data_parallel_settings
from millrace.megatron.model_config import transformer_config
from millrace.megatron.optimizer import optimizer_settings
from millrace.megatron.precision import (
    PLAIN,
    PrecisionError,
    engine_recipe,
    require_computable,
    token_multiple,
    transformer_options,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CASES: dict[str, tuple[PrecisionConfig, dict[str, Any], str]] = {
    "delayed": (
        PrecisionConfig(fp8="delayed", amax_history=16, amax_algorithm="most_recent", margin=2),
        {
            "fp8": "hybrid",
            "fp8_recipe": "delayed",
            "fp8_param": False,
            "fp8_margin": 2,
            "fp8_amax_history_len": 16,
            "fp8_amax_compute_algo": "most_recent",
        },
        "DelayedScaling(margin=2, fp8_format=HYBRID, amax_history_len=16, amax_compute_algo=most_recent, "
        "override_linear_precision=(False, False, False), fp8_dpa=False, fp8_mha=False)",
    ),
    "tensorwise": (
        PrecisionConfig(fp8="tensorwise", format="e4m3", first_layers_bf16=1),
        {
            "fp8": "e4m3",
            "fp8_recipe": "tensorwise",
            "fp8_param": False,
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": 1,
            "num_layers_at_end_in_bf16": 0,
        },
        "Float8CurrentScaling(fp8_format=E4M3, fp8_dpa=False)",
    ),
    "blockwise": (
        PrecisionConfig(fp8="blockwise", last_layers_bf16=2),
        {
            "fp8": "e4m3",
            "fp8_recipe": "blockwise",
            "fp8_param": False,
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": 0,
            "num_layers_at_end_in_bf16": 2,
        },
        "Float8BlockScaling(fp8_format=E4M3)",
    ),
    "mxfp8": (
        PrecisionConfig(fp8="mxfp8", format="hybrid", parameters=True),
        {"fp8": "hybrid", "fp8_recipe": "mxfp8", "fp8_param": True},
        "MXFP8BlockScaling(fp8_format=HYBRID)",
    ),
}
each_case = pytest.mark.parametrize(("precision", "fields", "recipe"), CASES.values(), ids=CASES)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    return ModelShape.from_hf(write_checkpoint("qwen3", tmp_path_factory.mktemp("dense")))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    return ModelShape.from_hf(write_checkpoint("qwen3_moe", tmp_path_factory.mktemp("experts")))


@each_case
def test_each_recipe_is_these_fields_of_megatron_and_this_object_of_transformer_engine(
    precision: PrecisionConfig, fields: dict[str, Any], recipe: str, dense: ModelShape
) -> None:
    assert transformer_options(precision, dense) == fields
    assert str(engine_recipe(precision)) == recipe


@each_case
def test_megatron_accepts_the_fields_and_would_build_that_object_of_them(
    precision: PrecisionConfig, fields: dict[str, Any], recipe: str
) -> None:
    config = TransformerConfig(num_layers=4, hidden_size=64, num_attention_heads=4, bf16=True, **fields)
    assert {name: getattr(config, name) for name in fields} == fields
    built = engine_recipe(precision)
    assert built is not None
    # Of MXFP8 Megatron-Core 0.16 does not say what is Transformer Engine's default: attention is not in FP8.
    assert _what_megatron_builds(config) == (built.name, {"fp8_dpa": False} | dict(built.arguments))


def _what_megatron_builds(config: TransformerConfig) -> tuple[str, dict[str, Any]]:
    """Megatron-Core's own function, run with names in the place of Transformer Engine's classes."""
    folder = Path(megatron.core.__path__[0])

    def record(name: str) -> type:
        class Recipe:
            def __init__(self, **arguments: Any) -> None:
                # DelayedScaling ignores the two that every module of Transformer Engine gets.
                said = {k: v for k, v in arguments.items() if k not in ("params_dtype", "device")}
                self.made = name, {"fp8_dpa": False} | said

        return Recipe

    classes = ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling")
    formats = SimpleNamespace(E4M3="E4M3", HYBRID="HYBRID")
    recipes = SimpleNamespace(Format=formats, **{name: record(name) for name in classes})
    engine = SimpleNamespace(common=SimpleNamespace(recipe=recipes))
    names: dict[str, Any] = {
        "transformer_engine": engine,
        "te": engine,
        "HAVE_TE": True,
        "Fp8Recipe": Fp8Recipe,
        "PkgVersion": Version,
        "is_te_min_version": lambda version: True,
        "get_te_version": lambda: Version("2.8"),
        "_get_extra_te_kwargs": lambda config: {"params_dtype": torch.bfloat16, "device": "cuda:0"},
        "TransformerConfig": TransformerConfig,
        "ModelParallelConfig": object,
    }
    for file, kind, name in (
        ("extensions/transformer_engine.py", ast.ClassDef, "TEDelayedScaling"),
        ("fp8_utils.py", ast.FunctionDef, "get_fp8_recipe"),
    ):
        tree = ast.parse((folder / file).read_text(encoding="utf-8"))
        node = next(n for n in ast.walk(tree) if isinstance(n, kind) and n.name == name)
        exec(compile(ast.Module([node], []), file, "exec"), names)
    return names["get_fp8_recipe"](config).made


def test_the_router_of_experts_pads_when_it_is_asked_to(experts: ModelShape) -> None:
    for asked in (False, True):
        options = transformer_options(PrecisionConfig(fp8="blockwise", pad_experts=asked), experts)
        assert options["moe_router_padding_for_quantization"] is asked


def test_weights_in_fp8_alone_reach_data_parallelism_and_the_optimizer() -> None:
    trainer = TrainerConfig(distributed_optimizer=True)
    for fp8, shared in (("tensorwise", False), ("mxfp8", True)):
        precision = PrecisionConfig(fp8=fp8, parameters=True)
        ddp = data_parallel_settings(trainer, precision)
        assert ddp.fp8_param_gather and ddp.reuse_grad_buf_for_mxfp8_param_ag is shared
        optimizer = optimizer_settings(OptimizerConfig(), trainer, torch.bfloat16, precision)
        assert optimizer.fp8_recipe == fp8 and optimizer.reuse_grad_buf_for_mxfp8_param_ag is shared
        kept = replace(precision, parameters=False)
        assert data_parallel_settings(trainer, kept) == data_parallel_settings(trainer)
        settings = [optimizer_settings(OptimizerConfig(), trainer, torch.bfloat16, p) for p in (kept, PLAIN)]
        assert settings[0] == settings[1]


@pytest.mark.parametrize("precision", [PLAIN, PrecisionConfig(fp8="mxfp8", emulate=True)], ids=["none", "emulated"])
def test_without_fp8_products_megatron_hears_of_none(precision: PrecisionConfig, dense: ModelShape) -> None:
    trainer = TrainerConfig()
    plain = transformer_config(dense, ParallelConfig(), trainer, torch.float32, CPU)
    asked = transformer_config(dense, ParallelConfig(), trainer, torch.float32, CPU, precision=precision)
    changing = ("activation_func", "init_method", "output_layer_init_method", "embedding_init_method")
    assert {k: v for k, v in asdict(asked).items() if k not in changing} == {
        k: v for k, v in asdict(plain).items() if k not in changing
    }
    assert asked.fp8 is None and engine_recipe(precision) is None and token_multiple(precision, ParallelConfig()) == 1


def test_micro_batches_are_filled_up_to_what_fp8_products_take() -> None:
    recipes = [precision for precision, _, _ in CASES.values()]
    assert [token_multiple(precision, ParallelConfig()) for precision in recipes] == [16, 16, 16, 32]
    # Gathered in FP8, blocks of 128 tokens are of one rank each.
    cut = ParallelConfig(tp=2, sequence_parallel=True)
    assert [token_multiple(precision, cut) for precision in recipes] == [16, 16, 128, 32]


@without_engine
def test_fp8_on_cuda_without_transformer_engine_says_how_to_get_it(dense: ModelShape) -> None:
    with pytest.raises(PrecisionError, match=r"not installed: pip install\s+'transformer-engine\[pytorch\]>=2.3'"):
        transformer_config(
            dense, ParallelConfig(), TrainerConfig(), torch.bfloat16, CUDA, precision=PrecisionConfig(fp8="blockwise")
        )


def test_fp8_and_its_emulation_are_kept_apart_by_device(dense: ModelShape) -> None:
    with pytest.raises(PrecisionError, match="emulate=true to preview the recipe"):
        require_computable(PrecisionConfig(fp8="delayed"), dense, CPU)
    with pytest.raises(PrecisionError, match="emulate is for CPU ranks"):
        require_computable(PrecisionConfig(fp8="delayed", emulate=True), dense, CUDA)
    require_computable(PrecisionConfig(fp8="delayed", emulate=True), dense, CPU)


def test_float32_scales_of_blocks_reach_transformer_engine_by_the_environment() -> None:
    name = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"
    asked = PrecisionConfig(fp8="blockwise", power_of_two_scales=False)
    assert trainer_environment(TrainerConfig(), 1, asked)[name] == "1"
    assert name not in trainer_environment(TrainerConfig(), 1, replace(asked, power_of_two_scales=True))
    assert name not in trainer_environment(TrainerConfig(), 1, replace(asked, emulate=True))
