"""A step's groups for RL: draw prompts, play them, refill what gives no gradient, record."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from millrace.config.schema import MopdStage, RlStage
from millrace.data.curriculum import ChosenRows
from millrace.data.sampler import MixedSampler
from millrace.errors import MillraceError
from millrace.stages.context import StageContext
from millrace.stages.episodes import Episode, EpisodePlayer, Group, Scored
from millrace.stages.journal import RolloutJournal
from millrace.stages.rlhf import comparison, judge_metrics


class NothingToLearn(MillraceError):
    """No group of a step has a gradient."""


@dataclasses.dataclass(frozen=True)
class Collected:
    """What one step trains on. `groups` is rank 0's; the rest is the same on every rank."""

    groups: list[Group]
    metrics: dict[str, float]
    sampler: dict[str, Any]


class GroupCollector:
    def __init__(
        self,
        stage: RlStage | MopdStage,
        ctx: StageContext,
        stage_index: int,
        sampler_state: Mapping[str, Any] | None,
        *,
        least_groups: int = 1,
    ) -> None:
        """`least_groups`: with fewer that have a gradient a step cannot be made."""
        assert ctx.player is not None
        self._least_groups = least_groups
        self._taught = frozenset(stage.teachers) if isinstance(stage, MopdStage) else frozenset()
        self._stage, self._ctx, self._index = stage, ctx, stage_index
        self._player: EpisodePlayer = ctx.player
        rows = ctx.control.on_main(
            lambda: {name: self._player.domains[name].training_rows(stage.curriculum) for name in stage.domains}
        )
        for name, chosen in rows.items():
            if isinstance(chosen, ChosenRows):
                ctx.say(f"{stage.name}: {drawn_text(name, chosen)}")
        self._sampler = MixedSampler(rows, seed=ctx.recipe.seed + stage_index)
        if sampler_state is not None:
            self._sampler.load_state_dict(sampler_state)
        self._journal = RolloutJournal(ctx.run_dir, stage.name, ctx.recipe)

    def collect(self, step: int) -> Collected:
        """The groups of a step: those on record for these weights, or newly sampled ones. Collective."""
        version = self._ctx.policy.step
        recorded = self._ctx.control.on_main(lambda: self._recorded(step, version))
        if recorded is None:
            groups, metrics = self._sample(step)
            state = self._sampler.state_dict()
            if self._ctx.control.is_main:
                header: dict[str, Any] = {"step": step, "weight_version": version, "sampler": state, "metrics": metrics}
                self._journal.write(step, header, groups)
            return Collected(groups, self._ctx.control.on_main(lambda: metrics), state)
        self._ctx.say(f"{self._stage.name}: step {step + 1} trains on its recorded rollouts")
        header, groups = recorded
        self._sampler.load_state_dict(header["sampler"])
        return Collected(groups, header["metrics"], header["sampler"])

    def record_streams(self, step: int, answers: Sequence[Mapping[str, Any]]) -> None:
        """Put beside a step's answers what their tokens are trained with; rank 0's `answers`, in the groups' order."""
        if self._ctx.control.is_main:
            self._journal.write_streams(step, self._ctx.policy.step, answers)

    def recorded_streams(self, step: int) -> list[dict[str, Any]] | None:
        """What `record_streams` left for these weights, on rank 0; None elsewhere and where there is nothing."""
        return self._journal.read_streams(step, self._ctx.policy.step) if self._ctx.control.is_main else None

    def _recorded(self, step: int, version: int) -> tuple[dict, list[Group]] | None:
        return self._journal.read(step, version)

    def _sample(self, step: int) -> tuple[list[Group], dict[str, float]]:
        stage = self._stage
        kept: list[Group] = []
        played: list[Group] = []
        rounds = stage.dynamic_sampling_max_rounds if stage.dynamic_sampling else 1
        for round_number in range(rounds):
            drawn = self._sampler.next(stage.prompts_per_step)
            episodes = self._episodes(drawn, step, round_number)
            what = f"{stage.name} {step + 1}/{stage.steps} rollouts"
            groups = self._player.play(episodes, stage.sampling, stage.samples_per_prompt, what, comparison(stage))
            groups = [self._penalise_overlong(group) for group in groups]
            played += groups
            kept += [group for group in groups if self._teaches(group)] if stage.dynamic_sampling else groups
            if self._is_full(kept):
                break
        if self._ctx.control.is_main and len(kept) < self._least_groups:
            raise NothingToLearn(
                f"{stage.name}: in {rounds} rounds of {stage.prompts_per_step} prompts only {len(kept)} groups had "
                "answers of different reward, so there is nothing to learn from; use harder or easier prompts"
            )
        return kept[: stage.prompts_per_step], rollout_metrics(played) if played else {}

    def _teaches(self, group: Group) -> bool:
        """Whether a group has a gradient: from its teacher, or from rewards that differ."""
        return group.episode.domain in self._taught or has_variance(group)

    def _is_full(self, kept: Sequence[Group]) -> bool:
        """Rank 0's answer on every rank."""
        return self._ctx.control.on_main(lambda: len(kept) >= self._stage.prompts_per_step)

    def _episodes(self, drawn: Sequence[tuple[str, int]], step: int, round_number: int) -> list[Episode]:
        """Rank 0's episodes; every prompt of the run has its own seeds, whatever ran before."""
        if not self._ctx.control.is_main:
            return []
        stage, n = self._stage, self._stage.samples_per_prompt
        first = ((self._index * 1_000_003 + step) * stage.dynamic_sampling_max_rounds + round_number) * len(drawn) * n
        base = (self._ctx.recipe.seed * 0x9E3779B1 + first) % 2**31
        return [self._episode(name, row, base + slot * n) for slot, (name, row) in enumerate(drawn)]

    def _episode(self, name: str, row: int, seed: int) -> Episode:
        """A judge is not asked about answers that a teacher speaks of."""
        domain = self._player.domains[name]
        return domain.episode(domain.train, row, seed, scored=not (name in self._taught and domain.compares))

    def _penalise_overlong(self, group: Group) -> Group:
        if self._stage.overlong != "zero_reward":
            return group
        return dataclasses.replace(group, answers=tuple(map(_zero_if_overlong, group.answers)))


