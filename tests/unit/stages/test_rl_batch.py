import pytest
import torch

from millrace.config.schema import AdvantageConfig, MismatchConfig, PolicyLossConfig, RlStage
from millrace.observe.metrics import METRICS
from millrace.stages.batches import answer_advantages
from millrace.stages.collect import has_variance, rollout_metrics
from millrace.stages.rl import MismatchTooLarge, mismatch_guard, policy_batch, step_metrics
from millrace.stages.verdicts import TooManyMasked, masked, require_unmasked

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


def test_tokens_of_the_environment_have_no_part_in_the_loss():
    turns = group([0.0, 1.0], lengths=[6, 6], given=[(2, 4)])
    batch = policy_batch([turns], stage(advantage=AdvantageConfig(scale="none")))
    own = [0, 0, 0, 1, 1, 0, 0, 1, 1]
    assert batch.streams["mask"].tolist() == own * 2
    assert batch.streams["advantage"].tolist() == [-0.5 * each for each in own] + [0.5 * each for each in own]
    torch.testing.assert_close(batch.streams["weight"], batch.streams["mask"] / 8)
    assert batch.streams["rollout_logp"].tolist() == [0, 0, 0, -0.25, -0.5, 0, 0, -1.25, -1.5] * 2


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_masked_answers_are_left_out_of_the_loss_and_of_the_baseline(baseline):
    config = AdvantageConfig(baseline=baseline)
    with_masked = group([1.0, 0.0, 1.0, 0.0], masked=[1])
    advantages = answer_advantages([with_masked, group([0.0, 1.0])], config)
    alone = answer_advantages([group([1.0, 1.0, 0.0])], config)
    assert advantages[:4] == [alone[0], 0.0, alone[1], alone[2]]
    assert advantages[4:] == answer_advantages([group([0.0, 1.0])], config)
    batch = policy_batch([with_masked], stage(advantage=config))
    per_answer = [mask.sum().item() for mask in batch.streams["mask"].split(batch.lengths.tolist())]
    assert per_answer == [2, 0, 2, 2]


def test_a_group_with_fewer_than_two_unmasked_answers_has_no_gradient():
    for out in ([0, 1, 2], [0, 1]):
        lonely = group([1.0, 0.0, 1.0], masked=out)
        assert answer_advantages([lonely], AdvantageConfig()) == [0.0] * 3
        assert not has_variance(lonely)
    assert has_variance(group([1.0, 0.0, 1.0], masked=[2]))
    assert not has_variance(group([1.0, 0.0, 1.0], masked=[1]))


def test_metrics_tell_turns_cuts_and_masked_answers():
    groups = [
        group([1.0, 0.0], lengths=[6, 6], given=[(2, 4)], masked=[1], cut="turns"),
        group([0.0, 0.0], lengths=[9, 9], given=[(1, 2), (3, 7)], finish="length", cut="context", domain="tools"),
        group([1.0, 1.0], domain="if"),
    ]
    metrics = rollout_metrics(groups)
    assert metrics["reward/mean"] == pytest.approx(3 / 5) and metrics["reward/math"] == 1.0
    assert metrics["reward/masked"] == pytest.approx(1 / 6)
    assert metrics["reward/length"] == pytest.approx((4 + 4 + 4 + 4 + 2 + 2) / 6)
    assert metrics["tokens/sampled"] == 3 * 3 + 6 + 6 + 9 + 9 + 2 + 2
    assert (metrics["episode/turns"], metrics["episode/most_turns"]) == (2.5, 3.0)
    assert metrics["episode/environment_tokens"] == 3.5
    assert (metrics["episode/cut_turns"], metrics["episode/cut_context"], metrics["episode/cut_time"]) == (0.5, 0.5, 0)
    assert {name for name in metrics if name.startswith("episode/")} <= METRICS.keys()
    assert not any(name.startswith("episode/") for name in rollout_metrics(groups[2:]))


def test_a_batch_most_of_which_is_masked_stops_the_run_with_the_commonest_reason():
    good, bad = group([1.0] * 4, masked=[0, 1]), group([1.0] * 4, masked=[0, 1, 2], domain="code")
    require_unmasked("math", [good, bad], "rl 1/2 rollouts")
    assert masked("math", [good, bad]) == "2 of 4 answers in math are masked, most often: correct"
    assert masked("if", [good, bad]) is None
    with pytest.raises(TooManyMasked, match=r"rl 1/2 rollouts: 3 of 4 answers in code are masked, most often: correct"):
        require_unmasked("code", [good, bad], "rl 1/2 rollouts")
