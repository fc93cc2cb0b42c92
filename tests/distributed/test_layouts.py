"""Every parallel layout computes what one rank computes, and one rank computes what transformers computes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_data import example_batch, example_tokens, negative_log_likelihood
from ranks import launch
from tiny_checkpoints import YARN, write_checkpoint
from torch import Tensor

from millrace.megatron import verify_worker
from millrace.ports import free_port

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA3 = {"family": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "rope_scaling": LLAMA3_ROPE},
    "mistral": {"family": "mistral"},
    "qwen2": {"family": "qwen2"},
    "mixtral": {"family": "mixtral"},
    "qwen3": {"family": "qwen3", "tied": True},
    "qwen3_moe": {"family": "qwen3_moe"},
    "gemma3_text": {**GEMMA3, "sliding_window": 12},
    "gemma3_wide": {**GEMMA3, "sliding_window": 2048},
    "hybrid": {"family": "nemotron_h", "hybrid_override_pattern": "M-*M"},
    "hybrid_moe": {"family": "nemotron_h", "hybrid_override_pattern": "ME*-ME"},
    "hybrid_latent": {"family": "nemotron_h", "hybrid_override_pattern": "E*ME", "moe_latent_size": 32},
    "odd_moe": {"family": "qwen3_moe", "num_hidden_layers": 3},
    "mixed_moe": {"family": "qwen3_moe", "norm_topk_prob": False, "mlp_only_layers": [1]},
    "deepseek_v3": {"family": "deepseek_v3", "num_hidden_layers": 4},
    "deepseek_yarn": {
        "family": "deepseek_v3",
        "num_hidden_layers": 2,
        "rope_scaling": YARN | {"mscale": 0.7},
        "q_lora_rank": None,
        "n_shared_experts": 2,
        "rms_norm_eps": 1e-4,
        "num_experts_per_tok": 4,
    },
}
UNCUT = 4096
CUTS = (UNCUT, 64, 48, 30)
"""Capacities in tokens: one micro-batch, two, three of uneven size, four."""

DENSE = {
    "tp2": {"tp": 2},
    "tp2sp": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "dp2": {"dp": 2},
    "tp2pp2": {"tp": 2, "pp": 2},
    "cp2": {"cp": 2},
    "tp2spcp2": {"tp": 2, "cp": 2, "sequence_parallel": True},
    "pp2cp2": {"pp": 2, "cp": 2},
    "dp2cp2": {"dp": 2, "cp": 2},
}
MOE = {
    "tp2etp2": {"tp": 2, "etp": 2, "sequence_parallel": True},
    "tp2etp1": {"tp": 2, "etp": 1, "sequence_parallel": True},
    "tp2ep2": {"tp": 2, "ep": 2, "sequence_parallel": True},
    "ep2": {"dp": 2, "ep": 2},
    "pp2": {"pp": 2},
    "tp2pp2ep2": {"tp": 2, "pp": 2, "ep": 2, "sequence_parallel": True},
    "cp2ep2": {"cp": 2, "ep": 2},
    "tp2cp2ep4": {"tp": 2, "cp": 2, "ep": 4, "sequence_parallel": True},
    "cp4": {"cp": 4},
}
LAYOUTS = [(model, layout, DENSE[layout]) for model in ("llama", "qwen3") for layout in DENSE]
LAYOUTS += [(model, layout, MOE[layout]) for model in ("qwen3_moe", "deepseek_v3") for layout in MOE]
LAYOUTS += [("deepseek_yarn", layout, MOE[layout]) for layout in ("tp2etp2", "pp2")]
LAYOUTS += [
    ("gemma3_text", layout, DENSE[layout]) for layout in ("tp2", "tp2sp", "pp2", "dp2", "cp2", "tp2pp2", "tp2spcp2")
]
LAYOUTS += [(model, "tp2sp", DENSE["tp2sp"]) for model in ("mistral", "qwen2")]
LAYOUTS += [("mixtral", "tp2ep2", MOE["tp2ep2"])]
LAYOUTS += [("hybrid", layout, DENSE[layout]) for layout in ("tp2", "tp2sp", "pp2")]
LAYOUTS += [("hybrid_moe", layout, parallel) for layout, parallel in MOE.items() if "cp" not in parallel]
LAYOUTS += [("odd_moe", "pp2", MOE["pp2"]), ("hybrid_moe", "pp4", {"pp": 4})]  # stages of unequal length
LAYOUTS += [("hybrid_latent", layout, MOE[layout]) for layout in ("tp2etp2", "ep2")]
IDS = [f"{model}-{layout}" for model, layout, _ in LAYOUTS]

Results = dict[str, list[dict[str, Any]]]
"""Name of a case -> what each rank found."""


def case(model: str, layout: str, parallel: dict[str, Any], **more: Any) -> dict[str, Any]:
    defaults = {"trainer": {}, "dtype": "float32", "capacities": [UNCUT]}
    return {"name": f"{model}-{layout}", "model": model, "parallel": parallel, **defaults, **more}


def cases_of_one_rank() -> list[dict[str, Any]]:
    cases = [case(model, "one", {}, capacities=CUTS) for model in MODELS]
    cases += [case("qwen3_moe", f"recompute-{kind}", {}, trainer={"recompute": kind}) for kind in ("selective", "full")]
    modules = {"recompute": "selective", "recompute_modules": ("core_attn", "moe")}
    cases.append(case("qwen3_moe", "recompute-modules", {}, trainer=modules))
    block = {"recompute": "full", "recompute_method": "block", "recompute_layers": 3}
    cases.append(case("qwen3_moe", "recompute-block", {}, trainer=block))
    cases.append(case("hybrid_moe", "recompute-full", {}, trainer={"recompute": "full"}))
    return [*cases, case("qwen3_moe", "again", {})]


def cases_of_two_ranks() -> list[dict[str, Any]]:
    cases = [case(model, layout, parallel) for model, layout, parallel in LAYOUTS if ranks_of(parallel) == 2]
    sharded = {"distributed_optimizer": True}
    cases.append(case("llama", "dp2-sharded", {"dp": 2}, trainer=sharded))
    cases.append(case("qwen3_moe", "ep2-sharded", {"dp": 2, "ep": 2}, trainer=sharded))
    cases.append(case("qwen3", "cp2-sharded", {"cp": 2}, trainer=sharded))
    cases.append(case("qwen3", "cp2-recompute", {"cp": 2}, trainer={"recompute": "selective"}))
    cases.append(case("qwen3", "tp2-bfloat16", {"tp": 2}, dtype="bfloat16"))
    cases.append(case("qwen3", "dp2-bfloat16", {"dp": 2}, dtype="bfloat16", trainer=sharded))
    return cases


def cases_of_four_ranks() -> list[dict[str, Any]]:
    return [case(model, layout, parallel) for model, layout, parallel in LAYOUTS if ranks_of(parallel) == 4]


def ranks_of(parallel: dict[str, Any]) -> int:
    return math.prod(parallel.get(kind, 1) for kind in ("tp", "pp", "cp", "dp"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: write_checkpoint(path=root / name, **options) for name, options in MODELS.items()}


@pytest.fixture(scope="module")
def results(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Three launches for all layouts of this file."""
    found: Results = {}
    for world, cases in ((1, cases_of_one_rank()), (2, cases_of_two_ranks()), (4, cases_of_four_ranks())):
        folder = tmp_path_factory.mktemp(f"ranks-{world}")
        for one in cases:
            one.update(model=str(checkpoints[one["model"]]), port=free_port())
        (folder / "cases.json").write_text(json.dumps(cases))
        launch(Path(__file__).with_name("layout_worker.py"), world, [str(folder / "cases.json"), str(folder)], 900)
        for one in cases:
            files = [folder / f"{one['name']}-{rank}.pt" for rank in range(world)]
            found[one["name"]] = [torch.load(file, weights_only=False) for file in files]
    return found


