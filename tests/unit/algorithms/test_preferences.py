import pytest

from millrace.algorithms.preferences import (
    LOWEST_BASE,
    UNDECIDED,
    Judgement,
    base_rewards,
    bonus_threshold,
    comparison_pairs,
    comparison_scores,
    length_rewards,
    preference_rewards,
    shortest_bonus,
    win_rate,
)

NO_LENGTHS = dict(think_length_weight=0.0, answer_length_weight=0.0, think_bonus=0.0, answer_bonus=0.0, bonus_share=0.2)


def test_sixteen_answers_give_120_pairs_or_16_around_a_circle_and_twice_as_many_in_both_orders():
    assert len(comparison_pairs(16, pairing="all_pairs", both_orders=False)) == 120
    assert len(comparison_pairs(16, pairing="circular", both_orders=False)) == 16
    assert len(comparison_pairs(16, pairing="all_pairs", both_orders=True)) == 240


def test_the_pairs_of_a_small_group_written_out():
    assert comparison_pairs(3, pairing="all_pairs", both_orders=False) == [(0, 1), (0, 2), (1, 2)]
    assert comparison_pairs(4, pairing="circular", both_orders=False) == [(0, 1), (1, 2), (2, 3), (3, 0)]
    assert comparison_pairs(3, pairing="circular", both_orders=True) == [
        *((0, 1), (1, 2), (2, 0)),
        *((1, 0), (2, 1), (0, 2)),
    ]


@pytest.mark.parametrize("pairing", ["all_pairs", "circular"])
def test_two_answers_are_one_pair_and_one_answer_is_none(pairing):
    assert comparison_pairs(2, pairing=pairing, both_orders=True) == [(0, 1), (1, 0)]
    assert comparison_pairs(1, pairing=pairing, both_orders=True) == []
    assert comparison_pairs(0, pairing=pairing, both_orders=True) == []


@pytest.mark.parametrize(
    ("judgement", "scores"),
    [
        (Judgement(4, 2, 6), (4, 2)),  # scores that differ stand, whatever the ranking says
        (Judgement(3, 3, 1), (5.5, 0.5)),
        (Judgement(4, 4, 4), (3.5, 4.5)),
        (Judgement(1, 1, 6), (-1.5, 3.5)),
        (UNDECIDED, (3, 3)),
    ],
)
def test_the_ranking_breaks_ties_and_nothing_else(judgement, scores):
    assert comparison_scores(judgement) == scores


def test_base_rewards_worked_by_hand():
    # 0 before 1: 4 to 2. 0 before 2: both 3, ranking 2, so 4.5 to 1.5. 1 before 2: both 5, ranking 5, so 3.5 to 6.5.
    pairs = [(0, 1), (0, 2), (1, 2)]
    judgements = [Judgement(4, 2, 2), Judgement(3, 3, 2), Judgement(5, 5, 5)]
    assert base_rewards(3, pairs, judgements) == [(4 + 4.5) / 2, (2 + 3.5) / 2, (1.5 + 6.5) / 2]


def test_in_the_swapped_order_the_ranking_is_seen_from_the_other_side():
    seen, swapped = base_rewards(2, [(0, 1)], [Judgement(3, 3, 2)]), base_rewards(2, [(1, 0)], [Judgement(3, 3, 5)])
    assert seen == swapped == [4.5, 1.5]


def test_a_judge_that_always_likes_the_first_answer_favours_none_in_both_orders():
    pairs = comparison_pairs(5, pairing="all_pairs", both_orders=True)
    assert len(set(base_rewards(5, pairs, [Judgement(5, 2, 1)] * len(pairs)))) == 1


def test_an_answer_without_a_comparison_gets_the_middle_of_the_scale():
    assert base_rewards(1, [], []) == [3.0]


def test_length_rewards_worked_by_hand():
    # w = 1, 0.75, 0; their mean is 7/12
    assert length_rewards([100, 200, 500]) == pytest.approx([5 / 12, 2 / 12, -7 / 12])
    assert length_rewards([7, 7, 7]) == [0.0, 0.0, 0.0]
    assert length_rewards([0]) == [0.0]


