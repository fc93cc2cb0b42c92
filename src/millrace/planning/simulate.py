"""A discrete-event simulation of rollouts and training, for any number of engines.

An engine has a number of slots; how fast it decodes depends on how many of them are taken. Answers have lengths of a
log-normal distribution (or measured ones). Three ways of working:

    synchronous     a batch is sampled, then trained on; the fleet waits for the trainer and the trainer for the fleet
    one_step_off    the next batch is sampled while one is trained on; each batch is one update old
    bounded         engines always sample; no answer is begun that could be trained on more than `staleness` updates
                    after the weights that began it

Millrace runs the synchronous way, and with `one_step_off` the second. The third says what it would bring.

Legend: virtual time of an engine: tokens that each of its running sequences has gained since it started.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Mode = Literal["synchronous", "one_step_off", "bounded"]

StepTime = Callable[[int], float]
"""Running sequences of an engine -> seconds of one decoding step."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths of answers in tokens: log-normal with this mean, cut at `longest`; or drawn from measured ones."""

    mean: float
    longest: int
    spread: float = 0.8
    """Standard deviation of the logarithm."""
    measured: Sequence[int] = ()

    def draw(self, generator: random.Random) -> int:
        if self.measured:
            return generator.choice(self.measured)
        middle = math.log(max(self.mean, 1.0)) - self.spread**2 / 2
        return max(1, min(self.longest, round(generator.lognormvariate(middle, self.spread))))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is simulated."""

    mode: Mode
    engines: int
    slots: int
    """Sequences that an engine decodes at one time."""
    step_time: StepTime
    prefill_s: float
    """Seconds of an engine for one prompt."""
    batch: int
    """Sequences of one update."""
    lengths: Lengths
    train_s: float
    """Scoring and training of one batch."""
    sync_s: float
    """The engines stand still so long after each update."""
    steps: int = 8
    staleness: int = 1
    """Of the bounded mode, in updates."""
    seed: int = 1


@dataclass(frozen=True, kw_only=True)
class Outcome:
    mode: Mode
    step_s: float
    """Seconds of a step, mean."""
    rollout_s: float
    """Of it until the batch was there, where the trainer waits for it."""
    trainer_idle: float
    """Share of the time in which the trainer waits."""
    fleet_idle: float
    """Share of the slots' time in which no sequence stands in them."""
    staleness: float
    """Updates between the weights that began an answer and those trained by it, mean."""
    largest_staleness: int
    tokens_s: float
    """Tokens of answers a second, over the whole run."""


class _Engine:
    """Running sequences in virtual time."""

    __slots__ = ("changed", "epoch", "now", "running", "virtual")

    def __init__(self) -> None:
        self.running: list[tuple[float, int, int]] = []
        """Heap of the virtual time at which each sequence ends, its number, and the weights it began with."""
        self.virtual = 0.0
        self.now = 0.0
        self.epoch = 0
        self.changed = False


class _Fleet:
    """All engines, and what waits for a slot."""

    def __init__(self, setting: Setting) -> None:
        self.s = setting
        self.engines = [_Engine() for _ in range(setting.engines)]
        self.generator = random.Random(setting.seed)
        self.events: list[tuple[float, int, int]] = []
        self.busy = 0.0
        """Slot-seconds in which a sequence stood in a slot."""
        self.tokens = 0
        self._steps = [0.0, *(setting.step_time(n) for n in range(1, setting.slots + 1))]
        self.begun = 0
        """Answers, and the number of the next one."""
        self._free = deque(e for _ in range(setting.slots) for e in range(setting.engines))

    def start(self, now: float, version: int, most: int) -> int:
        """Begin up to `most` answers with the weights of `version`; how many found a slot."""
        touched: set[int] = set()
        begun = 0
        while begun < most and self._free:
            index = self._free.popleft()
            engine = self.engines[index]
            self._advance(engine, now)
            length = self.s.lengths.draw(self.generator)
            self.tokens += length
            # A prompt is read before the first token, in the time of some steps.
            waits = self.s.prefill_s / self._steps[min(len(engine.running) + 1, self.s.slots)]
            heapq.heappush(engine.running, (engine.virtual + length + waits, self.begun, version))
            self.begun += 1
            touched.add(index)
            begun += 1
        for index in touched:
            self._schedule(index)
        return begun

    def pause(self, now: float, seconds: float) -> None:
        """Nothing decodes for so long."""
        for index, engine in enumerate(self.engines):
            self._advance(engine, now)
            engine.now = now + seconds
            if engine.running:
                self._schedule(index)

    def next_end(self) -> float:
        """When the next answer ends; infinity when none runs."""
        while self.events and self.events[0][2] != self.engines[self.events[0][1]].epoch:
            heapq.heappop(self.events)
        return self.events[0][0] if self.events else math.inf

    def end(self) -> tuple[float, int, int]:
        """Take the next answer that ends: when, its number, and the weights it began with."""
        now = self.next_end()
        index = heapq.heappop(self.events)[1]
        engine = self.engines[index]
        self._advance(engine, now)
        _, number, version = heapq.heappop(engine.running)
        self._free.append(index)
        engine.epoch += 1
        if engine.running:
            self._schedule(index)
        return now, number, version

    def _advance(self, engine: _Engine, now: float) -> None:
        if now > engine.now:
            if engine.running:
                engine.virtual += (now - engine.now) / self._steps[len(engine.running)]
                self.busy += (now - engine.now) * len(engine.running)
            engine.now = now

    def _schedule(self, index: int) -> None:
        engine = self.engines[index]
        engine.epoch += 1
        left = max(0.0, engine.running[0][0] - engine.virtual)
        heapq.heappush(self.events, (engine.now + left * self._steps[len(engine.running)], index, engine.epoch))


