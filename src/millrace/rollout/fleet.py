"""The rollout fleet: vLLM servers, watched and restarted, behind blocking calls. Imports neither torch nor vLLM.

Everything that waits lives in one background thread with an event loop; the trainer's thread only asks it. An engine
serves after a weight sync has ended (`WeightSync.push`), or after `serve_checkpoint` where no trainer changes weights.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx

from millrace.config.schema import FleetConfig
from millrace.open_files import allow_many_files
from millrace.rollout import cpu_fp8
from millrace.rollout.auth import TOKEN_VARIABLE
from millrace.rollout.client import EngineClient, EngineUnreachable, RequestTimeout
from millrace.rollout.dispatch import Dispatcher
from millrace.rollout.engine import EngineProcess, EngineStartError, ExternalEngine
from millrace.rollout.fleet_health import (
    Action,
    Answered,
    Event,
    Exited,
    Missed,
    Overdue,
    Respawned,
    State,
    Suspected,
    SyncBegan,
    SyncEnded,
    step,
)
from millrace.rollout.generation import Generation, Tally
from millrace.rollout.member import Engine, FleetError, FleetLost, FleetNeedsSync, Member
from millrace.rollout.placement import HERE, Seats, with_peers
from millrace.rollout.remote import RemoteEngine
from millrace.rollout.server import MODEL_NAME, Device, engine_device
from millrace.rollout.types import Request, Rollout

T = TypeVar("T")
Progress = Callable[[int, int, int], None]
"""Called with answers that came back, answers asked for, tokens that came back."""

WATCH_SECONDS = 0.1
"""How often a process is asked whether it ended."""
STARTUP_PROBE_SECONDS = 0.5
WAIT_LOG_SECONDS = 10.0
PORT_TRIES = 3
SLEEP_LEVELS = {"offload": 1, "discard": 2}
"""What vLLM calls them."""


class Fleet:
    """`config.engines` vLLM servers on this machine or on nodes of a job, or those at `config.addresses`.

    device: where the engines run; found out when absent. seats: which GPUs, or which places on the job's nodes.
    kind: what the engines are called in messages and log files. served_name: what chat requests call the model.
    """

    def __init__(
        self,
        config: FleetConfig,
        model_path: str,
        run_dir: Path,
        log: logging.Logger | None = None,
        *,
        device: Device | None = None,
        seats: Seats = HERE,
        kind: str = "engine",
        served_name: str = MODEL_NAME,
    ) -> None:
        self.config = config
        self.run_dir = Path(run_dir)
        self.members: Sequence[Member] = ()
        self.version: int | None = None
        """Weights that serving engines hold."""
        self._log = log or logging.getLogger("millrace.rollout")
        self._token = _token(config, seats)
        named: dict[str, Any] = {"config": config, "model_path": model_path, "run_dir": self.run_dir}
        named |= {"kind": kind, "served_name": served_name}
        device = device or engine_device()
        self._on_cpu = device == "cpu"
        here = partial(EngineProcess, **named, token=self._token, device=device)
        self._engines = _engines(config, seats, here, partial(RemoteEngine, **named))
        self._serves_checkpoint = False
        # Twice what an engine decodes at one time keeps its queue filled and leaves the rest to others.
        self._dispatcher = Dispatcher(self, capacity=2 * config.max_num_seqs, limit=config.request_timeout_s)
        self._generation = Generation(self._dispatcher, most=config.max_num_seqs, limit=config.request_timeout_s)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._watchers: list[asyncio.Task[None]] = []
        self._restarts: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None

    # ---- blocking calls -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start every server and return at once; `wait_ready` waits for them."""
        if self._thread is not None:
            raise FleetError("the fleet was started already")
        if self._on_cpu and self.config.quantization == "fp8" and (problem := cpu_fp8.fp8_problem()):
            raise FleetError(problem)
        allow_many_files()  # a request under way is a connection
        self._loop = asyncio.new_event_loop()
        # The engines die with this thread (see `supervisor`), so it must start them and live as long as they do.
        self._thread = threading.Thread(target=self._loop.run_forever, name="millrace-fleet", daemon=True)
        self._thread.start()
        self.call(self._spawn_all())

    def wait_ready(self) -> None:
        """Return when every engine answers. Raises EngineStartError with the end of the log of one that does not."""
        self.call(self._wait("the engines to start", self._all_up, self.config.start_timeout_s))

    def serve_checkpoint(self, version: int = 0) -> None:
        """Let the engines serve the checkpoint they were started with, as `version`: where nobody trains."""
        self._serves_checkpoint = True
        self.call(self._serve_checkpoint(version))

    def generate(self, requests: Sequence[Request], on_progress: Progress | None = None) -> list[list[Rollout]]:
        """All answers, in the order of the requests.

        Raises FleetNeedsSync when no engine may be sampled from: after a weight sync, the same call again goes on
        where it stopped. Raises FleetLost, FleetError, RequestRefused.
        """
        future, progress = self.submit(requests)
        return follow(future, progress, on_progress)

    def submit(
        self, requests: Sequence[Request]
    ) -> tuple[concurrent.futures.Future[list[list[Rollout]]], Callable[[], tuple[int, int, int]]]:
        """Begin to generate: a future of what `generate` returns, and a function that tells how far it is."""
        tally = Tally(requests)
        return self.begin(self._generation.batch(requests, self.version, tally)), tally.told

    def submit_turn(self, request: Request) -> concurrent.futures.Future[Rollout]:
        """Begin to generate one answer, beside all that is under way: a turn of an episode. Raises what `generate`
        does, and keeps nothing."""
        return self.begin(self._generation.one(request))

    def prompt_logprobs(self, tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        """For each sequence log p of each token given those before it, at temperature 1; 0 for the first token."""
        return self.call(self._generation.prompt_logprobs(tokens))

    def submit_prompt_logprobs(self, tokens: Sequence[Sequence[int]]) -> concurrent.futures.Future[list[list[float]]]:
        """Begin to score: a future of what `prompt_logprobs` returns."""
        return self.begin(self._generation.prompt_logprobs(tokens))

    @property
    def needs_sync(self) -> bool:
        """Whether an engine answers that may not serve before the next weight sync."""
        return any(member.unsynced for member in self.members)

    def close(self) -> None:
        """End every engine that this fleet started, and its thread. May be called more than once."""
        if self._thread is None or self._loop is None:
            return
        self.call(self._shut_down())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._thread = self._loop = None

    def __enter__(self) -> Fleet:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the fleet's thread and wait for its result; Ctrl-C cancels it."""
        future = self.begin(work)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    def begin(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start a coroutine in the fleet's thread."""
        return asyncio.run_coroutine_threadsafe(work, self._running_loop())

    # ---- what weight syncs need -----------------------------------------------------------------------------------

    async def begin_sync(self, *, only_unsynced: bool = False) -> list[Member]:
        """The engines that take part in a sync; none of them serves until `end_sync`.

        Waits for engines that are starting when no other one is up.
        """
        await self._wait("an engine that can take weights", self._one_up, self.config.start_timeout_s)
        chosen = [m for m in self.members if m.unsynced or (m.serving and not only_unsynced)]
        for member in chosen:
            self.report(member, SyncBegan())
        return chosen

    async def end_sync(self, members: Sequence[Member], version: int) -> None:
        """Let engines serve that hold `version`. One that died on the way stays out."""
        self._serves_checkpoint = False
        self.version = version
        for member in members:
            self.report(member, SyncEnded(version))

    async def sleep(self) -> None:
        """Let engines give their GPU memory back; none of them serves before the next sync, which wakes them."""
        awake = [member for member in self.members if not member.client.asleep]
        resting = [member for member in awake if member.serving or member.unsynced]
        for member in resting:
            self.report(member, SyncBegan())
        await asyncio.gather(*(self._put_to_sleep(member) for member in resting))

    async def _put_to_sleep(self, member: Member) -> None:
        try:
            await member.client.sleep(SLEEP_LEVELS[self.config.sleep], self.config.request_timeout_s)
        except (EngineUnreachable, RequestTimeout):
            self.report(member, Suspected())

    # ---- in the fleet's thread ------------------------------------------------------------------------------------

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            raise FleetError("the fleet is not running; call start() first")
        return self._loop

    async def _spawn_all(self) -> None:
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it writes a line for every request and probe
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        # The environment's proxies are for the outside; an engine's token must not reach them.
        self._http = httpx.AsyncClient(limits=limits, trust_env=False)
        for engine in self._engines:
            engine.spawn()
        self.members = [Member(e, EngineClient(self._http, e.url, self._token)) for e in self._engines]
        for member in self.members:
            watcher = asyncio.create_task(self._watch(member))
            watcher.add_done_callback(self._note_failure)
            self._watchers.append(watcher)

    def _note_failure(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._failure = task.exception()

    async def _shut_down(self) -> None:
        self._dispatcher.close()
        for task in [*self._watchers, *self._restarts]:
            task.cancel()
        await asyncio.gather(*self._watchers, *self._restarts, return_exceptions=True)
        await asyncio.gather(*(asyncio.to_thread(engine.stop) for engine in self._engines))
        await self._http.aclose()

    async def _watch(self, member: Member) -> None:
        """Notice at once when a process ends, and within three heartbeats when it falls silent."""
        probed_at, port_tries = 0.0, 1
        while member.health.state is not State.GAVE_UP:
            await asyncio.sleep(WATCH_SECONDS)
            if member.health.state is State.DEAD:
                continue  # its restart is under way
            if (code := member.engine.exit_code()) is not None:
                if member.engine.port_was_taken() and port_tries < PORT_TRIES:
                    port_tries += 1
                    self._log.warning("%s lost its port to another process; it tries another one", member.engine.name)
                    self._spawn(member)
                else:
                    self.report(member, Exited(code))
                continue
            interval = STARTUP_PROBE_SECONDS if member.coming_up else self.config.heartbeat_s
            if time.monotonic() - probed_at >= interval:
                probed_at = time.monotonic()
                answered = await member.client.healthy(self.config.heartbeat_s)
                self.report(member, Answered() if answered else Missed())
                if answered and member.health.state is State.STALE and self._serves_checkpoint:
                    await self._serve_checkpoint(self.version or 0)
            if member.coming_up and time.monotonic() - member.spawned_at > self.config.start_timeout_s:
                self.report(member, Overdue(f"it did not answer within {self.config.start_timeout_s:g} s of its start"))

    def report(self, member: Member, event: Event) -> None:
        """Feed an engine's state machine and do what it says. In the fleet's thread only."""
        before = member.health
        result = step(before, event, max_restarts=self.config.max_restarts)
        member.health = result.health
        if result.health.state is not before.state:
            self._log_change(member, before.state)
        for action in result.actions:
            self._act(member, action)

    def _log_change(self, member: Member, before: State) -> None:
        health = member.health
        bad = health.state in (State.SILENT, State.DEAD, State.GAVE_UP)
        reason = f": {health.reason}" if health.state in (State.DEAD, State.GAVE_UP) else ""
        routine = {before, health.state} <= {State.READY, State.STALE, State.SERVING}  # every weight sync
        level = logging.WARNING if bad else logging.DEBUG if routine else logging.INFO
        self._log.log(level, "%s: %s -> %s%s", member.engine.name, before, health.state, reason)

    def _act(self, member: Member, action: Action) -> None:
        if action is Action.REQUEUE:
            for task in member.tasks:
                task.cancel()
        elif action is Action.STOP:
            member.engine.kill()
        else:
            restart = asyncio.get_running_loop().create_task(self._restart(member))
            self._restarts.add(restart)
            restart.add_done_callback(self._restarts.discard)
            restart.add_done_callback(self._note_failure)

    async def _restart(self, member: Member) -> None:
        await asyncio.to_thread(member.engine.kill)
        self._spawn(member)
        self.report(member, Respawned())

    def _spawn(self, member: Member) -> None:
        member.engine.spawn()
        member.client = EngineClient(self._http, member.engine.url, self._token)
        member.spawned_at = time.monotonic()

    async def _serve_checkpoint(self, version: int) -> None:
        waiting = await self.begin_sync(only_unsynced=True) if self.needs_sync else []
        for member in waiting:
            await member.client.set_weight_version(version)
            self.report(member, SyncEnded(version))
        self.version = version

    # ---- waits ----------------------------------------------------------------------------------------------------

    async def _wait(self, name: str, condition: Callable[[], bool], limit: float) -> None:
        """Wait until `condition()`, which may raise; a log line every ten seconds says for what and how long."""
        began = logged = time.monotonic()
        while not condition():
            if self._failure is not None:
                raise FleetError("watching the engines failed") from self._failure
            now = time.monotonic()
            if now - began > limit + WAIT_LOG_SECONDS:
                raise FleetError(f"waited {limit:g} s for {name}; {self._states()}")
            if now - logged >= WAIT_LOG_SECONDS:
                logged = now
                self._log.info("waiting for %s: %.0f s of %.0f s; %s", name, now - began, limit, self._states())
            await asyncio.sleep(WATCH_SECONDS)

    def _states(self) -> str:
        return ", ".join(f"{m.engine.name} is {m.health.state}" for m in self.members)

    def _all_up(self) -> bool:
        for member in self.members:
            if member.health.state is State.GAVE_UP:
                raise EngineStartError(self._end_of(member))
        return not any(member.coming_up for member in self.members)

    def _one_up(self) -> bool:
        self._raise_if_lost()
        return any(m.serving or m.unsynced for m in self.members)

    def _end_of(self, member: Member) -> str:
        why, log = member.health.reason, member.engine.log_tail()
        return f"{member.engine.name} gave up: {why}. The last lines of its log:\n{log}"

    def _raise_if_lost(self) -> None:
        if all(member.health.state is State.GAVE_UP for member in self.members):
            raise FleetLost("; ".join(self._end_of(member) for member in self.members))

    async def engine_available(self) -> None:
        """Wait until an engine serves. FleetNeedsSync: one only waits for a sync. FleetLost: none is left."""

        def decided() -> bool:
            self._raise_if_lost()
            silent = any(m.health.state is State.SILENT for m in self.members)
            unsynced = (
                self.needs_sync and not self._serves_checkpoint
            )  # those of a fixed checkpoint serve by themselves
            return any(m.serving for m in self.members) or (unsynced and not silent)

        await self._wait("an engine that serves", decided, self.config.start_timeout_s)
        if not any(member.serving for member in self.members):
            raise FleetNeedsSync(f"no engine holds synced weights ({self._states()}): push weights, then go on")


def _token(config: FleetConfig, seats: Seats) -> str:
    if not config.addresses:
        return seats.meeting.token() if seats.meeting else secrets.token_urlsafe(32)
    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        raise FleetError(
            f"fleet.addresses names servers that already run, but the environment variable {TOKEN_VARIABLE} with their "
            "token is not set; start them and the run with the same value"
        )
    return token


def _engines(
    config: FleetConfig, seats: Seats, here: Callable[..., EngineProcess], elsewhere: Callable[..., RemoteEngine]
) -> list[Engine]:
    if config.addresses:
        return [ExternalEngine(index, url) for index, url in enumerate(config.addresses)]
    if seats.meeting:
        if len(seats.places) != config.engines:
            raise FleetError(f"{config.engines} servers are wanted, but the job's placement has {len(seats.places)}")
        return [elsewhere(index, meeting=seats.meeting, place=place) for index, place in enumerate(seats.places)]
    width, gpus = config.tensor_parallel, seats.gpus
    if gpus and len(gpus) < config.engines * width:
        raise FleetError(
            f"{config.engines} engines of {width} ranks need {config.engines * width} GPUs, but {len(gpus)} are given"
        )
    return [here(i, gpus=with_peers(gpus[i * width : (i + 1) * width], seats.peers)) for i in range(config.engines)]


def follow(
    future: concurrent.futures.Future[T], progress: Callable[[], tuple[int, int, int]], on_progress: Progress | None
) -> T:
    """Wait for a future in the caller's thread and report progress from there."""
    told: tuple[int, int, int] | None = None
    try:
        while True:
            done, _ = concurrent.futures.wait([future], timeout=0.1)
            now = progress()
            if on_progress is not None and now != told:
                on_progress(*now)
                told = now
            if done:
                return future.result()
    except KeyboardInterrupt:
        future.cancel()
        raise
