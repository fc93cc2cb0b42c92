"""Estimators of KL(pi_train || pi_reference) from the sampled tokens, and the loss each one makes.

With d = log pi_reference(t) - log pi_train(t) of a token t sampled by pi_train (Schulman, "Approximating KL
divergence", 2020):

    k1 = -d                 unbiased, of either sign
    k2 = d^2 / 2            biased, never negative, low variance
    k3 = exp(d) - d - 1     unbiased, never negative, low variance

An unbiased value is not an unbiased gradient (Tang and Munos, arXiv 2506.09477). Differentiated as they stand,

    grad k1 = grad log pi               zero in expectation: no penalty at all
    grad k2 = -d grad log pi            the gradient of KL(pi_train || pi_reference)
    grad k3 = (1 - exp(d)) grad log pi  that of KL(pi_reference || pi_train) in expectation; GRPO's choice

so that k2 and k3 are differentiated, while k1 is used as PPO uses it, as a penalty on the reward: sg[k1] grad log pi,
again the gradient of KL(pi_train || pi_reference).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]


def kl_estimate(train_logp: Tensor, reference_logp: Tensor, estimator: Estimator) -> Tensor:
    """The estimator's value for each token, [T], in nats."""
    d = reference_logp - train_logp
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d.square() / 2
    return torch.expm1(d) - d


def kl_loss(train_logp: Tensor, reference_logp: Tensor, estimator: Estimator) -> Tensor:
    """The estimator's value for each token, [T], with the gradient that the module's docstring gives."""
    if estimator == "k1":
        penalty = kl_estimate(train_logp.detach(), reference_logp, "k1")
        return penalty * torch.exp(train_logp - train_logp.detach())
    return kl_estimate(train_logp, reference_logp, estimator)
