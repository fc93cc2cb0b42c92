"""What a fleet is asked for: batches of answers, single turns, log-probs of given tokens. In the fleet's thread."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from millrace.rollout.client import Answer
from millrace.rollout.dispatch import Dispatcher, Job
from millrace.rollout.member import FleetNeedsSync
from millrace.rollout.types import Request, Rollout


@dataclass(frozen=True)
class Part:
    """Answers `first`, `first + 1`, ... of one request: it may want more than an engine decodes at one time."""

    request: Request
    first: int
    count: int


@dataclass(frozen=True)
class Answered:
    answers: tuple[Answer, ...]
    engine: str


class Tally:
    """How far a batch is: answers that came back, answers asked for, tokens that came back."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.answers, self.asked, self.tokens = 0, sum(request.sampling.n for request in requests), 0

    def count(self, part: Part, answered: Answered) -> None:
        copies = part.request.sampling.n if part.request.sampling.temperature == 0 else 1
        self.answers += copies * len(answered.answers)
        self.tokens += copies * sum(len(answer.tokens) for answer in answered.answers)

    def told(self) -> tuple[int, int, int]:
        return self.answers, self.asked, self.tokens


class Generation:
    """Args:
    dispatcher: gives the jobs to engines.
    most: answers that one job asks for.
    limit: seconds that a job may take.
    """

    def __init__(self, dispatcher: Dispatcher, *, most: int, limit: float) -> None:
        self._dispatcher, self._most, self._limit = dispatcher, most, limit
        self._kept: dict[Part, Answered] = {}

    async def batch(self, requests: Sequence[Request], version: int | None, tally: Tally) -> list[list[Rollout]]:
        """All answers, in the order of the requests. What came back before FleetNeedsSync or a cancel is kept for the
        same call again, if the engines then serve the same `version`."""
        parts = [part for request in requests for part in self._parts(request)]
        results = {part: kept for part in parts if (kept := self._still_valid(part, version))}
        for part, answered in results.items():
            tally.count(part, answered)
        missing = [part for part in parts if part not in results]

        def take(index: int, answers: list[Answer], url: str) -> None:
            results[missing[index]] = Answered(tuple(answers), url)
            tally.count(missing[index], results[missing[index]])

        try:
            await self._dispatcher.gather([self._job(part) for part in missing], take)
        except (FleetNeedsSync, asyncio.CancelledError):
            self._kept = results
            raise
        self._kept = {}
        by_request: dict[Request, list[Rollout]] = {}
        for part in parts:
            by_request.setdefault(part.request, []).extend(_rollouts(part, results[part]))
        return [by_request[request] for request in requests]

    async def one(self, request: Request) -> Rollout:
        """The one answer to a request, whatever else is under way; nothing of it is kept."""
        part = Part(request, 0, 1)
        answers, url = await self._dispatcher.submit(self._job(part), turn=True)
        return _rollouts(part, Answered(tuple(answers), url))[0]

    async def prompt_logprobs(self, tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        scores: dict[int, list[float]] = {}

        def job(sequence: tuple[int, ...], index: int) -> Job[list[float]]:
            return Job(f"scoring of sequence {index}", 1, lambda client: client.prompt_logprobs(sequence, self._limit))

        def take(index: int, values: list[float], url: str) -> None:
            scores[index] = values

        await self._dispatcher.gather([job(tuple(sequence), index) for index, sequence in enumerate(tokens)], take)
        return [scores[index] for index in range(len(tokens))]

    def _parts(self, request: Request) -> list[Part]:
        if request.sampling.temperature == 0:
            return [Part(request, 0, 1)]  # all answers are the same one
        starts = range(0, request.sampling.n, self._most)
        return [Part(request, first, min(self._most, request.sampling.n - first)) for first in starts]

    def _still_valid(self, part: Part, version: int | None) -> Answered | None:
        """An answer kept from a call that broke off, if the weights are still those it was drawn with."""
        kept = self._kept.get(part)
        valid = kept is not None and all(answer.weight_version == version for answer in kept.answers)
        return kept if valid else None

    def _job(self, part: Part) -> Job[list[Answer]]:
        asked = part.request.sampling
        seed = None if asked.seed is None else asked.seed + part.first
        sampling = replace(asked, n=part.count, seed=seed)
        return Job(
            name=f"request {part.request.id!r}",
            sequences=part.count,
            call=lambda client: client.generate(part.request.prompt, sampling, self._limit),
        )


def _rollouts(part: Part, answered: Answered) -> list[Rollout]:
    request = part.request
    answers = answered.answers * (request.sampling.n if request.sampling.temperature == 0 else 1)
    return [
        Rollout(
            request_id=request.id,
            index=part.first + k,
            prompt=request.prompt,
            answer=answer.tokens,
            rollout_logp=answer.logp,
            finish_reason="stop" if answer.finish_reason == "stop" else "length",
            weight_version=answer.weight_version,
            engine=answered.engine,
        )
        for k, answer in enumerate(answers)
    ]
