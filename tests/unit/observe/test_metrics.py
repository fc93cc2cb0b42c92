from pathlib import Path

import torch
from sample_run import write_sample_run

from millrace.algorithms.losses import policy_loss_fn
from millrace.observe.lines import read_lines
from millrace.observe.metrics import METRICS, find_metric, format_value, metrics_page
from millrace.observe.report.curves import CHARTS

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"


def test_every_curve_and_every_metric_of_a_policy_loss_is_explained():
    names = {name: torch.zeros(3) for name in ("weight", "advantage", "rollout_logp", "reference_logp")}
    _, metrics = policy_loss_fn("ppo", kl_coefficient=0.1)(torch.zeros(3), names, torch.zeros(3, dtype=torch.int64))
    assert set(metrics) | {name for chart in CHARTS for name in chart.metrics} <= set(METRICS)


def test_every_metric_of_a_run_is_explained(tmp_path):
    rows = read_lines(write_sample_run(tmp_path, answers=False) / "metrics.jsonl")
    names = {name for row in rows for name in row} - {"step", "stage"}
    assert {"reverse_kl/mcqa", "taught/chat", "reward/math"} <= names
    assert [name for name in names if find_metric(name) is None] == []


def test_a_metric_is_found_by_its_own_name_before_its_family_s():
    assert find_metric("reward/length") is METRICS["reward/length"]
    assert find_metric("reward/code") is METRICS["reward/DOMAIN"]
    assert find_metric("judge/failed") is METRICS["judge/failed"]
    assert find_metric("groups/unknown") is None and find_metric("unknown") is None


def test_the_page_of_metrics_is_the_one_in_the_code():
    assert PAGE.read_text(encoding="utf-8") == metrics_page(), "millrace report --metrics > docs/metrics.md"


def test_no_cell_of_the_page_of_metrics_is_torn_by_a_bar():
    rows = metrics_page().split("|---|---|---|---|\n")[1].splitlines()
    assert len(rows) == len(METRICS) and all(row.count("|") == 5 for row in rows)


def test_numbers_are_written_with_the_digits_that_matter():
    assert format_value("lr", 3e-6) == "3.0e-06"
    assert format_value("mismatch/mean", 4.04e-7) == "4.0e-07"
    assert format_value("tokens", 12345.0) == "12,345"
    assert format_value("time/train", 1.234) == "1.2s"
    assert format_value("reward/mean", 0.5) == "0.500"
    assert format_value("flops", 1.25e12) == "1.25e+12"
