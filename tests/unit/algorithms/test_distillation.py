"""MOPD's loss: golden numbers, the gate, the clip, mixing with rewards, cuts, and what the two forms have in common."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from millrace.algorithms.aggregation import token_weights
from millrace.algorithms.distillation import mopd_loss_fn, sampled_advantage
from millrace.algorithms.losses import policy_loss_fn

LENGTHS = [5, 1, 12, 3, 7, 9, 2, 30]
TAUGHT = [1, 2, 0, 2, 1, 0, 2, 1]
CUTS = {
    "two": [range(4), range(4, 8)],
    "four": [range(0, 2), range(2, 4), range(4, 6), range(6, 8)],
    "uneven": [[7], [2, 0, 1], [4, 6, 3], [5]],
}
SIGNALS = ["sampled", "full"]


def batch(aggregation: str = "sequence") -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Log-probs, streams and segment ids of eight sequences of two teachers and of rewards, some tokens out of band."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.tensor(LENGTHS)
    ids = torch.arange(len(LENGTHS)).repeat_interleave(lengths)
    mask = (torch.rand(len(ids), generator=g) < 0.8).double()
    mask[[0, *lengths.cumsum(0)[:-1].tolist()]] = 0
    logp = -3 * torch.rand(len(ids), generator=g, dtype=torch.float64) - 0.1
    noise = [torch.randn(len(ids), generator=g, dtype=torch.float64) for _ in range(3)]
    streams = {
        "weight": token_weights(mask, lengths, aggregation).double(),
        "rollout_logp": logp + 0.5 * noise[0],
        "taught": torch.tensor(TAUGHT, dtype=torch.float64)[ids],
        "advantage": noise[1],
        "teacher_logp": logp + noise[2],
        "divergence": noise[2].square(),
    }
    return logp, streams, ids


def run(
    loss_fn, logp: Tensor, streams: dict[str, Tensor], ids: Tensor, cut=(range(8),)
) -> tuple[dict[str, float], Tensor, Tensor]:
    """Metrics and the gradients of `logp` and `divergence`, summed over the pieces of `cut`."""
    leaves = logp.clone().requires_grad_(), streams["divergence"].clone().requires_grad_()
    metrics: dict[str, float] = {}
    for piece in cut:
        where = torch.cat([(ids == i).nonzero()[:, 0] for i in piece])
        part = {n: v[where] for n, v in {**streams, "divergence": leaves[1]}.items()}
        loss, found = loss_fn(leaves[0][where], part, ids[where])
        loss.backward()
        assert not any(value.requires_grad for value in found.values())
        for name, value in found.items():
            metrics[name] = metrics.get(name, 0.0) + value.item()
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    return metrics, gradients[0], gradients[1]


def tokens(**streams: list[float]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    given = {name: torch.tensor(values, dtype=torch.float64) for name, values in streams.items()}
    logp = given.pop("logp")
    return logp.requires_grad_(), given, torch.zeros(len(logp), dtype=torch.int64)


def test_golden_numbers_of_the_sampled_form() -> None:
    """A prompt token, one in band at r = 1.5, one out at r = 3, one out at r = 0.25, one of a reward at r = 1."""
    train = [0.0, math.log(0.6), math.log(0.6), math.log(0.1), math.log(0.5)]
    logp, streams, ids = tokens(
        logp=train,
        weight=[0, 0.25, 0.25, 0.25, 0.25],
        rollout_logp=[-9, math.log(0.4), math.log(0.2), math.log(0.4), math.log(0.5)],
        taught=[1, 1, 2, 2, 0],
        teacher_logp=[-9, math.log(0.9), math.log(0.9), math.log(0.2), 0],
        advantage=[0, 9, 9, 9, -2],
    )
    loss, metrics = mopd_loss_fn("sampled", teachers=["math", "chat"])(logp, streams, ids)
    from_teacher = 0.25 * 1.5 * math.log(1.5)
    assert loss.item() == pytest.approx(-from_teacher * math.log(0.6) + 0.25 * 2 * math.log(0.5))
    loss.backward()
    assert logp.grad.tolist() == pytest.approx([0, -from_teacher, 0, 0, 0.25 * 2])
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {
            "loss": loss.item(),
            "mismatch/mean": 0.25 * (math.log(1.5) + math.log(3) + math.log(4)),
            "mismatch/masked": 0.5,
            "reverse_kl/math": -0.25 * math.log(1.5),
            "taught/math": 0.25,
            "reverse_kl/chat": -0.25 * (math.log(1.5) + math.log(2)),
            "taught/chat": 0.5,
        }
    )


def test_golden_numbers_of_the_distribution_form() -> None:
    logp, streams, ids = tokens(
        logp=[0.0, math.log(0.6), math.log(0.6), math.log(0.5)],
        weight=[0, 0.5, 0.25, 0.25],
        rollout_logp=[-9, math.log(0.4), math.log(0.2), math.log(0.4)],
        taught=[1, 1, 1, 0],
        divergence=[math.inf, 0.3, 0.7, math.nan],
        advantage=[0, 9, 9, -2],
    )
    divergence = streams["divergence"].requires_grad_()
    loss, metrics = mopd_loss_fn("top_k", teachers=["math"])(logp, streams, ids)
    assert loss.item() == pytest.approx(0.5 * 0.3 + 0.25 * 1.25 * 2 * math.log(0.5))
    loss.backward()
    assert divergence.grad.tolist() == [0, 0.5, 0, 0]
    assert logp.grad.tolist() == pytest.approx([0, 0, 0, 0.25 * 1.25 * 2])
    assert metrics["reverse_kl/math"].item() == pytest.approx(0.5 * 0.3 + 0.25 * 0.7)
    assert metrics["taught/math"].item() == 0.75


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("aggregation", ["token", "sequence"])
@pytest.mark.parametrize("cut", CUTS)
def test_gradient_and_metrics_do_not_depend_on_the_cut(cut: str, aggregation: str, signal: str) -> None:
    inputs, loss_fn = batch(aggregation), mopd_loss_fn(signal, advantage_clip=1.5, teachers=["math", "chat"])
    metrics, *gradients = run(loss_fn, *inputs)
    cut_metrics, *cut_gradients = run(loss_fn, *inputs, CUTS[cut])
    torch.testing.assert_close(cut_gradients, gradients, rtol=1e-12, atol=1e-15)
    assert cut_metrics == pytest.approx(metrics, rel=1e-12)
    assert 0 < metrics["mismatch/masked"] < 1 and gradients[0].norm() > 0


@pytest.mark.parametrize("signal", SIGNALS)
def test_a_token_out_of_band_has_no_gradient_and_leaves_all_other_weights_as_they_are(signal: str) -> None:
    logp, streams, ids = batch()
    loss_fn = mopd_loss_fn(signal, ratio_low=0.5, ratio_high=2.0, teachers=["math", "chat"])
    streams["rollout_logp"] = logp - math.log(1.9)
    before, *inside = run(loss_fn, logp, streams, ids)
    token = int(((streams["weight"] > 0) & (streams["taught"] == 1)).nonzero()[2])
    for out_of_band in (2.1, 0.49):
        streams["rollout_logp"][token] = logp[token] - math.log(out_of_band)
        after, *gated = run(loss_fn, logp, streams, ids)
        for one, other in zip(inside, gated, strict=True):
            assert other[token] == 0
            assert torch.equal(
                torch.cat([one[:token], one[token + 1 :]]), torch.cat([other[:token], other[token + 1 :]])
            )
        assert before["mismatch/masked"] == 0
        assert after["mismatch/masked"] == pytest.approx(streams["weight"][token].item())
        assert after["taught/math"] == before["taught/math"]


def test_a_ratio_in_band_scales_the_sampled_gradient_and_not_the_divergence() -> None:
    logp, streams, ids = batch()
    streams["rollout_logp"] = logp.clone()
    scaled = {**streams, "rollout_logp": logp - math.log(1.6)}
    for signal, number, factor in (("sampled", 0, 1.6), ("full", 1, 1.0)):
        loss_fn = mopd_loss_fn(signal, teachers=["math", "chat"])
        on_policy, off_policy = run(loss_fn, logp, streams, ids)[1:], run(loss_fn, logp, scaled, ids)[1:]
        assert on_policy[number].norm() > 0
        torch.testing.assert_close(off_policy[number], factor * on_policy[number])


def test_the_clip_bounds_the_advantage_but_not_the_reported_reverse_kl() -> None:
    logp, streams, ids = batch()
    streams["rollout_logp"] = logp.clone()
    free, clipped = (
        run(mopd_loss_fn("sampled", advantage_clip=clip, teachers=["math", "chat"]), logp, streams, ids)
        for clip in (None, 0.5)
    )
    taught = streams["taught"] > 0
    advantage = (streams["teacher_logp"] - logp).clamp(-0.5, 0.5)
    torch.testing.assert_close(clipped[1][taught], (-streams["weight"] * advantage)[taught])
    torch.testing.assert_close(clipped[1][~taught], free[1][~taught])
    assert clipped[0]["reverse_kl/math"] == free[0]["reverse_kl/math"]
    golden = sampled_advantage(torch.tensor([0.0, -3.0, -0.2]), torch.tensor([-1.0, -0.5, -0.1]), clip=0.5)
    assert golden.tolist() == pytest.approx([0.5, -0.5, -0.1])


@pytest.mark.parametrize("signal", SIGNALS)
def test_a_batch_without_teachers_is_gated_reinforce(signal: str) -> None:
    logp, streams, ids = batch()
    streams["taught"] = torch.zeros_like(logp)
    _, gradient, _ = run(mopd_loss_fn(signal, teachers=["math"]), logp, streams, ids)
    leaf = logp.clone().requires_grad_()
    policy_loss_fn("reinforce", off_policy="icepop")(leaf, streams, ids)[0].backward()
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("signal", SIGNALS)
def test_mixed_tokens_have_the_gradients_they_have_alone(signal: str) -> None:
    logp, streams, ids = batch()
    loss_fn = mopd_loss_fn(signal, teachers=["math", "chat"])
    _, *mixed = run(loss_fn, logp, streams, ids)
    alone = [torch.zeros_like(logp), torch.zeros_like(logp)]
    for number in (0, 1, 2):
        only = {**streams, "weight": streams["weight"] * (streams["taught"] == number)}
        _, *found = run(loss_fn, logp, only, ids)
        alone = [total + part for total, part in zip(alone, found, strict=True)]
    torch.testing.assert_close(mixed, alone, rtol=1e-12, atol=1e-15)


def test_the_full_gradient_is_the_expectation_of_the_sampled_one_over_what_the_engine_draws() -> None:
    """All of a small vocabulary is drawn, each token as often as the engine would; the ratio takes the engine out."""
    g = torch.Generator().manual_seed(5)
    logits, theirs, noise = (torch.randn(11, generator=g, dtype=torch.float64) for _ in range(3))
    logits.requires_grad_()
    log_p, log_q = logits.log_softmax(-1), theirs.log_softmax(-1)
    rollout_logp = (logits.detach() + 0.3 * noise).log_softmax(-1)
    streams = {
        "weight": rollout_logp.exp(),
        "rollout_logp": rollout_logp,
        "taught": torch.ones(11),
        "advantage": torch.zeros(11),
        "teacher_logp": log_q,
    }
    wide = {"ratio_low": 0.01, "ratio_high": 100.0, "teachers": ["math"]}
    expectation, _ = mopd_loss_fn("sampled", **wide)(log_p, streams, torch.zeros(11, dtype=torch.int64))
    (expected,) = torch.autograd.grad(expectation, logits, retain_graph=True)

    one = {name: torch.zeros(1, dtype=torch.float64) for name in ("rollout_logp", "advantage")}
    one |= {"weight": torch.ones(1, dtype=torch.float64), "taught": torch.ones(1)}
    one["divergence"] = (log_p.exp() * (log_p - log_q)).sum()[None]
    full, _ = mopd_loss_fn("full", **wide)(torch.zeros(1, dtype=torch.float64), one, torch.zeros(1, dtype=torch.int64))
    (found,) = torch.autograd.grad(full, logits)
    assert found.norm() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("signal", SIGNALS)
def test_a_padding_micro_batch_gives_zeros(signal: str) -> None:
    names = ("weight", "rollout_logp", "taught", "advantage", "teacher_logp", "divergence")
    logp = torch.full((1,), -1.0, requires_grad=True)
    loss, metrics = mopd_loss_fn(signal, teachers=["math"])(
        logp, {n: torch.zeros(1) for n in names}, torch.zeros(1).long()
    )
    loss.backward()
    assert logp.grad.tolist() == [0]
    assert all(value == 0 for value in metrics.values())
