from dataclasses import replace
from pathlib import Path

import pytest
from tiny_checkpoints import write_checkpoint

from millrace.config.cluster import ClusterConfig, NodeConfig
from millrace.config.loading import load_recipe
from millrace.config.model_shape import ModelShape
from millrace.config.precision_rules import (
    CAPABILITIES,
    GENERATIONS,
    cluster_problems_of_engines,
    cluster_problems_of_precision,
    gpu_problem,
    model_problems,
)
from millrace.config.rules import check_recipe
from millrace.config.schema import ParallelConfig, PrecisionConfig, Recipe
from millrace.planning.hardware import GPUS

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
ON_GPUS = ("trainer.device=cuda", "model.dtype=bfloat16")
IN_FP8_ALONE = (*ON_GPUS, "precision={fp8: tensorwise, parameters: true}", "trainer.distributed_optimizer=true")


def loaded(file: Path, *overrides: str) -> Recipe:
    return load_recipe(file, overrides)


def cluster(gpu: str | None, gpus: int = 8) -> ClusterConfig:
    return ClusterConfig(name="site", nodes=4, node=NodeConfig(gpus=gpus, gpu=gpu, cores=64, memory_gib=1000))


def test_a_recipe_without_the_section_computes_in_its_own_type(recipe_file: Path) -> None:
    recipe = loaded(recipe_file)
    assert recipe.precision == PrecisionConfig() and recipe.precision.fp8 == "none"
    assert check_recipe(recipe) == []


@pytest.mark.parametrize("fp8", RECIPES)
def test_every_recipe_is_accepted_on_gpus_and_as_an_emulation(recipe_file: Path, fp8: str) -> None:
    assert check_recipe(loaded(recipe_file, f"precision.fp8={fp8}", *ON_GPUS)) == []
    assert check_recipe(loaded(recipe_file, f"precision={{fp8: {fp8}, emulate: true}}", "model.dtype=float32")) == []


@pytest.mark.parametrize("model", ["moe", "dense"])
def test_weights_may_be_in_fp8_alone_where_there_are_masters(recipe_file: Path, model: str) -> None:
    path = ("model.path=moe",) if model == "moe" else ("precision.fp8=mxfp8",)
    assert check_recipe(loaded(recipe_file, *IN_FP8_ALONE, *path, "trainer.offload_optimizer=true")) == []


def test_the_format_follows_the_recipe_unless_it_is_named() -> None:
    chosen = {fp8: PrecisionConfig(fp8=fp8).chosen_format for fp8 in RECIPES}
    assert chosen == {"delayed": "hybrid", "tensorwise": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}
    assert PrecisionConfig(fp8="mxfp8", format="hybrid").chosen_format == "hybrid"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["precision.fp8=mxfp8"], "trainer.device is cpu, which has no FP8 products; set precision.emulate=true"),
        (["precision={fp8: delayed, emulate: true}", *ON_GPUS], "precision.emulate is for CPU ranks"),
        (["precision.fp8=delayed", "trainer.device=cuda", "model.dtype=float32"], "set model.dtype=bfloat16"),
        (["precision.margin=1"], "precision.margin is not read with precision.fp8=none, but by delayed"),
        (
            ["precision={fp8: tensorwise, emulate: true, amax_history: 16}"],
            "amax_history is not read with precision.fp8=tensorwise",
        ),
        (
            ["precision={fp8: delayed, emulate: true, first_layers_bf16: 1}"],
            "precision.first_layers_bf16 is not read with precision.fp8=delayed",
        ),
        (["precision={fp8: mxfp8, emulate: true, power_of_two_scales: false}"], "is not read with precision.fp8=mxfp8"),
        (
            ["precision={fp8: blockwise, emulate: true, last_layers_bf16: 3}", "parallel.pp=2"],
            "precision.last_layers_bf16 is 3, but Megatron-Core takes at most the 2 layers of one pipeline stage",
        ),
        (["precision={fp8: mxfp8, emulate: true, pad_experts: true}"], "pad_experts is set, but the model has no ex"),
        (["precision={fp8: delayed, parameters: true}", *ON_GPUS], "parameters is not read with precision.fp8=delayed"),
        (["precision={fp8: mxfp8, parameters: true}", *ON_GPUS], "set trainer.distributed_optimizer=true"),
        (["precision={fp8: mxfp8, emulate: true, parameters: true}"], "leave precision.parameters out"),
        ([*IN_FP8_ALONE, "model.lora={}"], "precision.parameters and model.lora exclude each other"),
        (
            [*IN_FP8_ALONE, "trainer.overlap_parameter_gather=true"],
            "precision.parameters and trainer.overlap_parameter_gather exclude each other",
        ),
        (
            [*IN_FP8_ALONE, "precision.fp8=mxfp8", "model.path=moe"],
            "mixes up those of a model with experts; use tensorwise",
        ),
        (
            ["precision={fp8: delayed, emulate: true}", "stages.climb.kl.coefficient=0.1"],
            "the reference of stages.climb.kl never train; use tensorwise",
        ),
        (["precision={fp8: delayed, emulate: true, amax_history: 0}"], "precision.amax_history is 0"),
        (["precision={fp8: delayed, emulate: true, margin: -1}"], "precision.margin is -1"),
    ],
)
def test_what_cannot_be_computed_or_would_not_be_read_is_refused(
    recipe_file: Path, overrides: list[str], message: str
) -> None:
    problems = check_recipe(loaded(recipe_file, *overrides))
    assert any(message in problem for problem in problems), problems


