import math

import pytest
import torch

from millrace.algorithms.kl import kl_estimate, kl_loss


def test_golden_values() -> None:
    train, reference = torch.tensor([-1.0], dtype=torch.float64), torch.tensor([-1.5], dtype=torch.float64)
    assert kl_estimate(train, reference, "k1").item() == pytest.approx(0.5)
    assert kl_estimate(train, reference, "k2").item() == pytest.approx(0.125)
    assert kl_estimate(train, reference, "k3").item() == pytest.approx(math.exp(-0.5) + 0.5 - 1)


def test_k3_keeps_its_digits_where_the_policies_nearly_agree() -> None:
    train, reference = torch.tensor([-1.0]), torch.tensor([-1.0 + 2**-12])
    assert kl_estimate(train, reference, "k3").item() == pytest.approx(0.5 * 2.0**-24, rel=1e-3)


def policies() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(7, generator=g, dtype=torch.float64).requires_grad_()
    return logits, torch.randn(7, generator=g, dtype=torch.float64).log_softmax(0)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased_under_the_policy(estimator: str) -> None:
    logits, reference = policies()
    train = logits.log_softmax(0)
    expected = (train.exp() * kl_estimate(train, reference, estimator)).sum()
    torch.testing.assert_close(expected, (train.exp() * (train - reference)).sum())


@pytest.mark.parametrize("estimator, forward", [("k1", False), ("k2", False), ("k3", True)])
def test_the_expected_gradient_of_each_loss_is_that_of_the_kl_it_claims(estimator: str, forward: bool) -> None:
    logits, reference = policies()
    train = logits.log_softmax(0)
    kl = (reference.exp() * (reference - train)).sum() if forward else (train.exp() * (train - reference)).sum()
    (claimed,) = torch.autograd.grad(kl, logits, retain_graph=True)
    # The exact expectation over sampled tokens: probabilities are constants, as in sampling.
    loss = (train.detach().exp() * kl_loss(train, reference, estimator)).sum()
    (found,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(found, claimed)
