import torch

from millrace.algorithms.losses import policy_loss_fn
from millrace.observe.metrics import METRICS, format_value
from millrace.observe.report import CURVES


def test_every_curve_and_every_metric_of_a_policy_loss_is_explained():
    names = {name: torch.zeros(3) for name in ("weight", "advantage", "rollout_logp", "reference_logp")}
    _, metrics = policy_loss_fn("ppo", kl_coefficient=0.1)(torch.zeros(3), names, torch.zeros(3, dtype=torch.int64))
    assert set(metrics) | set(CURVES) <= set(METRICS)


def test_numbers_are_written_with_the_digits_that_matter():
    assert format_value("lr", 3e-6) == "3.0e-06"
    assert format_value("mismatch/mean", 4.04e-7) == "4.0e-07"
    assert format_value("tokens", 12345.0) == "12,345"
    assert format_value("time/train", 1.234) == "1.2s"
    assert format_value("reward/mean", 0.5) == "0.500"