def test_matrices_must_be_of_a_width_that_fp8_products_take(recipe_file: Path) -> None:
    """96 feed-forward columns over two ranks are 48, of which 16 is a divisor and 32 is none."""
    tp2 = "parallel={tp: 2, sequence_parallel: true}"
    assert check_recipe(loaded(recipe_file, "precision.fp8=tensorwise", tp2, *ON_GPUS)) == []
    (problem,) = check_recipe(loaded(recipe_file, "precision.fp8=mxfp8", tp2, *ON_GPUS))
    assert "multiples of 32, but the model has 96 feed-forward columns over parallel.tp=2; lower parallel.tp" in problem
    (problem,) = check_recipe(loaded(recipe_file, "precision.fp8=mxfp8", "model.path=moe", *ON_GPUS))
    assert "48 columns of an expert; set precision.fp8=none" in problem


def test_blocks_that_ranks_gather_are_whole(recipe_file: Path) -> None:
    blockwise = ("precision.fp8=blockwise", *ON_GPUS)
    assert check_recipe(loaded(recipe_file, "parallel.tp=2", *blockwise)) == []
    (problem,) = check_recipe(loaded(recipe_file, "parallel={tp: 2, sequence_parallel: true}", *blockwise))
    assert "gather blocks of 128, but the model's hidden_size is 64; use tensorwise" in problem


def test_a_mamba_layers_projection_is_of_such_a_width_too(tmp_path: Path) -> None:
    """It brings forth 2 x 64 channels, twice 2 groups of 16 and 8 heads: 200 columns."""
    sizes = {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 16}
    shape = ModelShape.from_hf(write_checkpoint("nemotron_h", tmp_path, **sizes))
    problems = list(model_problems(PrecisionConfig(fp8="tensorwise"), shape, ParallelConfig()))
    assert problems == [
        "precision.fp8 is tensorwise, whose products take multiples of 16, but the model has 200 columns into a Mamba "
        "layer; set precision.fp8=none"
    ]


def test_teachers_on_the_ranks_have_no_history_for_delayed_scales(cascade_file: Path) -> None:
    fp8 = "precision={fp8: delayed, emulate: true}"
    (problem,) = check_recipe(loaded(cascade_file, fp8, "stages.prefer.kl.coefficient=0"))
    assert "the teachers of stages.distil on the trainer's ranks" in problem
    served = loaded(cascade_file, fp8, "stages.prefer.kl.coefficient=0", "stages.distil.placement=served")
    assert not any("precision" in problem for problem in check_recipe(served))


@pytest.mark.parametrize(
    ("gpu", "computed"),
    [
        ("a100", ()),
        ("l40s", ("delayed", "tensorwise")),
        ("h100", ("delayed", "tensorwise", "blockwise")),
        ("h200", ("delayed", "tensorwise", "blockwise")),
        ("b200", RECIPES),
        ("gb300", RECIPES),
        ("rtx5090", ("delayed", "tensorwise", "blockwise")),
    ],
)
def test_each_generation_of_gpus_computes_its_recipes(recipe_file: Path, gpu: str, computed: tuple[str, ...]) -> None:
    for fp8 in RECIPES:
        recipe = loaded(recipe_file, f"precision.fp8={fp8}", *ON_GPUS)
        problems = list(cluster_problems_of_precision(recipe, cluster(gpu)))
        assert bool(problems) == (fp8 not in computed), (fp8, problems)