def _zero_if_overlong(answer: Scored) -> Scored:
    if answer.rollout.finish_reason != "length":
        return answer
    return dataclasses.replace(answer, reward=dataclasses.replace(answer.reward, value=0.0, reason="overlong"))


def _length(answer: Scored) -> int:
    return len(answer.rollout.answer)


def drawn_text(domain: str, chosen: ChosenRows) -> str:
    """What a curriculum draws and what it leaves out, in one sentence."""
    total = len(chosen) + chosen.too_hard + chosen.too_easy
    order = (
        "shuffled" if chosen.rates is None else f"pass rates {max(chosen.rates):.2f} down to {min(chosen.rates):.2f}"
    )
    return (
        f"{domain} draws from {len(chosen)} of {total} prompts, {order}; {chosen.too_hard} too hard and "
        f"{chosen.too_easy} too easy ones are left out"
    )


def has_variance(group: Group) -> bool:
    return len(set(group.rewards)) > 1


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Metrics over all groups that were played, the dropped ones too; rewards over those that were scored."""
    answers = [answer for group in groups for answer in group.answers]
    n = len(answers)
    return {
        **_reward_metrics([group for group in groups if group.episode.scored]),
        "reward/length": sum(map(_length, answers)) / n,
        "reward/overlong": sum(a.rollout.finish_reason == "length" for a in answers) / n,
        "groups/played": float(len(groups)),
        "tokens/sampled": float(sum(len(group.episode.prompt) for group in groups) + sum(map(_length, answers))),
        **judge_metrics(groups),
    }


def _reward_metrics(scored: Sequence[Group]) -> dict[str, float]:
    if not scored:
        return {}
    by_domain: dict[str, list[float]] = {}
    for group in scored:
        by_domain.setdefault(group.episode.domain, []).extend(group.rewards)
    rewards = [reward for rewards in by_domain.values() for reward in rewards]
    return {
        "reward/mean": sum(rewards) / len(rewards),
        "reward/solved": sum(reward >= 1 for reward in rewards) / len(rewards),
        "groups/without_variance": sum(not has_variance(group) for group in scored) / len(scored),
        **{f"reward/{domain}": sum(each) / len(each) for domain, each in sorted(by_domain.items())},
    }
