"""Policies whose linears emulate FP8, on two ranks: what is emulated, at which layouts, and through a resume."""

from pathlib import Path

import pytest
import torch
from ranks import launch
from tiny_checkpoints import write_checkpoint

FAMILIES = ("qwen3", "qwen3_moe", "deepseek_v3", "nemotron_h")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8")
    for family in FAMILIES:
        more = {"hybrid_override_pattern": "ME*M"} if family == "nemotron_h" else {}
        write_checkpoint(family, folder / family, seed=1, **more)
    launch(Path(__file__).with_name("fp8_worker.py"), 2, [str(folder)])
    return torch.load(folder / "found.pt")


def test_every_recipe_changes_log_probs_a_little_and_still_learns(found):
    exact, plain_losses = found["recipes"]["none"]
    for name in ("delayed", "tensorwise", "blockwise", "mxfp8"):
        logp, losses = found["recipes"][name]
        mismatch = (logp - exact).abs().mean()
        assert 1e-4 < mismatch < 0.5, f"{name}: mean difference of log-probs {mismatch}"
        assert losses == pytest.approx(plain_losses, abs=0.2), name
        assert losses != plain_losses and losses[-1] < losses[0] - 1, name


def test_delayed_scales_are_those_of_the_whole_tensors_at_every_layout(found):
    losses, state = found["layouts"]["dp2"]
    for name, (other_losses, other) in found["layouts"].items():
        assert other["names"] == state["names"], name
        torch.testing.assert_close(other["values"][..., -1], state["values"][..., -1], rtol=1e-5, atol=0, msg=name)
        torch.testing.assert_close(other["scales"], state["scales"], rtol=0.05, atol=0, msg=name)
        assert other_losses == pytest.approx(losses, rel=5e-3), name


def test_a_resumed_run_goes_on_bit_for_bit_and_would_not_without_its_history(found):
    runs = found["resume"]
    (losses, weights, state), (again, weights_again, state_again) = runs["at once"], runs["resumed"]
    assert again == losses
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights) and weights
    assert torch.equal(state["values"], state_again["values"]) and torch.equal(state["scales"], state_again["scales"])
    assert runs["without its history"][0] != losses


def test_a_history_is_taken_to_another_layout(found):
    losses, _, state = found["resume"]["at once"]
    moved_losses, _, moved = found["resume"]["at another layout"]
    assert moved_losses == pytest.approx(losses, rel=5e-3)
    torch.testing.assert_close(moved["values"][..., -1], state["values"][..., -1], rtol=0, atol=0)


def test_what_is_computed_again_has_the_scale_it_had_at_first(found):
    (losses, weights), (again, weights_again) = found["recompute"]["none"], found["recompute"]["full"]
    assert again == losses and all(torch.equal(weights[name], weights_again[name]) for name in weights)


def test_log_prob_passes_leave_no_trace_and_a_new_stage_begins_afresh(found):
    traces = found["traces"]
    assert torch.equal(traces["before"], traces["after"]) and traces["before"][..., 0].min() > 0
    assert not traces["seen"].any()
    values, scales = traces["new stage"]
    assert not values.any() and (scales == 1).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_a_layer_is_emulated_but_for_routers(found, family):
    covered = found["covered"][family]
    left = set(covered["matrices"]) - set(covered["emulated"])
    assert set(covered["emulated"]) <= set(covered["matrices"])
    assert all("router" in name for name in left), sorted(left)
    assert torch.isfinite(torch.tensor(covered["loss"])).all()


def test_layers_at_the_edges_stay_as_they_are(found):
    each = len(found["covered"]["qwen3"]["emulated"]) // 4
    assert found["covered"]["first"] == 3 * each and found["covered"]["last"] == 2 * each


def test_adapters_are_trained_on_an_emulated_base(found):
    assert found["lora"]["tensorwise"][0] != found["lora"]["none"][0]
    assert found["lora"]["tensorwise"] == pytest.approx(found["lora"]["none"], rel=0.1)
    assert found["lora"]["tensorwise"][-1] < found["lora"]["tensorwise"][0]
