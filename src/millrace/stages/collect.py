"""A step's groups for RL: draw prompts, play them, refill what gives no gradient, record."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from contextlib import contextmanager
from typing import Any, get_args

from millrace.config.schema import MopdStage, RlStage
from millrace.data.curriculum import ChosenRows
from millrace.data.sampler import MixedSampler
from millrace.environments.base import Cut
from millrace.errors import MillraceError
from millrace.rollout.member import FleetNeedsSync
from millrace.stages.context import StageContext
from millrace.stages.episodes import EpisodePlayer, Play
from millrace.stages.groups import Episode, Group, Scored
from millrace.stages.journal import RolloutJournal
from millrace.stages.rlhf import comparison, judge_metrics

WAIT_LOG_SECONDS = 10.0


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
        self._journal = RolloutJournal(ctx.run_dir, stage.name, ctx.recipe, ctx.built_on)
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: tuple[int, Future[Collected | None]] | None = None
        """The step that is sampled ahead, on rank 0."""
        self._ready: tuple[int, Collected] | None = None
        """The step that was."""

    def collect(self, step: int) -> Collected:
        """The groups of a step: those on record for its weights, or newly sampled ones. Collective."""
        ready, self._ready = self._ready, None
        if ready is not None and ready[0] == step:
            return ready[1]
        recorded = self._ctx.control.on_main(lambda: self._recorded(step))
        if recorded is None:
            groups, metrics = self._sample(step, self._player.play, self._is_full)
            collected = Collected(groups, self._ctx.control.on_main(lambda: metrics), self._sampler.state_dict())
            self._record(step, self._ctx.policy.step, collected)
            return collected
        self._ctx.say(f"{self._stage.name}: step {step + 1} trains on its recorded rollouts")
        header, groups = recorded
        self._sampler.load_state_dict(header["sampler"])
        return Collected(groups, header["metrics"], header["sampler"])

    # ---- ahead of training

    @contextmanager
    def sampling_ahead(self) -> Iterator[None]:
        """Around the steps of a stage that calls `begin` and `join`; waits for what is under way when they fail."""
        with ThreadPoolExecutor(1, "millrace-ahead") as self._thread:
            yield

    def begin(self, step: int) -> None:
        """Begin to sample a later step with the engines' present weights, while the ranks train. Not collective."""
        if not self._ctx.control.is_main or self._journal.read(step, self._ctx.policy.step):
            return
        assert self._thread is not None, "called within sampling_ahead"
        self._ahead = step, self._thread.submit(self._sample_ahead, step, self._ctx.policy.step)

    def join(self) -> None:
        """Wait until the step that was begun is sampled, and put it on record; engines may be given new weights and a
        checkpoint may be made after that. Collective.

        A stop that is asked for meanwhile waits too: what a checkpoint is to go on with must be on record. When all
        engines were lost the step is sampled later, with the weights they are given then.
        """
        groups: list[Group] = []

        def facts() -> tuple[int, dict[str, float], dict[str, Any]] | None:
            if (ahead := self._wait_for_the_step_ahead()) is None:
                return None
            step, collected = ahead
            groups.extend(collected.groups)  # too many to be sent to the other ranks
            return step, collected.metrics, collected.sampler

        if (found := self._ctx.control.on_main(facts)) is not None:
            step, metrics, state = found
            self._sampler.load_state_dict(state)
            self._ready = step, Collected(groups, metrics, state)

    def _wait_for_the_step_ahead(self) -> tuple[int, Collected] | None:
        if self._ahead is None:
            return None
        (step, future), self._ahead = self._ahead, None
        began = time.monotonic()
        while True:
            try:
                collected = future.result(timeout=WAIT_LOG_SECONDS)
                break
            except TimeoutError:
                seconds = time.monotonic() - began
                self._ctx.say(f"{self._stage.name}: waiting for the rollouts of step {step + 1} for {seconds:.0f} s")
        return None if collected is None else (step, collected)

    def _sample_ahead(self, step: int, version: int) -> Collected | None:
        """Rank 0's work in its thread; None when all engines were lost."""
        before, began = self._sampler.state_dict(), time.perf_counter()
        try:
            groups, metrics = self._sample(step, self._player.play_alone, self._fills)
        except FleetNeedsSync as lost:
            self._sampler.load_state_dict(before)
            self._ctx.say(f"{lost}; step {step + 1} is sampled after the next sync")
            return None
        metrics["sampling/seconds"] = time.perf_counter() - began
        collected = Collected(groups, metrics, self._sampler.state_dict())
        self._record(step, version, collected)
        return collected

    # ---- on record

    def _record(self, step: int, version: int, collected: Collected) -> None:
        """Put what was sampled with the weights `version` on record, on rank 0."""
        if self._ctx.control.is_main:
            header: dict[str, Any] = {"step": step, "weight_version": version}
            header |= {"sampler": collected.sampler, "metrics": collected.metrics}
            self._journal.write(step, header, collected.groups)

    def record_streams(self, step: int, answers: Sequence[Mapping[str, Any]]) -> None:
        """Put beside a step's answers what their tokens are trained with; rank 0's `answers`, in the groups' order."""
        if self._ctx.control.is_main:
            self._journal.write_streams(step, self._ctx.policy.step, answers)

    def recorded_streams(self, step: int) -> list[dict[str, Any]] | None:
        """What `record_streams` left for these weights, on rank 0; None elsewhere and where there is nothing."""
        return self._journal.read_streams(step, self._ctx.policy.step) if self._ctx.control.is_main else None

    def _recorded(self, step: int) -> tuple[dict, list[Group]] | None:
        """What was sampled with the present weights, or, one step off, with those before the last step."""
        stage, version = self._stage, self._ctx.policy.step
        found = self._journal.read(step, version)
        if found is None and isinstance(stage, RlStage) and stage.one_step_off and step:
            found = self._journal.read(step, version - stage.updates_per_batch)
        return found

    def _sample(
        self, step: int, play: Callable[[Play], list[Group]], is_full: Callable[[Sequence[Group]], bool]
    ) -> tuple[list[Group], dict[str, float]]:
        stage = self._stage
        kept: list[Group] = []
        played: list[Group] = []
        hopeless = 0
        rounds = stage.dynamic_sampling_max_rounds if stage.dynamic_sampling else 1
        for round_number in range(rounds):
            drawn = self._sampler.next(stage.prompts_per_step)
            episodes = self._episodes(drawn, step, round_number)
            what = f"{stage.name} {step + 1}/{stage.steps} rollouts"
            groups = play(Play(episodes, stage.sampling, stage.samples_per_prompt, what, comparison(stage)))
            groups = [self._penalise_overlong(group) for group in groups]
            played += groups
            trained = [self._mask_hopeless(group) for group in groups]
            hopeless += sum(group is not before for group, before in zip(trained, groups, strict=True))
            kept += [group for group in trained if self._teaches(group)] if stage.dynamic_sampling else trained
            if is_full(kept):
                break
        if self._ctx.control.is_main and len(kept) < self._least_groups:
            raise NothingToLearn(
                f"{stage.name}: in {rounds} rounds of {stage.prompts_per_step} prompts only {len(kept)} groups had "
                "answers of different reward, so there is nothing to learn from; use harder or easier prompts"
            )
        metrics = {**rollout_metrics(played), "groups/hopeless": hopeless / len(played)} if played else {}
        return kept[: stage.prompts_per_step], metrics

    def _teaches(self, group: Group) -> bool:
        """Whether a group has a gradient: from its teacher, or from rewards that differ."""
        return group.episode.domain in self._taught or has_variance(group)

    def _is_full(self, kept: Sequence[Group]) -> bool:
        """Rank 0's answer on every rank."""
        return self._ctx.control.on_main(lambda: self._fills(kept))

    def _fills(self, kept: Sequence[Group]) -> bool:
        return len(kept) >= self._stage.prompts_per_step

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

    def _mask_hopeless(self, group: Group) -> Group:
        """What a teacher speaks of needs no reward."""
        taught = group.episode.domain in self._taught
        return mask_hopeless(group, None if taught else self._player.domains[group.episode.domain].mask_unless_above)

    def _penalise_overlong(self, group: Group) -> Group:
        if self._stage.overlong != "zero_reward":
            return group
        return dataclasses.replace(group, answers=tuple(map(_zero_if_overlong, group.answers)))