def test_the_threshold_is_the_reward_at_the_place_of_the_share():
    sixteen = [float(n) for n in range(16)]  # int(16 * 0.2) - 1 = 2 of 15, 14, 13, ...
    assert bonus_threshold(sixteen, 0.2) == 13.0
    assert bonus_threshold([float(n) for n in range(100)], 0.29) == 71.0


def test_in_a_group_too_small_for_the_share_only_the_best_may_get_a_bonus():
    assert bonus_threshold([1.0, 4.0, 2.0, 3.0], 0.2) == 4.0  # place -1 would be the worst one, which all pass


@pytest.mark.parametrize(
    ("lengths", "bases", "bonuses"),
    [
        ([9, 5, 7, 8, 6], [1, 5, 2, 3, 4], [0, 0.5, 0, 0, 0]),  # the shortest is the best
        ([9, 5, 7, 8, 6], [5, 1, 2, 3, 4], [0, 0, 0, 0, 0]),  # it is not, and no other takes its place
        ([0, 5, 7, 8, 6], [1, 5, 2, 3, 4], [0, 0.5, 0, 0, 0]),  # an empty one is no short one
        ([0, 0, 0, 0, 0], [1, 5, 2, 3, 4], [0, 0, 0, 0, 0]),
        ([5, 5, 5, 8, 6], [5, 5, 2, 3, 4], [0.5, 0.5, 0, 0, 0]),  # equal answers are treated alike
    ],
)
def test_the_bonus_goes_to_the_shortest_answer_if_it_is_good(lengths, bases, bonuses):
    assert shortest_bonus(lengths, bases, amount=0.5, share=0.2) == bonuses


def test_a_whole_group_worked_by_hand():
    # Answer 1 is the best (threshold: the best of 5), has the shortest final text and the second shortest reasoning.
    rewards = preference_rewards(
        [2.0, 5.0, 3.0, 1.0, 4.0],
        [10, 20, 50, 30, 40],  # w = 1, .75, 0, .5, .25; mean 0.5
        [90, 10, 50, 30, 70],  # w = 0, 1, .5, .75, .25; mean 0.5
        think_length_weight=0.5,
        answer_length_weight=0.5,
        think_bonus=0.5,
        answer_bonus=0.5,
        bonus_share=0.2,
    )
    assert [reward.bonus for reward in rewards] == [0, 0.5, 0, 0, 0]
    assert [reward.think_length for reward in rewards] == [0.25, 0.125, -0.25, 0, -0.125]
    assert [reward.answer_length for reward in rewards] == [-0.25, 0.25, 0, 0.125, -0.125]
    assert [reward.value for reward in rewards] == [2.0, 5.875, 2.75, 1.125, 3.75]


@pytest.mark.parametrize("base", [LOWEST_BASE, 3.0])
def test_an_unfinished_answer_is_never_better_than_a_finished_one(base):
    rewards = preference_rewards(
        [base, None, 5.0],
        [4000, 10, 300],
        [900, 0, 90],
        think_length_weight=0.5,
        answer_length_weight=0.5,
        think_bonus=0.5,
        answer_bonus=0.5,
        bonus_share=1.0,
    )
    long, unfinished, good = (reward.value for reward in rewards)
    assert rewards[1].base == LOWEST_BASE == -1.5 and rewards[1].bonus == 0
    assert unfinished <= long < good
    assert rewards[1].think_length == rewards[0].think_length  # it counts as the longest


def test_a_group_without_any_finished_answer_has_equal_rewards():
    rewards = preference_rewards([None, None], [5, 9], [0, 0], **NO_LENGTHS)
    assert [reward.value for reward in rewards] == [LOWEST_BASE, LOWEST_BASE]


@pytest.mark.parametrize(
    ("forward", "swapped", "rate"),
    [(1, 6, 1.0), (3, 3, 0.5), (4, 4, 0.5), (6, 1, 0.0), (2, 3.5, 0.75), (3.5, 3.5, 0.5), (3.5, 2, 0.25)],
)
def test_the_win_rate_sees_an_answer_in_both_places(forward, swapped, rate):
    assert win_rate(Judgement(3, 3, forward), Judgement(3, 3, swapped)) == rate