@pytest.fixture(scope="module")
def transformers_model(checkpoints: dict[str, Path]) -> Callable[[str], Any]:
    return lambda name: verify_worker.transformers_model(checkpoints[name])


def merged(ranks: list[dict[str, Any]], take: Callable[[dict[str, Any]], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all ranks; each may come from one rank only."""
    whole: dict[str, Tensor] = {}
    for rank in ranks:
        assert not whole.keys() & take(rank).keys()
        whole |= take(rank)
    return whole


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest norm(found - expected) / norm(expected) of any tensor."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - tensor).norm() / tensor.norm()) for name, tensor in expected.items())


def uncut(rank: dict[str, Any]) -> dict[str, Tensor]:
    return rank[f"cut {UNCUT}"]["gradients"]


@pytest.mark.parametrize("model", MODELS)
def test_logits_and_logprobs_equal_those_of_transformers(
    model: str, results: Results, transformers_model: Callable[[str], Any], record_property: Callable[..., None]
) -> None:
    reference, found = transformers_model(model).eval(), results[f"{model}-one"][0]
    with torch.no_grad():
        logits = reference(example_tokens()).logits
        logp = torch.cat([_logp(reference(t[None]).logits[0] / 0.7, t) for t in example_batch().sequences()])
        entropy = torch.cat([_entropy(reference(t[None]).logits[0] / 0.7) for t in example_batch().sequences()])
    worst = float((found["logits"] - logits).abs().max())
    record_property("logits", worst)
    assert worst <= 1e-4
    assert torch.equal(found["logits"].argmax(-1), logits.argmax(-1))
    torch.testing.assert_close(found["logp"], logp, atol=1e-4, rtol=0)
    torch.testing.assert_close(found["entropy"], entropy, atol=1e-4, rtol=0)


def test_a_window_hides_what_is_farther_away_and_nothing_else(results: Results) -> None:
    """The two models have the same weights. Within the window of the first token both see everything."""
    narrow, wide = (results[f"{model}-one"][0]["logits"] for model in ("gemma3_text", "gemma3_wide"))
    torch.testing.assert_close(narrow[:, :12], wide[:, :12], atol=1e-5, rtol=0)
    apart = (narrow[:, 12:] - wide[:, 12:]).abs().amax(dim=-1)
    assert (apart > 1e-2).all()


def _logp(logits: Tensor, tokens: Tensor) -> Tensor:
    following = logits[:-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    return torch.cat([torch.zeros(1), following])


def _entropy(logits: Tensor) -> Tensor:
    logp = logits[:-1].log_softmax(-1)
    return torch.cat([torch.zeros(1), -(logp.exp() * logp).sum(-1)])


@pytest.mark.parametrize(
    "model", ["llama", "mistral", "qwen2", "qwen3", "deepseek_v3", "deepseek_yarn", "gemma3_text", "hybrid"]
)
def test_gradients_equal_those_of_transformers(
    model: str, results: Results, transformers_model: Callable[[str], Any], record_property: Callable[..., None]
) -> None:
    reference, batch = transformers_model(model), example_batch()
    logp = torch.cat([_logp(reference(t[None]).logits[0], t) for t in batch.sequences()])
    negative_log_likelihood(logp, batch.streams, batch.segment_ids)[0].backward()
    # Of a hybrid, transformers stores what it calls model as backbone.
    root = "backbone." if model == "hybrid" else "model."
    expected = {re.sub(r"^model\.", root, name): gradient for name, gradient in checkpoint_gradients(reference)}
    worst = difference(uncut(results[f"{model}-one"][0]), expected)
    record_property("gradients", worst)
    assert worst <= 1e-5


def checkpoint_gradients(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Gradients under the names of the checkpoint's tensors: transformers stacks the experts of a layer."""
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        experts, _, stacked = name.rpartition(".")
        if stacked not in ("gate_up_proj", "down_proj"):
            yield name, parameter.grad
            continue
        for expert, gradient in enumerate(parameter.grad):
            names = ["gate_proj", "up_proj"] if stacked == "gate_up_proj" else ["down_proj"]
            for part, piece in zip(names, gradient.chunk(len(names)), strict=True):
                yield f"{experts}.{expert}.{part}.weight", piece


@pytest.mark.parametrize(("model", "layout", "parallel"), LAYOUTS, ids=IDS)
def test_a_layout_computes_what_one_rank_computes(
    model: str, layout: str, parallel: dict[str, Any], results: Results, record_property: Callable[..., None]
) -> None:
    one, ranks = results[f"{model}-one"][0], results[f"{model}-{layout}"]
    whole = merged(ranks, lambda rank: rank["weights"])
    assert whole.keys() == one["weights"].keys()
    assert all(torch.equal(whole[name], tensor) for name, tensor in one["weights"].items())
    for rank in ranks:
        assert (rank["logits"] - one["logits"]).abs().max() <= 1e-4
        assert torch.equal(rank["logits"].argmax(-1), one["logits"].argmax(-1))
        torch.testing.assert_close(rank["logp"], one["logp"], atol=1e-4, rtol=0)
        torch.testing.assert_close(rank["entropy"], one["entropy"], atol=1e-4, rtol=0)
        assert rank["metrics"] == ranks[0]["metrics"]
    worst = difference(merged(ranks, uncut), uncut(one))
    record_property("gradients", worst)
    record_property("logits", float((ranks[-1]["logits"] - one["logits"]).abs().max()))
    assert worst <= 1e-5


@pytest.mark.parametrize(("model", "layout", "parallel"), LAYOUTS, ids=IDS)
def test_a_layout_reports_the_loss_and_gradient_norm_of_one_rank(
    model: str, layout: str, parallel: dict[str, Any], results: Results
) -> None:
    for found, expected in zip(
        results[f"{model}-{layout}"][0]["metrics"], results[f"{model}-one"][0]["metrics"], strict=True
    ):
        for name in ("loss", "weight", "grad_norm"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(("model", "layout", "parallel"), LAYOUTS, ids=IDS)
def test_ranks_without_a_sequence_do_not_change_the_gradient(
    model: str, layout: str, parallel: dict[str, Any], results: Results
) -> None:
    found = merged(results[f"{model}-{layout}"], lambda rank: rank["one sequence"])
    assert difference(found, results[f"{model}-one"][0]["one sequence"]) <= 1e-5


@pytest.mark.parametrize("model", MODELS)
def test_a_packed_sequence_knows_nothing_of_its_neighbours(model: str, results: Results) -> None:
    for name in (name for name in results if name.startswith(f"{model}-") and "bfloat16" not in name):
        packed, alone = results[name][0]["logp"], results[name][0]["logp of each alone"]
        # Some CPUs round a log-prob of -14 by 1.4e-5 between two shapes of a product: 15 float32 steps.
        torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("capacity", CUTS[1:])
def test_the_gradient_does_not_depend_on_the_micro_batches(
    model: str, capacity: int, results: Results, record_property: Callable[..., None]
) -> None:
    one = results[f"{model}-one"][0]
    cut = one[f"cut {capacity}"]
    assert cut["parts"] == {64: 2, 48: 3, 30: 4}[capacity]
    worst = difference(cut["gradients"], uncut(one))
    record_property("gradients", worst)
    assert worst <= (1e-5 if "hybrid" in model else 1e-6)  # a state adds up rounding over a whole sequence
    assert cut["metrics"]["loss"] == pytest.approx(one[f"cut {UNCUT}"]["metrics"]["loss"], abs=1e-6)


@pytest.mark.parametrize("kind", ["selective", "full", "modules", "block"])
def test_recomputation_changes_nothing(kind: str, results: Results) -> None:
    plain, recomputed = results["qwen3_moe-again"][0], results[f"qwen3_moe-recompute-{kind}"][0]
    assert difference(uncut(recomputed), uncut(plain)) == 0
    assert difference(recomputed["updated"], plain["updated"]) == 0


def test_recomputation_under_context_parallelism_changes_nothing(results: Results) -> None:
    plain, recomputed = (merged(results[f"qwen3-{name}"], uncut) for name in ("cp2", "cp2-recompute"))
    assert difference(recomputed, plain) == 0


def test_a_step_is_bitwise_repeatable(results: Results) -> None:
    first, again = results["qwen3_moe-one"][0], results["qwen3_moe-again"][0]
    assert difference(again["updated"], first["updated"]) == 0
    assert again["metrics"] == first["metrics"]


@pytest.mark.parametrize(("model", "layout"), [("llama", "dp2"), ("qwen3_moe", "ep2"), ("qwen3", "cp2")])
def test_the_distributed_optimizer_makes_the_same_update(model: str, layout: str, results: Results) -> None:
    sharded = merged(results[f"{model}-{layout}-sharded"], lambda rank: rank["updated"])
    plain = merged(results[f"{model}-{layout}"], lambda rank: rank["updated"])
    one = results[f"{model}-one"][0]
    assert difference(sharded, plain) <= 1e-6
    # Adam divides by a gradient's own size: where that is nearly 0, rounding decides the direction of a 1e-3 step.
    moved = {name: tensor - one["weights"][name] for name, tensor in one["updated"].items()}
    off = sum(float((sharded[n] - one["updated"][n]).square().sum()) for n in moved) ** 0.5
    assert off <= 1e-3 * sum(float(m.square().sum()) for m in moved.values()) ** 0.5


@pytest.mark.parametrize("layout", ["one", "tp2ep2"])
def test_an_update_leaves_the_routers_correction_bias_as_it_came(layout: str, results: Results) -> None:
    for rank in results[f"deepseek_v3-{layout}"]:
        for name in rank["updated"]:
            if "e_score_correction_bias" in name:
                assert torch.equal(rank["updated"][name], rank["weights"][name])
    names = merged(results[f"deepseek_v3-{layout}"], lambda rank: rank["updated"]).keys()
    assert sum("e_score_correction_bias" in name for name in names) == 3


@pytest.mark.parametrize("layout", ["tp2-bfloat16", "dp2-bfloat16"])
def test_bfloat16_follows_float32(layout: str, results: Results) -> None:
    one, found = results["qwen3-one"][0], results[f"qwen3-{layout}"][0]
    assert (found["logp"] - one["logp"]).abs().mean() <= 0.1
    for low, full in zip(found["metrics"], one["metrics"], strict=True):
        assert low["loss"] == pytest.approx(full["loss"], abs=0.1)
        assert low["grad_norm"] == pytest.approx(full["grad_norm"], rel=0.1)


def test_updates_lower_the_loss_and_a_refused_one_changes_nothing(results: Results) -> None:
    one = results["llama-one"][0]
    first, second = one["metrics"]
    assert second["loss"] < first["loss"] - 1
    assert one["refused"].startswith("refused at loss")
    assert (first["lr"], first["tokens"], first["micro_batches"]) == (1e-3, 100.0, 1.0)


@pytest.mark.parametrize("name", ["qwen3_moe-one", "qwen3_moe-ep2"])
def test_norms_are_exempt_from_weight_decay(name: str, results: Results) -> None:
    assert results[name][0]["weight decay"] == [(1, 0.0), (2, 0.1)]
