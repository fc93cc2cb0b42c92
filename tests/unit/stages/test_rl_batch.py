import pytest
import torch

from millrace.config.schema import AdvantageConfig, MismatchConfig, PolicyLossConfig, RlStage
from millrace.stages.collect import rollout_metrics
from millrace.stages.rl import MismatchTooLarge, mismatch_guard, policy_batch, step_metrics

from .answers import group


def stage(**settings) -> RlStage:
    return RlStage(name="rl", domains=("math",), steps=1, **settings)


def test_weights_of_a_batch_sum_to_one_over_answer_tokens_only():
    batch = policy_batch([group([0.0, 1.0], lengths=[2, 4]), group([1.0, 0.0], lengths=[1, 1])], stage())
    weight, mask = batch.streams["weight"], batch.streams["mask"]
    assert batch.lengths.tolist() == [5, 7, 4, 4]
    assert mask.sum() == 8
    torch.testing.assert_close(weight, mask / 8)
    assert weight[batch.offsets[:-1]].abs().sum() == 0


def test_sequence_aggregation_gives_each_answer_the_same_weight():
    loss = PolicyLossConfig(aggregation="sequence")
    batch = policy_batch([group([0.0, 1.0], lengths=[2, 4])], stage(loss=loss))
    per_answer = [w.sum().item() for w in batch.streams["weight"].split(batch.lengths.tolist())]
    assert per_answer == pytest.approx([0.5, 0.5])


def test_every_token_of_an_answer_has_its_groups_normalised_reward():
    advantage = AdvantageConfig(baseline="mean", scale="none")
    batch = policy_batch([group([0.0, 1.0, 1.0, 1.0])], stage(advantage=advantage))
    first, *others = batch.streams["advantage"].split(batch.lengths.tolist())
    assert first.tolist() == [0.0, 0.0, 0.0, -0.75, -0.75]
    assert all(other.tolist() == [0.0, 0.0, 0.0, 0.25, 0.25] for other in others)


def test_rollout_log_probs_stand_at_the_answers_tokens():
    batch = policy_batch([group([0.0, 1.0], lengths=[2, 3])], stage())
    assert batch.streams["rollout_logp"].tolist() == [0, 0, 0, -0.25, -0.5, 0, 0, 0, -0.25, -0.5, -0.75]


def test_filtered_overlong_answers_stay_in_the_baseline_and_leave_the_loss():
    groups = [group([0.0, 1.0], finish=["length", "stop"])]
    kept = policy_batch(groups, stage())
    filtered = policy_batch(groups, stage(overlong="filter"))
    assert filtered.streams["mask"].tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 1, 1]
    torch.testing.assert_close(filtered.streams["advantage"], kept.streams["advantage"])


def test_metrics_count_dropped_groups_and_overlong_answers():
    groups = [group([1.0, 1.0]), group([0.0, 1.0], finish=["length", "stop"], domain="if", lengths=[4, 2])]
    metrics = rollout_metrics(groups)
    assert metrics["reward/mean"] == 0.75
    assert metrics["groups/without_variance"] == 0.5
    assert metrics["reward/overlong"] == 0.25
    assert metrics["reward/length"] == 2.5
    assert metrics["reward/if"] == 0.5


@pytest.mark.parametrize("found", [0.6, float("nan")])
def test_a_mismatch_over_the_limit_stops_with_the_key_to_change(found):
    guard = mismatch_guard(stage(mismatch=MismatchConfig(stop_above=0.5)))
    with pytest.raises(MismatchTooLarge, match=r"stages\.rl\.mismatch\.stop_above = 0\.5"):
        guard({"mismatch/mean": found})
    guard({"mismatch/mean": 0.4})


def test_no_limit_never_stops():
    mismatch_guard(stage(mismatch=MismatchConfig(stop_above=None)))({"mismatch/mean": 9.0})


def test_a_step_of_several_updates_counts_all_its_tokens():
    updates = [{"loss": 1.0, "tokens": 30.0, "micro_batches": 2.0}, {"loss": 0.5, "tokens": 10.0, "micro_batches": 1.0}]
    assert step_metrics(updates) == {"loss": 0.75, "tokens": 40.0, "micro_batches": 3.0}
    assert step_metrics(updates[:1]) == updates[0]
