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
        dispatcher = Dispatcher(pool, capacity=capacity, limit=limit)
        try:
            await dispatcher.gather(jobs, lambda n, r, url: results.update({n: (r, url)}))
        finally:
            await until_idle(pool)
        return pool

    return results, asyncio.run(go())


async def until_idle(pool: Pool) -> None:
    """Jobs that were taken back leave their engines at once."""
    for _ in range(5):
        await asyncio.sleep(0)
    assert all(not member.tasks and member.outstanding == 0 for member in pool.members)


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
            Dispatcher(pool, capacity=1, limit=5.0).gather([Job("job", 1, answer)], lambda n, r, url: done.append(r))
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


def test_a_job_that_comes_later_runs_beside_a_long_one_and_one_that_fails() -> None:
    order: list[str] = []

    def job(name: str, seconds: float, *, fails: bool = False) -> Job[str]:
        async def call(client: EngineClient) -> str:
            await asyncio.sleep(seconds)
            order.append(name)
            if fails:
                raise RequestRefused(name)
            return name

        return Job(name, 1, call)

    async def go() -> None:
        pool = Pool(1)
        dispatcher = Dispatcher(pool, capacity=4, limit=5.0)
        batch = asyncio.ensure_future(dispatcher.gather([job("long", 0.2)], lambda n, r, url: None))
        await asyncio.sleep(0.01)
        bad = dispatcher.submit(job("bad", 0.01, fails=True))
        assert await dispatcher.submit(job("turn", 0.02)) == ("turn", "http://0")
        with pytest.raises(RequestRefused, match="bad"):
            await bad
        await batch
        await until_idle(pool)

    asyncio.run(go())
    assert order == ["bad", "turn", "long"]


def test_a_job_that_is_taken_back_leaves_its_place_to_the_next_one() -> None:
    async def forever(client: EngineClient) -> str:
        await asyncio.sleep(60)
        return "never"

    async def go() -> None:
        pool = Pool(1)
        dispatcher = Dispatcher(pool, capacity=1, limit=5.0)
        running, waiting = (dispatcher.submit(Job(name, 1, forever)) for name in ("running", "waiting"))
        last = dispatcher.submit(Job("last", 1, answer))
        await asyncio.sleep(0.01)
        waiting.cancel()
        running.cancel()
        assert (await asyncio.wait_for(last, 5.0))[0] == "done"
        await until_idle(pool)

    asyncio.run(go())


def test_a_job_of_an_engine_that_dies_goes_to_one_that_comes_back_later() -> None:
    async def go() -> None:
        pool = Pool(1)
        available = asyncio.Event()
        pool.engine_available = available.wait  # type: ignore[method-assign]
        dispatcher, calls = Dispatcher(pool, capacity=1, limit=5.0), list[str]()

        async def call(client: EngineClient) -> str:
            calls.append("call")
            await asyncio.sleep(60 if len(calls) == 1 else 0)
            return "done"

        future = dispatcher.submit(Job("job", 1, call))
        await asyncio.sleep(0.01)
        pool.members[0].health = EngineHealth(State.DEAD)
        for task in pool.members[0].tasks:
            task.cancel()
        await asyncio.sleep(0.01)
        assert not future.done() and not pool.members[0].outstanding
        pool.members[0].health = EngineHealth(State.SERVING)
        available.set()
        assert (await asyncio.wait_for(future, 5.0))[0] == "done" and len(calls) == 2

    asyncio.run(go())


def test_without_an_engine_all_that_wait_are_told_and_later_ones_ask_anew() -> None:
    async def go() -> None:
        pool = Pool(1)
        pool.members[0].health = EngineHealth(State.STALE)
        dispatcher = Dispatcher(pool, capacity=1, limit=5.0)
        for _ in range(2):
            futures = [dispatcher.submit(Job("job", 1, answer)) for _ in range(3)]
            for future in futures:
                with pytest.raises(FleetNeedsSync):
                    await asyncio.wait_for(future, 5.0)
        pool.members[0].health = EngineHealth(State.SERVING)
        assert (await dispatcher.submit(Job("job", 1, answer)))[0] == "done"

    asyncio.run(go())


def test_turns_go_before_a_batch_that_came_first() -> None:
    order: list[str] = []

    def job(name: str) -> Job[str]:
        async def call(client: EngineClient) -> str:
            order.append(name)
            await asyncio.sleep(0.01)
            return name

        return Job(name, 1, call)

    async def go() -> None:
        dispatcher = Dispatcher(Pool(1), capacity=1, limit=5.0)
        batch = [dispatcher.submit(job(f"batch {n}")) for n in range(3)]
        turns = [dispatcher.submit(job(f"turn {n}"), turn=True) for n in range(2)]
        await asyncio.gather(*batch, *turns)

    asyncio.run(go())
    assert order == ["batch 0", "turn 0", "turn 1", "batch 1", "batch 2"]
