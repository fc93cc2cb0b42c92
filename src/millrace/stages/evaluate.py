"""Held-out pass rates of the policy, by domain."""

from __future__ import annotations

from millrace.evaluation.pass_rate import PassRate, pass_rate
from millrace.stages.context import StageContext
from millrace.stages.episodes import EpisodePlayer, Play


def evaluate(ctx: StageContext, after: str) -> dict[str, PassRate]:
    """Sample answers to every domain's held-out prompts and score them. Collective; the same result on every rank.
    Masked answers, and prompts that have no others, are left out.

    The seeds are the same each time, so that two rows of the matrix differ by the weights alone.
    """
    assert ctx.player is not None
    scores = {}
    for domain in sorted(ctx.recipe.domains):
        scores[domain] = _evaluate_domain(ctx, ctx.player, domain)
    ctx.say(f"held-out after {after}: " + ", ".join(f"{domain} {score}" for domain, score in scores.items()))
    return scores


def _evaluate_domain(ctx: StageContext, player: EpisodePlayer, name: str) -> PassRate:
    config = ctx.recipe.evaluation
    episodes = []
    if domain := player.domains.get(name):
        prompts = min(len(domain.held_out), config.max_prompts or len(domain.held_out))
        episodes = [domain.episode(domain.held_out, i, seed=i * config.samples) for i in range(prompts)]
    groups = player.play(Play(episodes, config.sampling, config.samples, f"held-out {name}"))
    return ctx.control.on_main(lambda: pass_rate([group.rewards for group in groups if group.rewards]))
