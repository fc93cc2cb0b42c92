from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from millrace.config.cluster import ClusterConfig, NodeConfig
from millrace.config.loading import load_recipe
from millrace.config.model_shape import ModelShape
from millrace.config.placement import place
from millrace.config.schema import MopdStage, Recipe
from millrace.planning.activations import ActivationSettings, Part, in_flight, peak_bytes, stage_parts
from millrace.planning.changes import changed, helpful_changes, written
from millrace.planning.cluster_plan import plan_on_cluster, render_text
from millrace.planning.memory import Memory, MemoryModel, Role
from millrace.planning.page import plan_page

CPU = ClusterConfig(name="small", nodes=1, node=NodeConfig(gpus=0, cores=8, memory_gib=16))
GPUS = ClusterConfig(
    name="big", nodes=4, node=NodeConfig(gpus=8, gpu="h100", gpu_memory_gib=80, cores=64, memory_gib=1000)
)


def recipe_of(file: Path, *overrides: str) -> Recipe:
    return load_recipe(file, overrides)


def memory_of(recipe: Recipe, cluster: ClusterConfig = CPU) -> Memory:
    return MemoryModel(recipe, cluster, ModelShape.from_hf(recipe.model.path)).whole(place(recipe, cluster))


def role(memory: Memory, name: str) -> Role:
    return next(one for one in memory.roles if one.name.startswith(name))


def test_a_node_of_cpus_holds_all_of_its_ranks_and_engines(recipe_file: Path) -> None:
    memory = memory_of(recipe_of(recipe_file, "parallel.dp=2"))
    trainer, engine = role(memory, "trainer"), role(memory, "engine")
    both = 2 * (trainer.device_bytes + trainer.host_bytes) + engine.device_bytes + engine.host_bytes
    assert memory.nodes == (both,) and memory.fits
    assert engine.device["cache"] == 268435456, "what fleet.kv_cache_bytes says"


def test_what_does_not_fit_a_node_is_said_with_the_changes_that_help(recipe_file: Path) -> None:
    recipe = recipe_of(recipe_file, "fleet.kv_cache_bytes=34359738368")
    memory = memory_of(recipe)
    (shortage,) = memory.shortages
    assert "node 0 needs 33.9" in shortage.sentence and "a node of small has 16.0 GiB" in shortage.sentence
    best = helpful_changes(recipe, CPU, ModelShape.from_hf(recipe.model.path), shortage)
    assert written(best[0].overrides) == "fleet.kv_cache_bytes=17179869184"
    assert best[0].saves == 17179869184


def test_an_engine_without_room_for_one_sequence_says_so(recipe_file: Path) -> None:
    memory = memory_of(recipe_of(recipe_file, "fleet.kv_cache_bytes=1024"))
    (shortage,) = memory.shortages
    assert shortage.sentence.startswith("engine has 0.0 MiB of cache on each rank")
    assert "one sequence of 256 tokens takes" in shortage.sentence


CODE = "domains.code={environment: code, train: math.jsonl, held_out: held-out.jsonl, sandbox: {languages: [cpp]}}"


def test_nodes_that_verify_hold_a_program_for_each_of_their_cores(recipe_file: Path) -> None:
    cluster = replace(CPU, nodes=3)
    recipe = recipe_of(recipe_file, CODE, "domains.code.sandbox.compile_memory_mb=1536", "placement.verifier_nodes=2")
    memory = memory_of(recipe, cluster)
    verifier = role(memory, "verifier")
    assert verifier.ranks == 16 and verifier.host["program"] == 1536 << 20, "the compiler takes more than a program"
    assert memory.fits and memory.nodes[1:] == (8 * verifier.host_bytes,) * 2
    plan = plan_on_cluster(recipe, cluster)
    assert re.search(r"nodes +what runs there\n0 +1 trainer ranks, 1 engine\n1-2 +8 verifiers", render_text(plan))
    assert "verifier x 16: 1.5 GiB" in plan_page(plan, "")
    assert memory_of(recipe_of(recipe_file, CODE)).roles[-1].name == "engine"


