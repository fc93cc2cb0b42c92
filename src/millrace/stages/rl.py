"""Reinforcement learning on verifiable rewards: rollout, score, advantages, train, sync, record.

GRPO as Nemotron-Cascade 2 runs it (arXiv 2603.19220, section 4.1): strictly on-policy, one update a batch,
group-normalised rewards, token-level loss over the tokens of the global batch, no KL. What the recipe asks for beyond
that (PPO clip, off-policy correction, KL, dynamic sampling) composes in `algorithms` and changes nothing in this loop;
with one_step_off the rollout of the next step goes on beside the training of this one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from millrace.algorithms.losses import LossFn, policy_loss_fn
from millrace.config.schema import RlStage, SamplingStage
from millrace.data.batch import TokenBatch
from millrace.errors import MillraceError
from millrace.megatron.policy import Policy
from millrace.stages.batches import answer_advantages, answers_batch
from millrace.stages.collect import Collected, GroupCollector
from millrace.stages.context import Progress, StageContext
from millrace.stages.groups import Group

ADDED = ("tokens", "micro_batches")
"""Metrics of an update of which a step has the sum."""


class MismatchTooLarge(MillraceError):
    """Trainer and engines disagree about the log-probs of the same tokens."""


def run_rl(stage: RlStage, ctx: StageContext, progress: Progress, measure: Callable[[int], None]) -> None:
    """Train to the stage's end from `progress`. Collective.

    `measure(step)` puts held-out pass rates on record; it is called every `evaluation.every` steps. The reference of a
    KL term is the policy as it was at the stage's start.
    """
    assert ctx.sync is not None
    every = ctx.recipe.evaluation.every
    collector = GroupCollector(stage, ctx, progress.stage, progress.sampler, least_groups=stage.updates_per_batch)
    reference = ctx.twin(ctx.origin) if stage.kl.coefficient else None
    loss_fn = stage_loss_fn(stage)
    temperature = stage.sampling.temperature
    ctx.begin_stage(stage, progress, stage.steps, stage.updates_per_batch)
    ctx.push_weights()
    with collector.sampling_ahead():
        for step in range(progress.step, stage.steps):
            if every and step and step % every == 0:
                measure(step)
            with ctx.timed("rollout"):
                collected = collector.collect(step)
                collector.record_streams(step, [{"advantage": a} for a in _advantages(collected, stage)])
            if stage.one_step_off and step + 1 < stage.steps:
                collector.begin(step + 1)
            ctx.rest_engines()
            with ctx.timed("train"):
                updates = [
                    ctx.policy.train_step(
                        batch, loss_fn, temperature=temperature, entropy=True, before_update=mismatch_guard(stage)
                    )
                    for batch in _batches(collected, stage, ctx, reference)
                ]
            values = {**collected.metrics, **step_metrics(updates)}
            passes = (reference is not None) + (stage.updates_per_batch > 1)  # forward only, over the whole batch
            values["tokens/scored"] = passes * values["tokens"]
            if stage.one_step_off:
                with ctx.timed("rollout"):
                    collector.join()
            values |= ctx.sync_step()
            ctx.end_step(stage, Progress(progress.stage, step + 1, collected.sampler), stage.steps, values)


def _advantages(collected: Collected, stage: RlStage) -> list[float]:
    return answer_advantages(collected.groups, stage.advantage)


def step_metrics(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The metrics of a step from those of its updates: tokens and micro-batches add up, all others are averaged."""
    sums = {name: sum(update[name] for update in updates) for name in updates[0]}
    return {name: value if name in ADDED else value / len(updates) for name, value in sums.items()}


def _batches(collected: Collected, stage: RlStage, ctx: StageContext, reference: Policy | None) -> list[TokenBatch]:
    """The step's batch, cut by groups into as many parts as there are updates, with the log-probs the loss needs.

    With more than one update the log-probs before the first one are kept, since the policy moves away from them.
    """
    temperature, batches = stage.sampling.temperature, []
    for part in range(stage.updates_per_batch):
        groups = collected.groups[part :: stage.updates_per_batch]
        batch = ctx.control.broadcast_batch(policy_batch(groups, stage) if ctx.control.is_main else None)
        if reference is not None:
            batch = batch.with_streams(reference_logp=reference.logprobs(batch, temperature=temperature)[0])
        if stage.updates_per_batch > 1:
            batch = batch.with_streams(old_logp=ctx.policy.logprobs(batch, temperature=temperature)[0])
        batches.append(batch)
    return batches


def policy_batch(groups: Sequence[Group], stage: RlStage) -> TokenBatch:
    """The groups' answers as one batch with the streams `weight`, `advantage`, `mask` and `rollout_logp`."""
    return answers_batch(
        groups,
        advantages=answer_advantages(groups, stage.advantage),
        drop_overlong=stage.overlong == "filter",
        aggregation=stage.loss.aggregation,
    )


def stage_loss_fn(stage: RlStage) -> LossFn:
    """The recipe's choices as plain numbers for the pure loss."""
    return policy_loss_fn(
        stage.loss.kind,
        clip_low=stage.loss.clip_low,
        clip_high=stage.loss.clip_high,
        off_policy=stage.off_policy.kind,
        off_policy_low=stage.off_policy.low,
        off_policy_high=stage.off_policy.high,
        kl_coefficient=stage.kl.coefficient,
        kl_estimator=stage.kl.estimator,
        mask_above=stage.mismatch.mask_above,
    )


def mismatch_guard(stage: SamplingStage) -> Callable[[dict[str, float]], None]:
    """A check of the reduced metrics before the optimizer steps: too large a mismatch stops without an update."""

    def guard(metrics: dict[str, float]) -> None:
        limit, found = stage.mismatch.stop_above, metrics["mismatch/mean"]
        if limit is not None and not found <= limit:
            one_step_off = isinstance(stage, RlStage) and stage.one_step_off
            cause = "The last step's training is part of it, one step off: lower optimizer.lr. " if one_step_off else ""
            raise MismatchTooLarge(
                f"{stage.name}: trainer and engines differ by {found:.3g} in mean |log-prob| over the same tokens, "
                f"more than stages.{stage.name}.mismatch.stop_above = {limit}; this update was not made. "
                f"{cause}`millrace verify sync` tells whether the weights arrive; else use one dtype in model and "
                "fleet, or an off_policy correction."
            )

    return guard
