"""The metrics of a run: what each means, where it should lie, and what to do when it does not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    meaning: str
    """Formula or definition, with its unit."""
    healthy: str
    """The range of a run that goes well."""
    otherwise: str
    """What to look at first when it leaves that range."""


METRICS: dict[str, Metric] = {
    "loss": Metric(
        "sum of weight * per-token loss over the global batch",
        "SFT: falls; RL on-policy: near 0, its gradient is what counts",
        "SFT loss rising: lower optimizer.lr",
    ),
    "grad_norm": Metric(
        "L2 norm of the gradient over all parameters, before clipping",
        "steady, below clip_grad most of the time",
        "growing: lower optimizer.lr, look at the mismatch, lengthen the warm-up",
    ),
    "lr": Metric("learning rate of this step", "follows the schedule", "see optimizer.schedule"),
    "tokens": Metric("tokens trained on in this step, padding not counted", "steady", "see reward/length"),
    "reward/mean": Metric(
        "mean reward of the step's answers",
        "rises over tens of steps",
        "flat at 0 or 1: the prompts are too hard or too easy; see groups/without_variance",
    ),
    "reward/length": Metric(
        "mean answer length, tokens",
        "moves slowly",
        "running away: overlong: zero_reward, or lower max_response_tokens",
    ),
    "reward/overlong": Metric(
        "share of answers that reached max_response_tokens",
        "below 0.1",
        "raise max_response_tokens, or set overlong: filter or zero_reward",
    ),
    "groups/without_variance": Metric(
        "share of groups whose rewards are all equal, so that they give no gradient",
        "below 0.5",
        "dynamic_sampling: true, or other data",
    ),
    "groups/played": Metric("groups sampled for the step, dropped ones included", "near prompts_per_step", "as above"),
    "entropy": Metric(
        "mean entropy of the policy at the answers' tokens, nats", "falls slowly", "collapsing: lower lr, clip-higher"
    ),
    "mismatch/mean": Metric(
        "mean |log p_train - log p_rollout| over the answers' tokens",
        "float32: < 1e-5; bfloat16: < 0.02 dense, < 0.05 mixture of experts",
        "same dtype in trainer and fleet; off_policy.kind: icepop or tis; a sudden jump is a wrong weight",
    ),
    "mismatch/masked": Metric(
        "share of the answers' tokens that the off-policy correction or mismatch.mask_above leaves out of the loss",
        "below 0.01",
        "as mismatch/mean",
    ),
    "clip_fraction": Metric(
        "share of the answers' tokens whose ratio is clipped", "below 0.2", "fewer updates_per_batch, or a lower lr"
    ),
    "kl": Metric("mean KL estimate to the reference", "below 0.1", "raise kl.coefficient"),
    "judge/verdicts": Metric(
        "comparisons of two answers in this step",
        "RLHF, all pairs in both orders: G (G - 1) for a group of G finished answers",
        "fewer: answers were cut or empty, which nobody compares; see reward/overlong",
    ),
    "judge/failed": Metric(
        "share of the verdicts that no try brought a reply to, so that they stand undecided: scores 3, ranking 3.5",
        "0",
        "the judge's log; a longer timeout_s or lower concurrency; answers longer than its max_model_len",
    ),
    "judge/unparsable": Metric(
        "share of the verdicts whose last try held no valid JSON object or was cut at max_tokens; they stand undecided",
        "below 0.01",
        "raise max_tokens of the judge; another form (roles, prompt) or judge",
    ),
    "judge/first_wins": Metric(
        "share of the verdicts that prefer the answer that was shown first",
        "0.4 to 0.6",
        "the judge looks at the place, not the answer: keep both_orders, or take another judge",
    ),
    "judge/score": Metric(
        "mean reward of the comparisons alone, without lengths and bonus; the judge's scale is 1 to 5",
        "rises slowly",
        "falling while reward/mean rises: the length rewards rule; lower their weights",
    ),
    "judge/seconds": Metric(
        "mean seconds that a verdict takes, the wait for a free place not included",
        "steady",
        "more engines for the judge, or a shorter max_tokens",
    ),
    "time/rollout": Metric("seconds spent sampling and scoring", "the larger part of a step", "more engines"),
    "time/train": Metric("seconds spent on log-probs and the update", "steady", "see benchmarks/"),
    "time/sync": Metric("seconds from pause to resume of the fleet", "below 10% of the step", "fleet.transport"),
}


def format_value(name: str, value: float) -> str:
    """A metric as a short text with a sensible number of digits."""
    if name == "lr" or (value != 0 and abs(value) < 1e-3):
        return f"{value:.1e}"
    if name == "tokens":
        return f"{value:,.0f}"
    if name.startswith("time/"):
        return f"{value:.1f}s"
    return f"{value:.3f}"