def simulate(setting: Setting) -> Outcome:
    """Run `steps` updates. The same seed gives the same outcome."""
    fleet = _Fleet(setting)
    run = {"synchronous": _synchronous, "one_step_off": _one_step_off, "bounded": _bounded}[setting.mode]
    ages: list[int] = []
    end, trained, waited = run(setting, fleet, ages)
    slots = setting.engines * setting.slots
    return Outcome(
        mode=setting.mode,
        step_s=end / setting.steps,
        rollout_s=waited / setting.steps,
        trainer_idle=1 - trained / end,
        fleet_idle=1 - fleet.busy / (slots * end),
        staleness=sum(ages) / len(ages),
        largest_staleness=max(ages),
        tokens_s=fleet.tokens / end * (len(ages) / max(len(ages), fleet.begun)),
    )


def _sampled(setting: Setting, fleet: _Fleet, now: float, version: int) -> float:
    """Sample one whole batch; when its last answer ends."""
    begun = fleet.start(now, version, setting.batch)
    for _ in range(setting.batch):
        now, _, _ = fleet.end()
        begun += fleet.start(now, version, min(1, setting.batch - begun))
    return now


def _synchronous(setting: Setting, fleet: _Fleet, ages: list[int]) -> tuple[float, float, float]:
    now = waited = 0.0
    for version in range(setting.steps):
        there = _sampled(setting, fleet, now, version)
        waited += there - now
        now = there + setting.train_s + setting.sync_s
        ages += [0] * setting.batch
    return now, setting.steps * setting.train_s, waited


def _one_step_off(setting: Setting, fleet: _Fleet, ages: list[int]) -> tuple[float, float, float]:
    """The batch of update n is sampled with the weights before update n - 1 while that one is trained."""
    now = _sampled(setting, fleet, 0.0, 0)
    waited = now
    for version in range(setting.steps):
        ages += [min(version, 1)] * setting.batch
        trained = now + setting.train_s
        more = version + 1 < setting.steps
        there = _sampled(setting, fleet, now, version) if more else now
        waited += max(0.0, there - trained)
        now = max(trained, there) + setting.sync_s
    return now, setting.steps * setting.train_s, waited


def _bounded(setting: Setting, fleet: _Fleet, ages: list[int]) -> tuple[float, float, float]:
    """Update n trains the n-th batch of answers that were begun, so that none gets older than the bound."""
    now = waited = waiting_since = 0.0
    version, begun, training = 0, 0, math.inf
    ended: list[list[int]] = [[] for _ in range(setting.steps)]
    while version < setting.steps:
        most = min((version + setting.staleness + 1) * setting.batch, setting.steps * setting.batch) - begun
        begun += fleet.start(now, version, max(0, most))
        if training == math.inf and len(ended[version]) == setting.batch:
            ages += [version - began for began in ended[version]]
            waited += now - waiting_since
            training = now + setting.train_s
        if training <= fleet.next_end():
            now, training = training, math.inf
            version += 1
            fleet.pause(now, setting.sync_s)
            now = waiting_since = now + setting.sync_s
        else:
            now, number, began = fleet.end()
            ended[number // setting.batch].append(began)
    return now, setting.steps * setting.train_s, waited


def modes(staleness: int) -> Iterator[tuple[Mode, int]]:
    """The ways of working, each with its bound."""
    yield "synchronous", 0
    yield "one_step_off", 1
    yield "bounded", staleness