def test_a_node_that_verifies_and_is_too_small_says_so_with_what_helps(recipe_file: Path) -> None:
    cluster = replace(CPU, nodes=2)
    recipe = recipe_of(recipe_file, CODE, "domains.code.sandbox.memory_mb=4096", "placement.verifier_nodes=1")
    (unfit,) = plan_on_cluster(recipe, cluster).unfit
    assert str(unfit) == (
        "a node that verifies may need 32.4 GiB for 8 programs at one time, but a node of small has 16.0 GiB. What "
        "helps most: domains.code.sandbox.memory_mb=2048 (16.0 GiB less)"
    )


def test_frozen_models_stand_where_the_stage_wants_them(cascade_file: Path) -> None:
    def with_placement(where: str) -> Role:
        recipe = load_recipe(cascade_file)
        stages = tuple(
            replace(one, placement=where) if isinstance(one, MopdStage) else one  # type: ignore[arg-type]
            for one in recipe.stages
        )
        return role(memory_of(replace(recipe, stages=stages), CPU), "trainer")

    shared, resident, served = (with_placement(where) for where in ("time_shared", "resident", "served"))
    weights = shared.device["weights"]
    assert shared.device["reference"] == weights, "the rlhf stage has a KL term"
    assert shared.host["teachers"] == 4 * weights, "three teachers, and the policy's own while one stands in its place"
    assert resident.device["teachers"] == 3 * weights and "teachers" not in resident.host
    assert "teachers" not in served.device and "teachers" not in served.host


def test_weights_travel_through_the_gpu_or_the_host(recipe_file: Path) -> None:
    cuda = ("trainer.device=cuda", "fleet.transport=nccl", "fleet.bucket_bytes=1048576")
    trainer = role(memory_of(recipe_of(recipe_file, *cuda), GPUS), "trainer")
    assert trainer.device["buckets"] == 2 * 1048576 and "buckets" not in trainer.host
    disk = role(memory_of(recipe_of(recipe_file, *cuda[:1], "fleet.transport=disk"), GPUS), "trainer")
    assert disk.host["buckets"] == 2 * 67108864 and "buckets" not in disk.device


def test_a_sharded_optimizer_and_recomputation_save_what_they_should(recipe_file: Path) -> None:
    plain = role(memory_of(recipe_of(recipe_file, "parallel.dp=4")), "trainer")
    sharded = role(memory_of(recipe_of(recipe_file, "parallel.dp=4", "trainer.distributed_optimizer=true")), "trainer")
    assert sharded.device["optimizer"] == pytest.approx(plain.device["optimizer"] / 4, rel=1e-4)
    kinds = ("none", "full")
    none, full = (role(memory_of(recipe_of(recipe_file, f"trainer.recompute={kind}")), "trainer") for kind in kinds)
    assert full.device["activations"] < 0.5 * none.device["activations"]


def test_the_first_stage_of_a_pipeline_holds_most_micro_batches() -> None:
    assert [in_flight(4, rank, 16) for rank in range(4)] == [4, 3, 2, 1]
    assert in_flight(4, 0, 2) == 2, "no more than there are"


def test_parts_that_come_back_are_added_where_they_do() -> None:
    parts = [Part(name="a", kept=10, again=50), Part(name="b", kept=10, again=5), Part(name="c", kept=30)]
    assert peak_bytes(parts) == 60, "10 kept and 50 again while a is computed anew"
    assert peak_bytes(parts[1:]) == 40


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_fused_layers_keep_less_than_plain_ones(recipe_file: Path, recompute: str) -> None:
    recipe = load_recipe(recipe_file)
    shape = ModelShape.from_hf(recipe.model.path)
    plain, fused = (
        peak_bytes(stage_parts(shape, settings, 0))
        for settings in (
            ActivationSettings(parallel=recipe.parallel, dtype="bfloat16", recompute=recompute, tokens=512, fused=fused)
            for fused in (False, True)
        )
    )
    assert 0 < fused < plain


def test_overrides_reach_sections_and_stages(cascade_file: Path) -> None:
    recipe = load_recipe(cascade_file)
    values: dict[str, Any] = {"parallel.tp": 2, "stages.distil.placement": "served", "fleet.max_num_seqs": 7}
    other = changed(recipe, values)
    assert (other.parallel.tp, other.fleet.max_num_seqs) == (2, 7)
    pasted = load_recipe(cascade_file, written(values).split())
    assert other == pasted


