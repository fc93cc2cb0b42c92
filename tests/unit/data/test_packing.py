import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.data.packing import pack, split_balanced

lengths_st = st.lists(st.integers(1, 64), max_size=60)


def first_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """The textbook's quadratic loop."""
    bins: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for members in bins:
            if sum(lengths[i] for i in members) + lengths[index] <= capacity:
                members.append(index)
                break
        else:
            bins.append([index])
    return [sorted(members) for members in bins]


@settings(deadline=None, max_examples=100)
@given(lengths_st, st.integers(64, 200))
def test_pack_is_first_fit_decreasing(lengths: list[int], capacity: int) -> None:
    assert pack(lengths, capacity) == first_fit_decreasing(lengths, capacity)


@settings(deadline=None, max_examples=100)
@given(lengths_st, st.integers(1, 9))
def test_split_balanced_uses_every_index_once_and_balances_within_grahams_bound(lengths: list[int], parts: int) -> None:
    split = split_balanced(lengths, parts)
    assert len(split) == parts
    assert sorted(i for part in split for i in part) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in part) for part in split]
    best_possible = max(sum(lengths) / parts, max(lengths, default=0))
    # Any greedy schedule stays within the mean plus one longest job.
    assert max(loads) <= sum(lengths) / parts + max(lengths, default=0) * (1 - 1 / parts) + 1e-9
    assert max(loads) <= 2 * best_possible


def test_pack_fills_bins_of_a_known_case() -> None:
    assert pack([4, 8, 1, 4, 2, 1], 10) == [[1, 4], [0, 2, 3, 5]]


def test_pack_of_nothing_is_no_bin() -> None:
    assert pack([], 8) == []


def test_pack_names_the_sequence_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"sequence 1 has 9 tokens, but a micro-batch holds 8.*max_tokens_per_micro"):
        pack([3, 9, 12], 8)


def test_pack_refuses_an_empty_sequence() -> None:
    with pytest.raises(ValueError, match="sequence 1 has 0 tokens"):
        pack([3, 0], 8)


def test_split_balanced_leaves_ranks_empty_when_there_are_too_few_sequences() -> None:
    assert split_balanced([5], 3) == [[0], [], []]


def test_split_balanced_gives_the_textbook_split() -> None:
    assert split_balanced([7, 6, 5, 4, 3], 2) == [[0, 3, 4], [1, 2]]


def test_a_hundred_thousand_sequences_pack_almost_without_waste() -> None:
    rng = random.Random(0)
    lengths = [min(8192, int(rng.lognormvariate(6.5, 1.0)) + 1) for _ in range(100_000)]
    bins = pack(lengths, 8192)
    assert sum(lengths) / (len(bins) * 8192) > 0.999
    loads = [sum(lengths[i] for i in part) for part in split_balanced(lengths, 64)]
    assert max(loads) / min(loads) < 1.0001
