"""What a plan says of a trainer rank's memory is what real Megatron-Core ranks hold."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import launch
from tiny_checkpoints import write_checkpoint

from millrace.config.model_shape import ModelShape
from millrace.config.plan import rank_plan
from millrace.config.schema import ModelConfig, ParallelConfig, Recipe, TrainerConfig
from millrace.planning.activations import ActivationSettings, held_bytes, in_flight, peak_bytes, stage_parts
from millrace.ports import free_port

TOKENS = 1024
TOLERANCE = 0.05
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"family": "qwen3", "hidden_size": 128, "intermediate_size": 320},
    "five layers": {"family": "qwen3", "hidden_size": 128, "num_hidden_layers": 5},
    "llama": {"family": "llama", "hidden_size": 128, "intermediate_size": 320},
    "gemma": {"family": "gemma3_text", "hidden_size": 128, "sliding_window": 2048},
    "moe": {"family": "qwen3_moe", "hidden_size": 128, "moe_intermediate_size": 96},
    "hybrid": {"family": "nemotron_h", "hybrid_override_pattern": "ME*-ME", "hidden_size": 128},
    "mla": {"family": "deepseek_v3"},
    "hybrid-latent": {"family": "nemotron_h", "hybrid_override_pattern": "E*ME", "moe_latent_size": 32},
}
SP = {"sequence_parallel": True}
SHARDED = {"distributed_optimizer": True}
LAYOUTS: list[tuple[str, str, dict[str, Any], dict[str, Any], str]] = [
    ("dense", "one", {}, {}, "float32"),
    ("dense", "one-bfloat16", {}, {}, "bfloat16"),
    ("dense", "selective", {}, {"recompute": "selective"}, "float32"),
    ("dense", "full", {}, {"recompute": "full"}, "float32"),
    ("llama", "one", {}, {}, "float32"),
    ("gemma", "one", {}, {}, "float32"),
    ("moe", "one", {}, {}, "float32"),
    ("moe", "full", {}, {"recompute": "full"}, "bfloat16"),
    ("hybrid", "one", {}, {}, "float32"),
    ("hybrid", "one-bfloat16", {}, {}, "bfloat16"),
    ("hybrid", "full", {}, {"recompute": "full"}, "float32"),
    ("hybrid-latent", "one", {}, {}, "float32"),
    ("mla", "one", {}, {}, "float32"),
    ("mla", "selective", {}, {"recompute": "selective"}, "bfloat16"),
    ("dense", "tp2", {"tp": 2}, {}, "float32"),
    ("dense", "tp2sp", {"tp": 2, **SP}, {}, "float32"),
    ("dense", "pp2", {"pp": 2}, {}, "float32"),
    ("five layers", "pp2", {"pp": 2}, {}, "float32"),
    ("dense", "pp2-full", {"pp": 2}, {"recompute": "full"}, "float32"),
    ("dense", "dp2-sharded", {"dp": 2}, SHARDED, "bfloat16"),
    ("dense", "cp2", {"cp": 2}, {}, "float32"),
    ("mla", "tp2ep2", {"tp": 2, "ep": 2, **SP}, {}, "float32"),
    ("moe", "tp2etp2", {"tp": 2, "etp": 2, **SP}, {}, "float32"),
    ("moe", "tp2ep2", {"tp": 2, "ep": 2, **SP}, {}, "float32"),
    ("moe", "ep2-sharded", {"dp": 2, "ep": 2}, SHARDED, "float32"),
    ("hybrid", "tp2ep2", {"tp": 2, "ep": 2, **SP}, {}, "bfloat16"),
    ("hybrid", "pp2", {"pp": 2}, {}, "float32"),
    ("moe", "tp2pp2ep2", {"tp": 2, "pp": 2, "ep": 2, **SP}, SHARDED, "bfloat16"),
]
IDS = [f"{model}-{layout}" for model, layout, *_ in LAYOUTS]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: write_checkpoint(path=folder / name, **facts) for name, facts in MODELS.items()}


@pytest.fixture(scope="module")
def measured(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what every rank of every case held."""
    folder = tmp_path_factory.mktemp("measured")
    for world in (1, 2, 4):
        cases = []
        for (model, _, parallel, trainer, dtype), name in zip(LAYOUTS, IDS, strict=True):
            if ParallelConfig(**parallel).world_size != world:
                continue
            cases.append(
                {
                    "name": name,
                    "model": str(models[model]),
                    "parallel": parallel,
                    "trainer": trainer,
                    "dtype": dtype,
                    "tokens": TOKENS,
                    "micro_batches": micro_batches(parallel),
                    "port": free_port(),
                }
            )
        file = folder / f"{world}.json"
        file.write_text(json.dumps(cases))
        launch(Path(__file__).with_name("memory_worker.py"), world, [str(file), str(folder)], timeout=400)
    return folder


def micro_batches(parallel: dict[str, Any]) -> int:
    return 2 * parallel.get("pp", 1)


def planned(model: Path, parallel: ParallelConfig, trainer: TrainerConfig, dtype: str, rank: int) -> dict[str, float]:
    shape = ModelShape.from_hf(model)
    recipe = Recipe(
        name="m",
        run_dir="m",
        model=ModelConfig(path=str(model), dtype=dtype),
        parallel=parallel,
        trainer=trainer,
        stages=(),
    )
    of_rank = rank_plan(rank, recipe, shape)
    settings = ActivationSettings(
        parallel=parallel, dtype=dtype, recompute=trainer.recompute, tokens=TOKENS, fused=False
    )
    parts = stage_parts(shape, settings, of_rank.pp)
    waiting = in_flight(parallel.pp, of_rank.pp, 2 * parallel.pp) - 1
    return {
        "weights": of_rank.weight_bytes,
        "gradients": of_rank.gradient_bytes,
        "optimizer": of_rank.optimizer_bytes,
        "activations": waiting * held_bytes(parts) + peak_bytes(parts),
    }


@pytest.mark.parametrize(("model", "layout", "parallel", "trainer", "dtype"), LAYOUTS, ids=IDS)
def test_the_planned_bytes_of_a_rank_are_those_that_it_holds(
    capsys: pytest.CaptureFixture[str],
    measured: Path,
    models: dict[str, Path],
    model: str,
    layout: str,
    parallel: dict[str, Any],
    trainer: dict[str, Any],
    dtype: str,
) -> None:
    places = ParallelConfig(**parallel)
    ranks = range(places.world_size)
    held = [json.loads((measured / f"{model}-{layout}-{rank}.json").read_text()) for rank in ranks]
    plans = [planned(models[model], places, TrainerConfig(**trainer), dtype, rank) for rank in ranks]
    for rank, (real, plan) in enumerate(zip(held, plans, strict=True)):
        errors = {what: plan[what] / real[what] - 1 for what in real}
        with capsys.disabled():
            said = ", ".join(f"{what} {error:+.2%}" for what, error in errors.items())
            sys.stdout.write(f"{model}-{layout} rank {rank}: planned against held: {said}\n")
        assert errors["weights"] == errors["gradients"] == 0, (rank, real, plan)
        assert abs(errors["activations"]) <= TOLERANCE, (rank, real, plan)
        if not trainer.get("distributed_optimizer"):
            assert errors["optimizer"] == 0, (rank, real, plan)
    # A sharded optimizer cuts a buffer into equal parts, so only all ranks together hold what is planned.
    together = sum(real["optimizer"] for real in held)
    assert together == pytest.approx(sum(plan["optimizer"] for plan in plans), rel=1e-4)
