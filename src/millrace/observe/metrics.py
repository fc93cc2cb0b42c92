"""The metrics of a run: what each means, where it should lie, and what to do when it does not.

`docs/metrics.md` is written from here by `millrace report --metrics`.
"""

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
        "sum of weight * per-token loss over the tokens of the global batch; nats in SFT",
        "SFT: falls; RL and MOPD, on-policy: near 0, its gradient is what counts",
        "SFT loss rising: lower optimizer.lr",
    ),
    "grad_norm": Metric(
        "L2 norm of the gradient over all parameters, before clipping",
        "steady, below clip_grad most of the time",
        "growing: lower optimizer.lr, look at the mismatch, lengthen the warm-up",
    ),
    "lr": Metric("learning rate of this step", "follows the schedule", "see optimizer.schedule"),
    "tokens": Metric(
        "tokens of the batches trained on in this step, prompts included, padding not",
        "steady",
        "see reward/length",
    ),
    "tokens/sampled": Metric(
        "tokens of all prompts and answers sampled for this step, those of dropped groups included",
        "steady; with dynamic sampling at most a few times what is trained on",
        "many more than are trained on: prompts are too easy or too hard; use a curriculum",
    ),
    "tokens/scored": Metric(
        "tokens that teachers, the KL reference and the policy before its first update went through, prompts included",
        "steady",
        "see tokens",
    ),
    "micro_batches": Metric(
        "packed micro-batches of this step, summed over its updates",
        "tokens / max_tokens_per_micro_batch, rounded up on each replica",
        "many half-empty ones: raise trainer.max_tokens_per_micro_batch",
    ),
    "flops": Metric(
        "floating-point operations of this step by the model's formula: sampling, teachers, references, training",
        "steady",
        "see tokens and tokens/sampled",
    ),
    "reward/mean": Metric(
        "mean reward of the step's answers, dropped groups included",
        "rises over tens of steps",
        "flat at 0 or 1: the prompts are too hard or too easy; see groups/without_variance",
    ),
    "reward/DOMAIN": Metric(
        "mean reward of the step's answers to prompts of that domain",
        "rises, or stays where the domain is only kept alive",
        "one domain falls while others rise: give it more prompts, or a stage of its own and MOPD behind it",
    ),
    "reward/solved": Metric(
        "share of the step's answers with a reward of at least 1",
        "rises with reward/mean; equal to it where rewards are 0 or 1",
        "far below reward/mean: partial credit is earned without solving; grading: binary",
    ),
    "reward/length": Metric(
        "mean answer length, tokens that the policy generated",
        "moves slowly",
        "running away: overlong: zero_reward, or lower max_response_tokens",
    ),
    "reward/overlong": Metric(
        "share of answers that reached max_response_tokens, or in an episode of many turns the engine's context",
        "below 0.1",
        "raise max_response_tokens, or set overlong: filter or zero_reward",
    ),
    "reward/masked": Metric(
        "share of answers whose reward says nothing of them (the sandbox failed, the environment was stuck), so that "
        "they are left out of the loss, of their group's baseline and of the means of rewards",
        "0; in software engineering a few percent",
        "the reasons in the report's viewer; above one half of a domain's answers the run stops",
    ),
    "episode/turns": Metric(
        "mean turns of the policy in an episode, where a domain has many turns",
        "moves slowly",
        "falling to 1: the tools are not used, see their errors in the viewer; growing to turns.most: see cut_turns",
    ),
    "episode/most_turns": Metric("turns of the step's longest episode", "below turns.most", "as episode/cut_turns"),
    "episode/environment_tokens": Metric(
        "mean tokens that the environment put between the turns of an episode; no loss is taken at them",
        "moves slowly",
        "running away: tools print too much; lower the domain's limit of output",
    ),
    "episode/cut_turns": Metric(
        "share of episodes that reached turns.most of their domain",
        "below 0.1",
        "raise turns.most, or look in the viewer for calls that repeat",
    ),
    "episode/cut_tokens": Metric(
        "share of episodes that reached max_response_tokens, or turn_tokens in one turn",
        "below 0.1",
        "as reward/overlong",
    ),
    "episode/cut_context": Metric(
        "share of episodes that filled the engine's context",
        "below 0.1",
        "raise fleet.max_model_len, or limit what tools print",
    ),
    "episode/cut_time": Metric(
        "share of episodes that reached turns.episode_s of their domain",
        "0",
        "slow tools, or too few engines for so many episodes; raise turns.episode_s",
    ),
    "groups/without_variance": Metric(
        "share of groups whose rewards are all equal, so that they give no gradient",
        "below 0.5",
        "dynamic_sampling: true, or other data",
    ),
    "groups/hopeless": Metric(
        "share of groups that are left out of the loss because no reward is above their domain's mask_unless_above",
        "below 0.5, falls",
        "easier prompts, or a lower bound",
    ),
    "groups/played": Metric(
        "groups sampled for the step, dropped ones included",
        "near prompts_per_step",
        "many more: as groups/without_variance",
    ),
    "entropy": Metric(
        "mean entropy of the policy at the answers' tokens, nats",
        "falls slowly",
        "collapsing: lower lr, clip-higher",
    ),
    "mismatch/mean": Metric(
        "mean |log p_train - log p_rollout| over the answers' tokens, nats",
        "float32: < 1e-5; bfloat16: < 0.02 dense, < 0.05 mixture of experts",
        "same dtype in trainer and fleet; off_policy.kind: icepop or tis; a sudden jump is a wrong weight",
    ),
    "mismatch/masked": Metric(
        "share of the answers' tokens that the off-policy correction, MOPD's ratio band or mismatch.mask_above leaves "
        "out of the loss",
        "below 0.01",
        "as mismatch/mean",
    ),
    "clip_fraction": Metric(
        "share of the answers' tokens whose ratio is clipped", "below 0.2", "fewer updates_per_batch, or a lower lr"
    ),
    "kl": Metric("mean KL estimate to the reference, nats", "below 0.1", "raise kl.coefficient"),
    "judge/verdicts": Metric(
        "comparisons of two answers in this step, or answers that were judged alone",
        "RLHF, all pairs in both orders: G (G - 1) for a group of G finished answers",
        "fewer: answers were cut or empty, which nobody compares; see reward/overlong",
    ),
    "judge/failed": Metric(
        "share of the verdicts that no try brought a reply to; comparisons then stand undecided (scores 3, ranking "
        "3.5), and answers that are judged alone are masked",
        "0",
        "the judge's log; a longer timeout_s or lower concurrency; answers longer than its max_model_len",
    ),
    "judge/unparsable": Metric(
        "share of the verdicts whose last try held no verdict or was cut at max_tokens; otherwise as judge/failed",
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
    "reverse_kl": Metric(
        "mean of reverse_kl/DOMAIN over the tokens of all teachers, nats", "falls towards 0", "see reverse_kl/DOMAIN"
    ),
    "reverse_kl/DOMAIN": Metric(
        "mean of log p_train - log p_teacher over the domain's answer tokens, or of the divergence over the vocabulary "
        "with the signals top_k and full, nats",
        "falls towards 0, fastest in the first tens of steps",
        "flat: the teacher is too far away or lr too low; rising: lower lr, longer warm-up, look at mismatch/masked",
    ),
    "taught/DOMAIN": Metric(
        "share of the batch's weight that learns from the domain's teacher",
        "near the domain's share of the prompts",
        "far below it: its answers are filtered, or short under aggregation: token",
    ),
    "sampling/seconds": Metric(
        "seconds in which this step's answers were sampled and scored beside the training of the step before, with "
        "one_step_off; time/rollout is what the trainer waited for them",
        "as long as time/train",
        "longer: more engines for the fleet; shorter: fewer, or synchronous steps",
    ),
    "time/rollout": Metric("seconds spent sampling and scoring", "the larger part of a step", "more engines"),
    "time/teacher": Metric(
        "seconds spent on the teachers' log-probs, swaps included",
        "below time/train for each distinct teacher",
        "placement: resident where memory allows, else served",
    ),
    "time/train": Metric("seconds spent on log-probs and the update", "steady", "see benchmarks/"),
    "time/sync": Metric("seconds from pause to resume of the fleet", "below 10% of the step", "fleet.transport"),
    "sync/gigabytes": Metric("bytes of the weights that went to the engines, in 10^9", "steady", "-"),
    "sync/seconds": Metric(
        "seconds in which weights moved: engines got ready, buckets were sent and loaded, and were put into service; "
        "without the checks",
        "below 3 times sync/link_seconds where it is more than a second",
        "the line of the sync names its slowest part; larger fleet.bucket_bytes, another fleet.transport",
    ),
    "sync/link_seconds": Metric(
        "seconds that the slowest link on the way to an engine needs for these bytes: of the cluster file, else as "
        "measured at the first sync",
        "steady",
        "network in the cluster file, if it is not what the site has",
    ),
    "time/data": Metric("seconds spent reading and packing conversations", "below 5% of the step", "a faster disk"),
    "time/step": Metric("seconds of the whole step, the sum of its phases", "steady", "see the phases"),
    "held_out/DOMAIN": Metric(
        "held-out pass rate of the domain (mean reward over held-out prompts and answers)",
        "rises on the stage's own domains, stays within its interval on the others",
        "a drop beyond its interval: a gate with max_drop, a lower lr, or MOPD from the last checkpoint that had it",
    ),
}
"""Metrics by name; DOMAIN stands for any domain. `held_out/` is drawn from the ledger, all others stand in
metrics.jsonl."""


