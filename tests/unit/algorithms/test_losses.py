"""Every loss against a float64 reference that walks over tokens, and against being cut into micro-batches."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from millrace.algorithms.aggregation import token_weights
from millrace.algorithms.losses import LossFn, policy_loss_fn, sft_loss_fn

LENGTHS = [5, 1, 12, 3, 7, 9, 2, 30]
CUTS = {
    "one": [range(8)],
    "two": [range(4), range(4, 8)],
    "four": [range(0, 2), range(2, 4), range(4, 6), range(6, 8)],
    "uneven": [[7], [2, 0, 1], [4, 6, 3], [5]],
}
KINDS = ["reinforce", "ppo", "cispo", "gspo"]
CORRECTIONS = ["none", "tis", "icepop", "sequence_mask"]
AGGREGATIONS = ["token", "sequence"]


def batch(dtype: torch.dtype, aggregation: str, seed: int = 0) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Log-probs, streams and segment ids of eight sequences; the second has no trained token, the sixth is filtered."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(LENGTHS)
    total = int(lengths.sum())
    ids = torch.arange(len(LENGTHS)).repeat_interleave(lengths)
    mask = (torch.rand(total, generator=g) < 0.8).double()
    mask[[0, *lengths.cumsum(0)[:-1].tolist()]] = 0
    mask[ids == 5] = 0

    def near(values: Tensor, by: float) -> Tensor:
        return values + by * torch.randn(total, generator=g, dtype=torch.float64)

    logp = -3 * torch.rand(total, generator=g, dtype=torch.float64) - 0.1
    streams = {
        "weight": token_weights(mask, lengths, aggregation).double(),
        "advantage": torch.randn(len(LENGTHS), generator=g, dtype=torch.float64)[ids],
        "rollout_logp": near(logp, 0.4),
        "old_logp": near(logp, 0.3),
        "reference_logp": near(logp, 0.5),
    }
    return logp.to(dtype), {name: values.to(dtype) for name, values in streams.items()}, ids


def value_and_gradient(
    loss_fn: LossFn, logp: Tensor, streams: dict[str, Tensor], ids: Tensor, cut: list
) -> tuple[dict[str, float], Tensor]:
    """Metrics and gradient, summed over the pieces of `cut`, which are trained on one after the other."""
    leaf = logp.clone().requires_grad_()
    metrics: dict[str, float] = {}
    for piece in cut:
        where = torch.cat([(ids == i).nonzero()[:, 0] for i in piece])
        loss, found = loss_fn(leaf[where], {n: v[where] for n, v in streams.items()}, ids[where])
        loss.backward()
        assert not any(value.requires_grad for value in found.values())
        assert found["loss"] == loss.detach()
        for name, value in found.items():
            metrics[name] = metrics.get(name, 0.0) + value.item()
    assert leaf.grad is not None
    return metrics, leaf.grad


VARIANTS: dict[str, Callable[[], LossFn]] = {"sft": sft_loss_fn}
for _kind, _correction in itertools.product(KINDS, CORRECTIONS):
    VARIANTS[f"{_kind}-{_correction}"] = lambda k=_kind, c=_correction: policy_loss_fn(
        k, clip_high=0.28, off_policy=c, off_policy_low=0.8, off_policy_high=1.2, kl_coefficient=0.03, mask_above=0.6
    )


@pytest.mark.parametrize("cut", ["two", "four", "uneven"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["float64", "float32"])
def test_gradient_and_metrics_do_not_depend_on_the_cut(
    dtype: torch.dtype, bound: float, variant: str, aggregation: str, cut: str
) -> None:
    logp, streams, ids = batch(dtype, aggregation)
    loss_fn = VARIANTS[variant]()
    metrics, gradient = value_and_gradient(loss_fn, logp, streams, ids, CUTS["one"])
    cut_metrics, cut_gradient = value_and_gradient(loss_fn, logp, streams, ids, CUTS[cut])
    assert gradient.norm() > 0
    assert (cut_gradient - gradient).norm() <= bound * gradient.norm()
    assert cut_metrics.keys() == metrics.keys()
    for name, value in metrics.items():
        assert cut_metrics[name] == pytest.approx(value, rel=10 * bound, abs=10 * bound), name


def reference_loss(
    logp: list[float],
    s: dict[str, list[float]],
    ids: list[int],
    kind: str,
    off_policy: str,
    *,
    low: float,
    high: float,
    clip: tuple[float, float],
    kl: float,
    mask_above: float,
) -> tuple[float, list[float]]:
    """Loss and its hand-derived gradient, one token after the other, in Python floats."""
    members: dict[int, list[int]] = {}
    for t, i in enumerate(ids):
        if s["weight"][t] > 0:
            members.setdefault(i, []).append(t)
    loss, gradient = 0.0, [0.0] * len(logp)
    for tokens in members.values():
        g = math.exp(sum(s["old_logp"][t] - s["rollout_logp"][t] for t in tokens) / len(tokens))
        s_i = math.exp(sum(logp[t] - s["old_logp"][t] for t in tokens) / len(tokens))
        for t in tokens:
            a, w = s["advantage"][t], s["weight"][t]
            r = math.exp(s["old_logp"][t] - s["rollout_logp"][t])
            inside, inside_sequence = low <= r <= high, low <= g <= high
            c = {"none": 1.0, "tis": min(r, high), "icepop": r * inside, "sequence_mask": float(inside_sequence)}[
                off_policy
            ]
            if abs(s["old_logp"][t] - s["rollout_logp"][t]) > mask_above:
                continue
            ratio = s_i if kind == "gspo" else math.exp(logp[t] - s["old_logp"][t])
            bounded = min(max(ratio, 1 - clip[0]), 1 + clip[1])
            if kind == "reinforce":
                value, slope = -a, -a
            elif kind == "cispo":
                value, slope = -bounded * a * logp[t], -bounded * a
            else:
                free = -a * ratio >= -a * bounded
                value, slope = (-a * ratio, -a * ratio) if free else (-a * bounded, 0.0)
            loss += w * c * value
            for u in tokens if kind == "gspo" else [t]:
                gradient[u] += w * c * slope / (len(tokens) if kind == "gspo" else 1)
            d = s["reference_logp"][t] - logp[t]
            loss += kl * w * (math.exp(d) - d - 1)
            gradient[t] += kl * w * (1 - math.exp(d))
    return loss, gradient


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("off_policy", CORRECTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_policy_loss_equals_the_token_by_token_reference(kind: str, off_policy: str, aggregation: str) -> None:
    logp, streams, ids = batch(torch.float64, aggregation, seed=1)
    loss_fn = policy_loss_fn(
        kind,
        clip_low=0.2,
        clip_high=0.28,
        off_policy=off_policy,
        off_policy_low=0.9,
        off_policy_high=1.1,
        kl_coefficient=0.03,
        mask_above=0.6,
    )
    metrics, gradient = value_and_gradient(loss_fn, logp, streams, ids, CUTS["one"])
    loss, expected = reference_loss(
        logp.tolist(),
        {name: values.tolist() for name, values in streams.items()},
        ids.tolist(),
        kind,
        off_policy,
        low=0.9,
        high=1.1,
        clip=(0.2, 0.28),
        kl=0.03,
        mask_above=0.6,
    )
    assert metrics["loss"] == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-15)
    if off_policy in ("icepop", "sequence_mask"):
        assert 0 < metrics["mismatch/masked"] < 1
    if kind != "reinforce":
        assert 0 < metrics["clip_fraction"] < 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_on_policy_every_kind_has_the_gradient_of_reinforce(kind: str, aggregation: str) -> None:
    logp, streams, ids = batch(torch.float64, aggregation)
    del streams["old_logp"]
    _, gradient = value_and_gradient(policy_loss_fn(kind), logp, streams, ids, CUTS["one"])
    torch.testing.assert_close(gradient, -streams["weight"] * streams["advantage"], rtol=1e-12, atol=1e-15)


def test_sft_loss_is_the_mean_negative_log_likelihood_of_trained_tokens() -> None:
    logp, streams, ids = batch(torch.float64, "token")
    metrics, gradient = value_and_gradient(sft_loss_fn(), logp, streams, ids, CUTS["one"])
    trained = streams["weight"] > 0
    assert metrics == {"loss": pytest.approx(-logp[trained].mean().item(), rel=1e-6)}
    torch.testing.assert_close(gradient, -streams["weight"])


def test_golden_loss_of_two_tokens() -> None:
    logp = torch.tensor([0.0, -1.0, -2.0], dtype=torch.float64, requires_grad=True)
    streams = {
        "weight": torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64),
        "advantage": torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64),
        "rollout_logp": torch.tensor([0.0, -1.0, -1.5], dtype=torch.float64),
        "reference_logp": torch.tensor([0.0, -1.0, -1.0], dtype=torch.float64),
    }
    loss_fn = policy_loss_fn("ppo", off_policy="tis", off_policy_high=2.0, kl_coefficient=0.1)
    loss, metrics = loss_fn(logp, streams, torch.zeros(3, dtype=torch.int64))
    kl = 0.5 * (math.e - 2)
    assert loss.item() == pytest.approx(0.5 * -1 + 0.5 * math.exp(-0.5) + 0.1 * kl)
    assert metrics["kl"].item() == pytest.approx(kl)
    assert metrics["mismatch/mean"].item() == pytest.approx(0.25)
    assert metrics["mismatch/masked"].item() == 0
    assert metrics["clip_fraction"].item() == 0


def test_tokens_above_the_mismatch_bound_lose_loss_and_kl_but_stay_in_the_denominator() -> None:
    logp, streams, ids = batch(torch.float64, "token")
    streams["rollout_logp"] = streams["old_logp"].clone()
    outlier = int((streams["weight"] > 0).nonzero()[3])
    streams["rollout_logp"][outlier] -= 2.0
    _, with_all = value_and_gradient(policy_loss_fn("ppo", kl_coefficient=0.1), logp, streams, ids, CUTS["one"])
    metrics, masked = value_and_gradient(
        policy_loss_fn("ppo", kl_coefficient=0.1, mask_above=1.0), logp, streams, ids, CUTS["one"]
    )
    assert masked[outlier] == 0
    masked[outlier] = with_all[outlier]
    assert torch.equal(masked, with_all)
    assert metrics["mismatch/masked"] == pytest.approx(streams["weight"][outlier].item())


@pytest.mark.parametrize("variant", VARIANTS)
def test_untrained_tokens_with_absurd_log_probs_do_no_harm(variant: str) -> None:
    logp, streams, ids = batch(torch.float32, "token")
    _, gradient = value_and_gradient(VARIANTS[variant](), logp, streams, ids, CUTS["one"])
    untrained = streams["weight"] == 0
    logp[untrained], streams["reference_logp"][untrained] = -1e4, 0.0
    streams["rollout_logp"][untrained], streams["old_logp"][untrained] = -1e4, -2e4
    metrics, absurd = value_and_gradient(VARIANTS[variant](), logp, streams, ids, CUTS["one"])
    assert torch.equal(absurd, gradient)
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_padding_micro_batch_gives_zero_loss_and_zero_gradient(variant: str) -> None:
    logp = torch.full((4,), -1.0, requires_grad=True)
    streams = {n: torch.zeros(4) for n in ("weight", "advantage", "rollout_logp", "old_logp", "reference_logp")}
    loss, metrics = VARIANTS[variant]()(logp, streams, torch.zeros(4, dtype=torch.int64))
    loss.backward()
    assert torch.equal(logp.grad, torch.zeros(4))
    assert all(value == 0 for value in metrics.values())
