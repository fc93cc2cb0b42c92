import math

import pytest

from millrace.cascade.gates import has_gate, judge, strongest
from millrace.config.schema import GateConfig

from .campaign import recipe, row

START, SFT = row("start", 0.1, 0.1, 0.1), row("sft", 0.6, 0.3, 0.2)


def verdict(gate: GateConfig, after, *, earlier=(START,), fallbacks=(START,)):
    campaign = recipe(rl_if=gate)
    return judge(campaign.stages[1], campaign, after, SFT, earlier, fallbacks)


def test_a_gain_of_the_own_domain_and_a_drop_of_each_other_one_are_checked():
    found = verdict(GateConfig(min_gain=5, max_drop=2), row("rl-if", 0.59, 0.4, 0.2))
    assert [(c.domain, c.kind) for c in found.checks] == [("if", "gain"), ("math", "drop"), ("chat", "drop")]
    assert found.passed and found.action == "none" and found.result == "rl-if"
    assert found.checks[0].change == pytest.approx(10)
    assert found.checks[0].half_width == pytest.approx(100 * math.hypot(0.05, 0.05))


def test_a_drop_beyond_the_limit_fails_and_says_which_domain_and_what_follows():
    found = verdict(GateConfig(max_drop=5), row("rl-if", 0.45, 0.4, 0.2))
    assert not found.passed and found.action == "stop"
    assert found.reason == (
        "gate of rl-if failed against sft: math -15.0 ±7.1 points (no less than -5); "
        "the run stops here, as its recipe says"
    )


@pytest.mark.parametrize(("gain", "passed"), [(0.049, False), (0.05, True)])
def test_a_limit_that_is_just_reached_is_reached(gain, passed):
    assert verdict(GateConfig(min_gain=5), row("rl-if", 0.6, 0.3 + gain, 0.2)).passed is passed


def test_a_certain_gate_fails_only_when_the_whole_interval_lies_beyond_the_limit():
    within, beyond = row("rl-if", 0.50, 0.3, 0.2), row("rl-if", 0.45, 0.3, 0.2)
    assert not verdict(GateConfig(max_drop=5), within).passed
    assert verdict(GateConfig(max_drop=5, certain=True), within).passed
    assert not verdict(GateConfig(max_drop=5, certain=True), beyond).passed


def test_against_best_each_domain_is_compared_with_its_own_best():
    better = row("chat", 0.2, 0.5, 0.9)
    found = verdict(GateConfig(max_drop=5, against="best"), row("rl-if", 0.6, 0.3, 0.3), earlier=(START, better))
    assert {c.domain: round(c.change) for c in found.checks} == {"math": 0, "chat": -60}
    assert found.compared_with == "best" and "against the best so far" in found.reason


def test_a_domain_that_came_later_than_the_baseline_is_not_compared():
    old = row("sft", 0.6, 0.3)
    campaign = recipe(rl_if=GateConfig(min_gain=1, max_drop=1))
    found = judge(campaign.stages[1], campaign, row("rl-if", 0.6, 0.4, 0.0), old, (), ())
    assert [c.domain for c in found.checks] == ["if", "math"] and found.passed


def test_named_domains_replace_the_stages_own():
    gate = GateConfig(min_gain=1, own=("chat",), max_drop=1, others=("math",))
    found = verdict(gate, row("rl-if", 0.6, 0.0, 0.3))
    assert [(c.domain, c.kind) for c in found.checks] == [("chat", "gain"), ("math", "drop")] and found.passed


def test_going_back_takes_the_strongest_weights_that_are_left():
    middle = row("rl-if@2", 0.6, 0.6, 0.2)
    gate = GateConfig(max_drop=1, on_failure="back")
    found = verdict(gate, row("rl-if", 0.2, 0.9, 0.2), fallbacks=(START, middle))
    assert (found.action, found.result) == ("back", "rl-if@2")
    assert found.reason.endswith("later stages start from rl-if@2 instead, as its recipe says")
    assert verdict(gate, row("rl-if", 0.2, 0.9, 0.2), fallbacks=(START,)).result == "sft"


def test_a_warning_keeps_the_stages_own_end():
    found = verdict(GateConfig(max_drop=1, on_failure="warn"), row("rl-if", 0.2, 0.9, 0.2))
    assert (found.action, found.result) == ("warn", "rl-if")


def test_of_equal_rows_the_earliest_is_the_strongest():
    assert strongest([row("a", 0.1, 0.3), row("b", 0.3, 0.1)]).label == "a"


def test_a_gate_without_limits_is_none():
    stages = recipe(sft=GateConfig(min_gain=0.0, own=("math",))).stages
    assert [has_gate(stage) for stage in stages] == [True, False, False, False, False]
