from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from millrace.planning.simulate import Lengths, Mode, Setting, simulate

ALIKE = Lengths(mean=100, longest=100, measured=(100,))


def setting(**changes: object) -> Setting:
    given = {
        "mode": "synchronous",
        "engines": 2,
        "slots": 8,
        "step_time": lambda running: 0.01 + 0.001 * running,
        "prefill_s": 0.0,
        "batch": 16,
        "lengths": ALIKE,
        "train_s": 3.0,
        "sync_s": 0.5,
        "steps": 4,
    }
    return Setting(**(given | changes))  # type: ignore[arg-type]


def test_answers_of_one_length_end_together_at_the_speed_of_full_engines() -> None:
    outcome = simulate(setting())
    assert outcome.rollout_s == pytest.approx(100 * 0.018)
    assert outcome.step_s == pytest.approx(100 * 0.018 + 3.0 + 0.5)
    assert outcome.trainer_idle == pytest.approx(1 - 3.0 / outcome.step_s)
    assert outcome.fleet_idle == pytest.approx(1 - 1.8 / outcome.step_s)
    assert outcome.tokens_s == pytest.approx(1600 / outcome.step_s)
    assert (outcome.staleness, outcome.largest_staleness) == (0.0, 0)


def test_what_finds_no_slot_waits_for_one() -> None:
    outcome = simulate(setting(engines=1, batch=16, slots=8))
    assert outcome.rollout_s == pytest.approx(2 * 100 * 0.018), "two waves of eight"


def test_an_engine_gets_faster_as_its_answers_end() -> None:
    lengths = Lengths(mean=100, longest=200, measured=(100, 200))
    seed = next(seed for seed in range(100) if len(set(drawn(lengths, seed))) == 2)
    first, second = sorted(drawn(lengths, seed))
    outcome = simulate(setting(engines=1, slots=2, batch=2, lengths=lengths, steps=1, seed=seed))
    assert outcome.rollout_s == pytest.approx(first * 0.012 + (second - first) * 0.011)


def drawn(lengths: Lengths, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [lengths.draw(generator) for _ in range(2)]


def test_one_step_off_hides_the_shorter_of_rollout_and_training() -> None:
    outcome = simulate(setting(mode="one_step_off", steps=50))
    assert outcome.step_s == pytest.approx(3.0 + 0.5, rel=0.02), "training is the longer one"
    assert outcome.largest_staleness == 1
    assert simulate(setting(mode="one_step_off", steps=50, train_s=0.5)).step_s == pytest.approx(1.8 + 0.5, rel=0.02)


@pytest.mark.parametrize("bound", [0, 1, 2, 4])
def test_no_answer_is_older_than_the_bound(bound: int) -> None:
    lengths = Lengths(mean=300, longest=4000, spread=1.2)
    outcome = simulate(setting(mode="bounded", staleness=bound, lengths=lengths, steps=20, slots=64, train_s=1.0))
    assert outcome.largest_staleness <= bound
    assert (outcome.staleness > 0) == (bound > 0)


def test_more_freedom_never_costs_throughput() -> None:
    lengths = Lengths(mean=300, longest=2000)
    step = [
        simulate(setting(mode="bounded", staleness=bound, lengths=lengths, steps=20)).step_s for bound in (0, 1, 2, 4)
    ]
    assert step == sorted(step, reverse=True)


@pytest.mark.parametrize("mode", ["synchronous", "one_step_off", "bounded"])
def test_the_same_seed_gives_the_same_outcome(mode: Mode) -> None:
    one = setting(mode=mode, lengths=Lengths(mean=300, longest=2000))
    assert simulate(one) == simulate(one)
    assert simulate(one) != simulate(replace(one, seed=2))


def test_drawn_lengths_have_their_mean() -> None:
    lengths, generator = Lengths(mean=1000, longest=10**6), random.Random(1)
    drawn = [lengths.draw(generator) for _ in range(20_000)]
    assert sum(drawn) / len(drawn) == pytest.approx(1000, rel=0.03)


@pytest.mark.parametrize("gpus", [8, 128, 1024, 16384])
def test_fleets_of_every_size_are_simulated_in_seconds(gpus: int) -> None:
    engines = gpus // 8
    one = setting(engines=engines, slots=16, batch=16 * engines, lengths=Lengths(mean=2000, longest=16384), steps=2)
    started = time.process_time()
    outcome = simulate(one)
    assert time.process_time() - started < 10
    assert 0 < outcome.fleet_idle < 1 and outcome.tokens_s > 0


def test_the_prompt_is_read_before_the_first_token() -> None:
    read: Callable[[float], float] = lambda s: simulate(setting(prefill_s=s, steps=1)).rollout_s  # noqa: E731
    assert read(0.5) > read(0.0) + 0.4