def find_metric(name: str) -> Metric | None:
    """What is known of a metric as it stands in metrics.jsonl, such as `reward/math`."""
    return METRICS.get(name) or METRICS.get(f"{name.split('/')[0]}/DOMAIN")


def metrics_page() -> str:
    """All metrics as a page of Markdown."""
    rows = "".join(f"| `{name}` | {m.meaning} | {m.healthy} | {m.otherwise} |\n" for name, m in METRICS.items())
    return _PAGE_HEAD + rows.replace("|log p_train - log p_rollout|", "abs(log p_train - log p_rollout)")


_PAGE_HEAD = """\
# Metrics

Written by `millrace report --metrics > docs/metrics.md`; edit `src/millrace/observe/metrics.py` instead.

Every step writes one line to `RUN_DIR/metrics.jsonl`: `step` (updates of the policy since the run began), `stage`, and
the metrics below as far as the stage has them. The same numbers go to TensorBoard, and to W&B and MLflow where the
recipe asks for them, as `STAGE/METRIC`. DOMAIN stands for each domain of the stage.

| metric | what it is | healthy | otherwise |
|---|---|---|---|
"""


def format_value(name: str, value: float) -> str:
    """A metric as a short text with a sensible number of digits."""
    if name == "lr" or (value != 0 and abs(value) < 1e-3):
        return f"{value:.1e}"
    if name in ("tokens", "tokens/sampled"):
        return f"{value:,.0f}"
    if name.startswith("time/"):
        return f"{value:.1f}s"
    return f"{value:.3g}" if abs(value) >= 1e4 else f"{value:.3f}"
