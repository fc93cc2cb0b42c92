"""MOPD's loss and gradient on Megatron-Core ranks, each signal, against float64 transformers models on one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import distillation_reference as reference
import pytest
import torch
from distillation_reference import TAUGHT, TEACHERS, TOP_K
from ranks import launch
from tiny_checkpoints import write_checkpoint
from torch import Tensor

from millrace.ports import free_port

SIGNALS: dict[str, tuple[str, str, int]] = {
    "sampled": ("sampled", "", 0),
    "full": ("full", "", 0),
    "full, one sequence": ("full", "", 0),
    "top_k student": ("top_k", "student", TOP_K),
    "top_k teacher": ("top_k", "teacher", TOP_K),
    "top_k all": ("full", "", 0),
    "top_k more than one rank's": ("top_k", "teacher", 200),
}
"""What a worker computes -> the signal, support and k of the reference."""
UNCUT, CUT = 4096, 40
"""Tokens of a micro-batch: one holds all sequences, or several are needed."""
LAYOUTS: dict[str, tuple[str, dict[str, Any], int]] = {
    "one": ("qwen3", {}, UNCUT),
    "one-cut": ("qwen3", {}, CUT),
    "tp2": ("qwen3", {"tp": 2}, UNCUT),
    "tp2-sp": ("qwen3", {"tp": 2, "sequence_parallel": True}, CUT),
    "pp2": ("qwen3", {"pp": 2}, CUT),
    "dp2": ("qwen3", {"dp": 2}, CUT),
    "ep2": ("qwen3_moe", {"dp": 2, "ep": 2}, CUT),
    "cp2": ("qwen3", {"cp": 2}, CUT),
}
BOUND = 1e-5


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """A student and two teachers of either family."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        family: {
            name: write_checkpoint(family, root / family / name, seed=seed, num_hidden_layers=2)
            for seed, name in enumerate(("student", *TEACHERS))
        }
        for family in ("qwen3", "qwen3_moe")
    }


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, dict[str, Path]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of each family the batch's file and each signal's loss, gradient and reverse KLs, in float64."""
    found: dict[str, Any] = {}
    for family, paths in checkpoints.items():
        student, *teachers = (reference.load(path) for path in paths.values())
        batch = reference.make_batch(student)
        file = tmp_path_factory.mktemp(family) / "batch.pt"
        torch.save(batch, file)
        found[family] = {"batch": str(file)}
        for name, (signal, support, k) in SIGNALS.items():
            trained_on = batch.select([1]) if "one sequence" in name else batch
            loss, reverse_kl = reference.loss(student, teachers, trained_on, signal, support, k)
            gradients = reference.gradients(student, loss)
            found[family][name] = {"loss": loss.item(), "reverse_kl": reverse_kl, "gradients": gradients}
    return found


@pytest.fixture(scope="module")
def results(
    checkpoints: dict[str, dict[str, Path]], expected: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """Two launches for all layouts."""
    found = {}
    for world in (1, 2):
        folder = tmp_path_factory.mktemp(f"ranks-{world}")
        cases = [
            {
                "name": name,
                "parallel": parallel,
                "capacity": capacity,
                "checkpoints": {key: str(path) for key, path in checkpoints[family].items()},
                "batch": expected[family]["batch"],
                "port": free_port(),
            }
            for name, (family, parallel, capacity) in LAYOUTS.items()
            if (2 if parallel else 1) == world
        ]
        (folder / "cases.json").write_text(json.dumps(cases))
        arguments = [str(folder / "cases.json"), str(folder)]
        launch(Path(__file__).with_name("distillation_worker.py"), world, arguments, 300)
        for case in cases:
            files = [folder / f"{case['name']}-{rank}.pt" for rank in range(world)]
            found[case["name"]] = [torch.load(file, weights_only=False) for file in files]
    return found


def merged(ranks: list[dict[str, Any]], signal: str) -> dict[str, Tensor]:
    return {name: tensor for rank in ranks for name, tensor in rank["signals"][signal]["gradients"].items()}


def difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Largest norm(found - wanted) / norm(wanted) of any tensor."""
    assert found.keys() == wanted.keys()
    return max(float((found[name].double() - tensor).norm() / tensor.norm()) for name, tensor in wanted.items())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("signal", SIGNALS)