def test_fp8_keeps_weights_of_linears_beside_those_in_bfloat16_unless_it_takes_their_place(recipe_file: Path) -> None:
    gpus = ClusterConfig(name="gpus", nodes=1, node=NodeConfig(gpus=8, gpu="h100", cores=64, memory_gib=1000))
    base = (
        "trainer.device=cuda",
        "model.dtype=bfloat16",
        "trainer.distributed_optimizer=true",
        "fleet.transport=nccl",
        "parallel.pp=2",
    )

    def stages(*overrides: str) -> list[dict[str, int]]:
        memory = memory_of(recipe_of(recipe_file, *base, *overrides), gpus)
        return [one.device for one in memory.roles if one.name.startswith("trainer")]

    plain, beside = stages(), stages("precision.fp8=blockwise")
    edges = stages("precision={fp8: blockwise, first_layers_bf16: 2}")
    # A layer of the model: 64 x (128 + 64 + 64) of q, k and v, 128 x 64 behind attention, 3 x 64 x 96 feed-forward.
    layer = 64 * 256 + 128 * 64 + 3 * 64 * 96
    assert [device["fp8_weights"] for device in beside] == [2 * 2 * layer] * 2
    assert [device["fp8_weights"] for device in edges] == [0, 2 * 2 * layer]
    assert all("fp8_weights" not in device for device in plain)
    assert [device["weights"] for device in beside] == [device["weights"] for device in plain]
    for alone, other in zip(stages("precision={fp8: blockwise, parameters: true}"), beside, strict=True):
        assert alone["fp8_weights"] == other["fp8_weights"]
        assert alone["weights"] == other["weights"] - 2 * 2 * layer, "two layers of two bytes a weight"
        assert alone["gathered_weight"] == 2 * layer and "gathered_weight" not in other


def test_an_optimizer_that_waits_on_the_host_leaves_the_gpu_what_activations_do_not_take(recipe_file: Path) -> None:
    here = role(memory_of(recipe_of(recipe_file, "trainer.device=cuda"), GPUS), "trainer")
    away = role(memory_of(recipe_of(recipe_file, "trainer={device: cuda, offload_optimizer: true}"), GPUS), "trainer")
    assert away.host["optimizer"] == here.device["optimizer"] and "optimizer" not in here.host
    assert away.device["optimizer"] < here.device["optimizer"]
    assert away.device["weights"] == here.device["weights"]


def test_master_weights_that_a_sync_reads_come_back_beside_engines_on_the_same_gpu(recipe_file: Path) -> None:
    base = (
        "trainer={device: cuda, offload_optimizer: true, distributed_optimizer: true}",
        "precision={fp8: blockwise, parameters: true}",
        "model.dtype=bfloat16",
    )
    apart, beside = (
        role(memory_of(recipe_of(recipe_file, *base, f"fleet.transport={transport}"), GPUS), "trainer").device
        for transport in ("nccl", "ipc")
    )
    assert apart["optimizer"] < beside["optimizer"]


def test_the_buffers_of_overlapped_tensor_parallelism_are_counted(recipe_file: Path) -> None:
    base = ("trainer.device=cuda", "model.dtype=bfloat16", "parallel={tp: 2, sequence_parallel: true}")
    plain = role(memory_of(recipe_of(recipe_file, *base), GPUS), "trainer")
    overlapped = role(memory_of(recipe_of(recipe_file, *base, "trainer.overlap_tensor_parallel=true"), GPUS), "trainer")
    tokens, hidden = 512, 64
    assert overlapped.device_bytes - plain.device_bytes == overlapped.device["user_buffers"] == 12 * tokens * hidden * 2


def test_some_layers_recomputed_save_some_of_what_all_do(recipe_file: Path) -> None:
    chosen = (
        "{recompute: none}",
        "{recompute: full, recompute_method: block, recompute_layers: 2}",
        "{recompute: full}",
    )
    kept = [
        role(memory_of(recipe_of(recipe_file, f"trainer={trainer}")), "trainer").device["activations"]
        for trainer in chosen
    ]
    assert kept[0] > kept[1] > kept[2]
    parts = role(
        memory_of(recipe_of(recipe_file, "trainer={recompute: selective, recompute_modules: [mlp]}")), "trainer"
    )
    assert parts.device["activations"] == kept[0], "what other parts than core attention save is not counted"
