import random

import pytest

from millrace.evaluation.pass_rate import pass_rate


def test_pass_rate_is_the_mean_over_prompts():
    rate = pass_rate([[1, 0, 1, 0], [1, 1, 1, 1]])
    assert rate.pass_rate == 0.75
    assert (rate.prompts, rate.answers) == (2, 8)


def test_more_answers_to_the_same_prompts_do_not_narrow_the_interval_when_they_agree():
    few = pass_rate([[1], [0], [1], [1], [0]])
    many = pass_rate([[1] * 50, [0] * 50, [1] * 50, [1] * 50, [0] * 50])
    assert many.half_width == pytest.approx(few.half_width)


def test_the_interval_covers_the_truth_about_19_times_in_20():
    draw = random.Random(3)
    covered = 0
    for _ in range(1000):
        rate = pass_rate([[float(draw.random() < 0.6) for _ in range(2)] for _ in range(100)])
        covered += abs(rate.pass_rate - 0.6) <= rate.half_width
    assert 920 <= covered <= 975


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_prompts_that_all_agree_are_not_certain(reward):
    # Wilson's interval of 0 of 20 is 0 to 0.161
    assert pass_rate([[reward] * 4] * 20).half_width == pytest.approx(0.161 / 2, abs=1e-3)
    assert pass_rate([[reward]] * 2000).half_width == pytest.approx(0.00096, abs=1e-5)


def test_one_prompt_has_no_known_spread():
    assert pass_rate([[1, 1, 0]]).half_width == 1.0