def test_a_refusal_names_the_alternative() -> None:
    assert "use blockwise" in (gpu_problem("mxfp8", (9, 0), "an h100") or "")
    assert "use tensorwise" in (gpu_problem("mxfp8", (8, 9), "an l4") or "")
    assert "use tensorwise" in (gpu_problem("blockwise", (8, 9), "an l4") or "")
    assert "precision.fp8=none for bfloat16" in (gpu_problem("tensorwise", (8, 0), "an a100") or "")
    assert gpu_problem("none", (7, 0), "a v100") is None


def test_nodes_without_gpus_only_emulate(recipe_file: Path) -> None:
    emulated = loaded(recipe_file, "precision={fp8: mxfp8, emulate: true}")
    assert not list(cluster_problems_of_precision(emulated, cluster(None, gpus=0)))
    real = replace(emulated, precision=PrecisionConfig(fp8="mxfp8"))
    (problem,) = cluster_problems_of_precision(real, cluster(None, gpus=0))
    assert "the nodes of site have no GPUs; set precision.emulate=true" in problem


def test_an_emulation_is_not_taken_to_gpus_unasked(recipe_file: Path) -> None:
    emulated = loaded(recipe_file, "precision={fp8: mxfp8, emulate: true}", "trainer.device=auto")
    (problem,) = cluster_problems_of_precision(emulated, cluster("h100"))
    assert "precision.emulate is for CPU ranks, but the nodes of site have GPUs" in problem
    on_cpu = loaded(recipe_file, "precision={fp8: mxfp8, emulate: true}")
    assert not list(cluster_problems_of_precision(on_cpu, cluster("h100")))


def test_a_gpu_that_is_not_known_must_be_named(recipe_file: Path) -> None:
    recipe = loaded(recipe_file, "precision.fp8=delayed", *ON_GPUS)
    (problem,) = cluster_problems_of_precision(recipe, cluster("tpu"))
    assert "node.gpu of site is 'tpu', of which it is not known" in problem
    assert not list(cluster_problems_of_precision(recipe, cluster("RTX-6000-Ada")))


def test_float32_scales_are_refused_where_scales_are_powers_of_two(recipe_file: Path) -> None:
    recipe = loaded(recipe_file, "precision={fp8: blockwise, power_of_two_scales: false}", *ON_GPUS)
    assert not list(cluster_problems_of_precision(recipe, cluster("h100")))
    (problem,) = cluster_problems_of_precision(recipe, cluster("b200"))
    assert "precision.power_of_two_scales is false" in problem


def test_every_gpu_whose_speed_is_known_has_a_generation() -> None:
    assert set(GPUS) <= set(CAPABILITIES) and set(CAPABILITIES.values()) <= set(GENERATIONS)


def test_engines_in_fp8_are_refused_on_gpus_without_it(recipe_file: Path) -> None:
    recipe = loaded(recipe_file, "fleet.quantization=fp8", "fleet.dtype=bfloat16", *ON_GPUS)
    (problem,) = cluster_problems_of_engines(recipe, cluster("a100"))
    assert problem == (
        "fleet.quantization is fp8, but a100 (Ampere, compute capability 8.0) has no FP8; set fleet.quantization=none"
    )
    for gpu in ("l40s", "h100", "b200", "tpu"):
        assert not list(cluster_problems_of_engines(recipe, cluster(gpu)))


def test_judges_and_served_teachers_in_fp8_are_refused_on_gpus_without_it(cascade_file: Path) -> None:
    fp8 = "engine={quantization: fp8, dtype: bfloat16}"
    recipe = loaded(
        cascade_file,
        "judges.genrm={model: judge, " + fp8.replace("engine=", "engine: ") + "}",
        f"stages.distil.teacher_{fp8}",
        "stages.distil.placement=served",
        *ON_GPUS,
    )
    keys = ["judges.genrm.engine", "stages.distil.teacher_engine"]
    problems = list(cluster_problems_of_engines(recipe, cluster("a100")))
    assert [problem.split(".quantization is fp8, but a100")[0] for problem in problems] == keys
    assert all(f"set {key}.quantization=none" in problem for key, problem in zip(keys, problems, strict=True))
    assert not list(cluster_problems_of_engines(recipe, cluster("h100")))
    on_the_ranks = loaded(cascade_file, f"stages.distil.teacher_{fp8}", *ON_GPUS)
    assert not list(cluster_problems_of_engines(on_the_ranks, cluster("a100")))
