"""The losses that a trainer runs: advantage x ratio and clip x off-policy correction x aggregation, plus KL.

A loss function takes the log-probs of a packed micro-batch and its streams (legend: T tokens) and returns a scalar to
minimise and metrics. Both are sums over tokens, weighted by the stream `weight`, which holds the global denominator
already: summed over micro-batches and data-parallel ranks they are those of the whole batch.

    loss = sum_t weight_t keep_t (correction_t policy_loss_t + coefficient kl_t)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from millrace.algorithms.kl import Estimator, kl_loss
from millrace.algorithms.off_policy import Correction, correction
from millrace.algorithms.policy_loss import cispo, gspo, ppo_clip, reinforce

PolicyLoss = Literal["reinforce", "ppo", "cispo", "gspo"]


class LossFn(Protocol):
    def __call__(
        self, logp: Tensor, streams: Mapping[str, Tensor], segment_ids: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (scalar, with gradient) and metrics (scalars, without) of tokens with log-probs `logp` [T].

        `streams` are [T] each; `segment_ids` [T] tell the sequences apart, none of which is cut.
        """
        ...


def sft_loss_fn() -> LossFn:
    """Negative log-likelihood: -sum(weight * logp). Streams: `weight`."""
    return _negative_log_likelihood


def policy_loss_fn(
    kind: PolicyLoss = "reinforce",
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    off_policy: Correction = "none",
    off_policy_low: float = 0.5,
    off_policy_high: float = 2.0,
    kl_coefficient: float = 0.0,
    kl_estimator: Estimator = "k3",
    mask_above: float | None = None,
) -> LossFn:
    """A policy-gradient loss out of its parts; `algorithms.policy_loss`, `off_policy` and `kl` define each.

    Streams: `weight`, `advantage`, `rollout_logp`; `old_logp` (log-probs before the batch's first update; absent: this
    is the first, and they are `logp` itself); `reference_logp` with a KL coefficient.

    Args:
        mask_above: tokens whose |log p_train - log p_rollout| exceeds it get weight 0; they still count in the
            denominator.

    Metrics (means over the batch, as weighted by `weight`): `loss`; `mismatch/mean`, the |log p_train - log p_rollout|;
    `mismatch/masked`, the share of tokens that the correction or `mask_above` leaves out; `clip_fraction`, with a
    clipped kind; `kl`, with a coefficient.
    """
    return _PolicyLossFn(
        kind,
        clip_low,
        clip_high,
        off_policy,
        off_policy_low,
        off_policy_high,
        kl_coefficient,
        kl_estimator,
        mask_above,
    )


def _negative_log_likelihood(
    logp: Tensor, streams: Mapping[str, Tensor], segment_ids: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    weight = streams["weight"]
    loss = -(weight * torch.where(weight != 0, logp, 0.0)).sum()
    return loss, {"loss": loss.detach()}


@dataclass(frozen=True)
class _PolicyLossFn:
    kind: PolicyLoss
    clip_low: float
    clip_high: float
    off_policy: Correction
    off_policy_low: float
    off_policy_high: float
    kl_coefficient: float
    kl_estimator: Estimator
    mask_above: float | None

    def __call__(
        self, logp: Tensor, streams: Mapping[str, Tensor], segment_ids: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        weight = streams["weight"]
        sampled = weight != 0
        # Tokens that are not trained on are set to 0: an exp of their differences may overflow, and 0 * inf is nan.
        logp = torch.where(sampled, logp, 0.0)
        before = torch.where(sampled, streams["old_logp"], 0.0) if "old_logp" in streams else logp.detach()
        rollout_logp = torch.where(sampled, streams["rollout_logp"], 0.0)

        corrected = correction(
            before,
            rollout_logp,
            self.off_policy,
            low=self.off_policy_low,
            high=self.off_policy_high,
            segment_ids=segment_ids,
            mask=sampled,
        )
        difference = (before - rollout_logp).abs()
        keep = torch.ones_like(weight) if self.mask_above is None else (difference <= self.mask_above).to(weight.dtype)
        policy, clipped = self._policy_loss(logp, before, streams["advantage"], segment_ids, sampled)
        loss = (weight * keep * corrected * policy).sum()
        metrics = {}
        if self.kl_coefficient:
            reference_logp = torch.where(sampled, streams["reference_logp"], 0.0)
            kl = (weight * keep * kl_loss(logp, reference_logp, self.kl_estimator)).sum()
            loss = loss + self.kl_coefficient * kl
            metrics["kl"] = kl.detach()

        metrics["loss"] = loss.detach()
        metrics["mismatch/mean"] = (weight * difference).sum()
        metrics["mismatch/masked"] = (weight * (keep * corrected == 0)).sum()
        if self.kind != "reinforce":
            metrics["clip_fraction"] = (weight * clipped).sum()
        return loss, metrics

    def _policy_loss(
        self, logp: Tensor, old_logp: Tensor, advantage: Tensor, segment_ids: Tensor, sampled: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.kind == "reinforce":
            return reinforce(logp, advantage)
        clip = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        if self.kind == "ppo":
            return ppo_clip(logp, old_logp, advantage, **clip)
        if self.kind == "cispo":
            return cispo(logp, old_logp, advantage, **clip)
        return gspo(logp, old_logp, advantage, **clip, segment_ids=segment_ids, mask=sampled)