def mask_hopeless(group: Group, least: float | None) -> Group:
    """The group with all answers masked, unless one has a reward above `least`."""
    if least is None or any(reward > least for reward in group.rewards):
        return group
    masked = (dataclasses.replace(each, reward=dataclasses.replace(each.reward, masked=True)) for each in group.answers)
    return dataclasses.replace(group, answers=tuple(masked))


def _zero_if_overlong(answer: Scored) -> Scored:
    if answer.rollout.finish_reason != "length" or answer.reward.masked:
        return answer
    return dataclasses.replace(answer, reward=dataclasses.replace(answer.reward, value=0.0, reason="overlong"))


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
    """Whether the rewards that count differ."""
    return len(set(group.rewards)) > 1


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Metrics over all groups that were played, the dropped ones too; rewards over those that were scored."""
    answers = [answer for group in groups for answer in group.answers]
    n = len(answers)
    return {
        **_reward_metrics([group for group in groups if group.episode.scored]),
        "reward/length": sum(answer.rollout.length for answer in answers) / n,
        "reward/overlong": sum(a.rollout.finish_reason == "length" for a in answers) / n,
        "reward/masked": sum(answer.reward.masked for answer in answers) / n,
        "groups/played": float(len(groups)),
        "tokens/sampled": float(
            sum(len(group.episode.prompt) for group in groups) + sum(len(answer.rollout.answer) for answer in answers)
        ),
        **judge_metrics(groups),
        **_turn_metrics([answer for group in groups if group.episode.turns for answer in group.answers]),
    }


def _turn_metrics(played: Sequence[Scored]) -> dict[str, float]:
    """Of episodes of many turns; nothing without one."""
    if not played:
        return {}
    n = len(played)
    environment = sum(len(answer.rollout.answer) - answer.rollout.length for answer in played)
    return {
        "episode/turns": sum(answer.rollout.turns for answer in played) / n,
        "episode/most_turns": float(max(answer.rollout.turns for answer in played)),
        "episode/environment_tokens": environment / n,
        **{f"episode/cut_{cut}": sum(answer.cut == cut for answer in played) / n for cut in get_args(Cut)},
    }


def _reward_metrics(scored: Sequence[Group]) -> dict[str, float]:
    by_domain: dict[str, list[float]] = {}
    for group in scored:
        by_domain.setdefault(group.episode.domain, []).extend(group.rewards)
    rewards = [reward for rewards in by_domain.values() for reward in rewards]
    if not rewards:
        return {}
    return {
        "reward/mean": sum(rewards) / len(rewards),
        "reward/solved": sum(reward >= 1 for reward in rewards) / len(rewards),
        "groups/without_variance": sum(not has_variance(group) for group in scored) / len(scored),
        **{f"reward/{domain}": sum(each) / len(each) for domain, each in sorted(by_domain.items()) if each},
    }
