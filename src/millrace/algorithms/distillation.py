"""Multi-domain on-policy distillation (MOPD): the student's own answers, each judged token by token by one teacher.

For an answer y sampled by the engine and the state s_t = (prompt, y_<t) before its token t (Nemotron-Cascade 2, arXiv
2603.19220, equations 2 to 4):

    a_t = log pi_teacher(y_t | s_t) - log pi_train(y_t | s_t)                 optionally clipped to [-c, c]
    r_t = pi_train(y_t | s_t) / pi_rollout(y_t | s_t)
    w_t = sg[r_t] 1[low <= r_t <= high]
    L   = -sum_t weight_t w_t sg[a_t] log pi_train(y_t | s_t)                 `sampled`, the paper's form

`weight` holds the global denominator: 1 / (sequences x tokens of the sequence) for the paper's mean over sequences of
token means, 1 / tokens for the field's (`algorithms.aggregation`). A token whose ratio is out of band gets w_t = 0, not
a clamped one, and still counts in the denominator.

Where the teacher's whole distribution is at hand, the sampled token can be summed out:

    d_t = KL(pi_train(. | s_t) || pi_teacher(. | s_t))
    L   = sum_t weight_t 1[low <= r_t <= high] d_t                            `full` and `top_k`

There is no ratio in it. In the sampled form r_t makes y_t, which the engine drew from pi_rollout, stand for a token
drawn from pi_train; with the sum over v nothing is drawn any more. Its gradient is the expectation of the sampled
form's, at the same state and without the band and the clip:

    E_{y ~ pi_rollout} [-r(y) a(y) grad log pi_train(y)]
        = sum_v pi_train(v) (log pi_train(v) - log pi_teacher(v)) grad log pi_train(v) = grad d_t

since sum_v pi_train(v) grad log pi_train(v) = 0. The band stays as what it is for: a state whose sampled token shows
that trainer and engine disagree there is left out. The clip of a_t bounds one drawn token's outlier and has no place in
a sum that weighs each token by its probability.

`top_k` looks at a support S of k tokens, the student's or the teacher's likeliest, with probabilities p and q that are
normalised over the whole vocabulary, and at everything else as one more token, the rest:

    d_t = sum_{v in S} p_v log(p_v / q_v) + p_rest log(p_rest / q_rest),      p_rest = 1 - sum_{v in S} p_v

This is itself a divergence: never negative, 0 where student and teacher agree, growing with k to the full one, which it
is exactly at k = V. What it loses is p_rest KL(p given the rest || q given the rest), how the student divides the mass
outside S. The sum over S alone would lose more: it is smallest at p_v = q_v / e, so that a student equal to its teacher
would still be driven to move mass out of the support, where nothing counts it. S is a constant; no gradient flows
through the choice.

Legend: T tokens of a micro-batch, V vocabulary, sg stop-gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from millrace.algorithms.losses import LossFn
from millrace.algorithms.off_policy import correction

Signal = Literal["sampled", "top_k", "full"]
Support = Literal["student", "teacher"]


def sampled_advantage(teacher_logp: Tensor, train_logp: Tensor, clip: float | None = None) -> Tensor:
    """a_t = log pi_teacher - log pi_train of the sampled tokens [T], in nats, bounded to +-`clip`; a constant."""
    advantage = (teacher_logp - train_logp).detach()
    return advantage if clip is None else advantage.clamp(-clip, clip)


def mopd_loss_fn(
    signal: Signal,
    *,
    ratio_low: float = 0.5,
    ratio_high: float = 2.0,
    advantage_clip: float | None = None,
    teachers: Sequence[str],
) -> LossFn:
    """The loss of a batch in which each sequence learns from one teacher or from its reward.

    `logp` itself, detached, is log pi_train: one update a batch. Streams, [T] each:

        weight          the aggregation's, with the global denominator
        rollout_logp    log pi_rollout(y_t), of the engine that sampled
        taught          k: by the k-th name of `teachers`, counted from 1; 0: by none, the token learns from its reward
        advantage       of the tokens with `taught` 0: REINFORCE under the same gate, -weight w_t A_t log pi_train(y_t)
        teacher_logp    log pi_teacher(y_t) of the taught tokens, for signal `sampled`
        divergence      d_t of the taught tokens with its gradient, for `top_k` and `full`; the trainer's head adds it
                        (`Policy.train_step(divergence=...)`), and the `logp` of these tokens then needs no gradient

    Args:
        signal: see the module's docstring; `top_k` and `full` differ in what `divergence` holds.
        ratio_low, ratio_high: the band of r_t.
        advantage_clip: the bound of |a_t| for signal `sampled`; none in the paper.
        teachers: their names in metrics.

    Metrics, sums of `weight` x value over the tokens, so that they add over micro-batches and ranks: `loss`;
    `mismatch/mean`, of |log pi_train - log pi_rollout|; `mismatch/masked`, of 1 where out of band; for each teacher
    `taught/NAME`, of 1 over its tokens, and `reverse_kl/NAME`, of log pi_train - log pi_teacher (-a_t, unclipped) or of
    d_t. The mean reverse KL to a teacher is the second divided by the first.
    """
    return _MopdLossFn(signal, ratio_low, ratio_high, advantage_clip, tuple(teachers))


@dataclass(frozen=True)
class _MopdLossFn:
    signal: Signal
    ratio_low: float
    ratio_high: float
    advantage_clip: float | None
    teachers: tuple[str, ...]

    def __call__(
        self, logp: Tensor, streams: Mapping[str, Tensor], segment_ids: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        weight = streams["weight"]
        trained = weight != 0
        # Tokens that are not trained on are set to 0: an exp of their differences may overflow, and 0 * inf is nan.
        logp = torch.where(trained, logp, 0.0)
        train_logp = logp.detach()
        rollout_logp = torch.where(trained, streams["rollout_logp"], 0.0)
        taught = torch.where(trained, streams["taught"], 0.0)
        gated_ratio = correction(
            train_logp,
            rollout_logp,
            "icepop",
            low=self.ratio_low,
            high=self.ratio_high,
            segment_ids=segment_ids,
            mask=trained,
        )
        per_token, reverse_kl = self._per_token(logp, gated_ratio, taught, streams)
        loss = (weight * per_token).sum()

        metrics = {"loss": loss.detach()}
        metrics["mismatch/mean"] = (weight * (train_logp - rollout_logp).abs()).sum()
        metrics["mismatch/masked"] = (weight * (gated_ratio == 0)).sum()
        for number, name in enumerate(self.teachers, start=1):
            share = weight * (taught == number)
            metrics[f"reverse_kl/{name}"] = (share * reverse_kl).sum()
            metrics[f"taught/{name}"] = share.sum()
        return loss, metrics

    def _per_token(
        self, logp: Tensor, gated_ratio: Tensor, taught: Tensor, streams: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Loss [T] and the value that `reverse_kl/NAME` adds up [T], 0 where no teacher speaks."""
        is_taught = taught > 0
        if self.signal == "sampled":
            teacher_logp = torch.where(is_taught, streams["teacher_logp"], 0.0)
            from_teacher = sampled_advantage(teacher_logp, logp, self.advantage_clip)
            advantage = torch.where(is_taught, from_teacher, streams["advantage"])
            return -gated_ratio * advantage * logp, torch.where(is_taught, logp.detach() - teacher_logp, 0.0)
        divergence = torch.where(is_taught, streams["divergence"], 0.0)
        from_reward = -gated_ratio * streams["advantage"] * logp
        return torch.where(is_taught, (gated_ratio > 0) * divergence, from_reward), divergence.detach()