def test_loss_and_gradient_are_those_of_the_paper_in_float64(
    signal: str, layout: str, expected: dict[str, Any], results: dict[str, Any], record_property: Any
) -> None:
    wanted = expected[LAYOUTS[layout][0]][signal]
    gradients = difference(merged(results[layout], signal), wanted["gradients"])
    metrics = results[layout][0]["signals"][signal]["metrics"]
    loss = abs(metrics["loss"] - wanted["loss"]) / abs(wanted["loss"])
    record_property("loss", loss)
    record_property("gradients", gradients)
    assert loss <= BOUND and gradients <= BOUND
    for name, reverse_kl in wanted["reverse_kl"].items():
        assert metrics[f"reverse_kl/{name}"] / metrics[f"taught/{name}"] == pytest.approx(reverse_kl, rel=BOUND)
    assert all(rank["signals"][signal]["metrics"] == metrics for rank in results[layout])


def test_the_signals_differ_and_a_gate_is_at_work(expected: dict[str, Any], results: dict[str, Any]) -> None:
    wanted = expected["qwen3"]
    names = ["sampled", "full", "top_k student", "top_k teacher", "top_k more than one rank's"]
    for number, one in enumerate(names):
        for other in names[number + 1 :]:
            assert difference(wanted[one]["gradients"], wanted[other]["gradients"]) > 100 * BOUND
    for signal in names:
        metrics = results["tp2"][0]["signals"][signal]["metrics"]
        assert 0.1 < metrics["mismatch/masked"] < 0.4
        shares = [metrics[f"taught/{name}"] for name in TEACHERS]
        assert shares == pytest.approx([TAUGHT.count(number) / len(TAUGHT) for number in (1, 2)])
        assert metrics["entropy"] > 0


@pytest.mark.parametrize("layout", ["one", "tp2", "tp2-sp"])
def test_a_support_of_the_whole_vocabulary_is_the_full_signal(
    layout: str, results: dict[str, Any], record_property: Any
) -> None:
    """Up to float32's rounding, since the two add up in another order; the unit tests have 1e-12 in float64."""
    ranks = results[layout]
    gradients = difference(merged(ranks, "top_k all"), merged(ranks, "full"))
    record_property("gradients", gradients)
    assert gradients <= BOUND
    losses = [ranks[0]["signals"][signal]["metrics"]["loss"] for signal in ("top_k all", "full")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_teacher_in_the_students_own_module_gives_the_states_of_a_resident_one(
    layout: str, results: dict[str, Any]
) -> None:
    assert all(rank["apart"] <= 1e-5 for rank in results[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_teacher_keeps_the_states_of_its_own_trained_tokens(layout: str, results: dict[str, Any]) -> None:
    kept = [sum(sum(len(h) for h in rank["states"][n]) for rank in results[layout]) for n in range(len(TEACHERS))]
    answers = [length - prompt for length, prompt in zip(reference.LENGTHS, reference.PROMPTS, strict=True)]
    wanted = [sum(n for n, by in zip(answers, TAUGHT, strict=True) if by == teacher) for teacher in (1, 2)]
    copies = LAYOUTS[layout][1].get("tp", 1)
    assert kept == [copies * n for n in wanted]


@pytest.mark.parametrize("layout", ["one", "tp2", "ep2"])
def test_a_resident_teachers_head_is_not_copied_and_a_swapped_ones_is(layout: str, results: dict[str, Any]) -> None:
    assert all(rank["only swapped heads are copied"] for rank in results[layout])
