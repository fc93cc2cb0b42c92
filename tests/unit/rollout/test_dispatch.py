"""The dispatcher with engines that are coroutines: who gets which job, and what happens when one fails."""

import asyncio
from collections.abc import Awaitable, Callable

import httpx
import pytest

from millrace.rollout.client import EngineClient, EngineUnreachable, RequestAborted, RequestRefused, RequestTimeout
from millrace.rollout.dispatch import MAX_FAILURES, Dispatcher, Job
from millrace.rollout.engine import ExternalEngine
from millrace.rollout.fleet_health import EngineHealth, Event, Overdue, State, step
from millrace.rollout.member import FleetError, FleetNeedsSync, Member

Call = Callable[[EngineClient], Awaitable[str]]


class Pool:
    """Engines that serve; reports go through the real state machine."""

    def __init__(self, count: int) -> None:
        http = httpx.AsyncClient()
        self.members = [
            Member(
                ExternalEngine(n, f"http://{n}"), EngineClient(http, f"http://{n}", "t"), EngineHealth(State.SERVING)
            )
            for n in range(count)
        ]
        self.reported: list[tuple[int, Event]] = []

    def report(self, member: Member, event: Event) -> None:
        self.reported.append((member.engine.index, event))
        member.health = step(member.health, event, max_restarts=3).health

    async def engine_available(self) -> None:
        if not any(member.serving for member in self.members):
            raise FleetNeedsSync("none")


def run(
    count: int, calls: list[Call], *, capacity: int = 4, limit: float = 5.0
) -> tuple[dict[int, tuple[str, str]], Pool]:
    results: dict[int, tuple[str, str]] = {}

    async def go() -> Pool:
        pool = Pool(count)
        jobs = [Job(f"job {n}", 1, call) for n, call in enumerate(calls)]
        dispatcher = Dispatcher(
            pool, jobs, lambda n, r, url: results.update({n: (r, url)}), capacity=capacity, limit=limit
        )
        try:
            await dispatcher.run()
        finally:
            assert all(not member.tasks and member.outstanding == 0 for member in pool.members)
        return pool

    return results, asyncio.run(go())


async def answer(client: EngineClient) -> str:
    await asyncio.sleep(0.01)
    return "done"


def test_jobs_are_spread_evenly_over_the_engines() -> None:
    results, _ = run(2, [answer] * 8)
    urls = [url for _, url in results.values()]
    assert urls.count("http://0") == urls.count("http://1") == 4


def test_an_engine_gets_no_more_than_its_capacity_at_one_time() -> None:
    busy = most = 0

    async def count(client: EngineClient) -> str:
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        await asyncio.sleep(0.01)
        busy -= 1
        return "done"

    run(1, [count] * 9, capacity=3)
    assert most == 3


def test_a_call_waits_for_engines_that_are_full_with_the_jobs_of_another() -> None:
    async def go() -> list[str]:
        pool, done = Pool(1), list[str]()
        calls = [
            Dispatcher(pool, [Job("job", 1, answer)], lambda n, r, url: done.append(r), capacity=1, limit=5.0).run()
            for _ in range(3)
        ]
        await asyncio.wait_for(asyncio.gather(*calls), timeout=5.0)
        return done

    assert asyncio.run(go()) == ["done"] * 3


def test_a_job_of_an_unreachable_engine_goes_to_another_one() -> None:
    async def flaky(client: EngineClient) -> str:
        if client.url == "http://0":
            raise EngineUnreachable("connection refused")
        return await answer(client)

    results, pool = run(2, [flaky] * 6)
    assert {url for _, url in results.values()} == {"http://1"}
    assert pool.members[0].health.state is State.SILENT


def test_an_aborted_answer_is_asked_for_again_and_counts_as_no_failure() -> None:
    asked = 0

    async def aborted(client: EngineClient) -> str:
        nonlocal asked
        asked += 1
        if asked <= MAX_FAILURES + 2:
            raise RequestAborted("paused")
        return "done"

    assert run(1, [aborted])[0][0][0] == "done"


def test_a_refused_job_fails_the_call_with_the_engines_own_words() -> None:
    async def refused(client: EngineClient) -> str:
        raise RequestRefused("prompt too long")

    with pytest.raises(RequestRefused, match="prompt too long"):
        run(2, [answer, refused, answer])


def test_a_job_that_always_times_out_fails_with_its_name_and_the_way_out() -> None:
    async def slow(client: EngineClient) -> str:
        raise RequestTimeout("no answer")

    with pytest.raises(FleetError, match=r"job 0 failed 4 times.*fleet.request_timeout_s"):
        run(1, [slow], limit=60.0)


def test_an_engine_none_of_whose_requests_come_back_is_reported() -> None:
    async def stuck(client: EngineClient) -> str:
        if client.url == "http://0":
            await asyncio.sleep(0.1)
            raise RequestTimeout("no answer")
        return "done"

    _, pool = run(2, [stuck, stuck], limit=0.05)
    assert any(index == 0 and isinstance(event, Overdue) for index, event in pool.reported)


def test_without_an_engine_that_serves_the_call_ends_and_says_so() -> None:
    async def only_one(client: EngineClient) -> str:
        raise EngineUnreachable("gone")

    with pytest.raises(FleetNeedsSync):
        run(1, [only_one])
