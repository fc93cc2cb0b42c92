import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.data.curriculum import ChosenRows, choose_rows
from millrace.data.errors import DataError
from millrace.data.sampler import CurriculumSampler, EpochSampler, MixedSampler

GOLDEN = [2, 4, 7, 5, 0, 6, 3, 1, 3, 1, 7, 4, 5, 0, 2, 6]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 20), st.integers(0, 2**31), st.lists(st.integers(0, 30), max_size=8))
def test_an_epoch_holds_every_index_once_however_it_is_drawn(size: int, seed: int, draws: list[int]) -> None:
    sampler = EpochSampler(size, seed)
    drawn = [i for n in draws for i in sampler.next(n)]
    assert len(drawn) == sum(draws) == sampler.drawn
    for start in range(0, len(drawn) - size + 1, size):
        assert sorted(drawn[start : start + size]) == list(range(size))
    last = drawn[len(drawn) // size * size :]
    assert len(set(last)) == len(last)
    assert drawn == EpochSampler(size, seed).next(sum(draws))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(0, 40), st.integers(0, 40))
def test_a_restored_sampler_goes_on_exactly(size: int, before: int, after: int) -> None:
    sampler = EpochSampler(size, 7)
    sampler.next(before)
    restored = EpochSampler(size, 7)
    restored.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert restored.next(after) == sampler.next(after)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    sampler = EpochSampler(50, 1)
    first, second = sampler.next(50), sampler.next(50)
    assert first != second and first != EpochSampler(50, 2).next(50) and first != list(range(50))


def test_the_order_is_the_same_on_every_machine() -> None:
    assert EpochSampler(8, seed=1).next(16) == GOLDEN


def test_a_state_of_other_data_or_seed_is_refused() -> None:
    state = EpochSampler(5, 1).state_dict()
    with pytest.raises(DataError, match=r"sampler has size 5, but .* give 6"):
        EpochSampler(6, 1).load_state_dict(state)
    with pytest.raises(DataError, match=r"sampler has seed 1, but .* give 2"):
        EpochSampler(5, 2).load_state_dict(state)


def test_nothing_to_draw_from_is_refused() -> None:
    with pytest.raises(DataError, match="without rows"):
        EpochSampler(0, 1)
    with pytest.raises(DataError, match="no domains"):
        MixedSampler({}, 1)


sizes_st = st.dictionaries(st.sampled_from("abcde"), st.integers(1, 12), min_size=1)


@settings(deadline=None, max_examples=60)
@given(sizes_st, st.integers(0, 60))
def test_every_domain_keeps_to_its_share_up_to_rounding(sizes: dict[str, int], n: int) -> None:
    drawn = MixedSampler(sizes, 3).next(n)
    counts, total = Counter(name for name, _ in drawn), sum(sizes.values())
    for name, size in sizes.items():
        assert abs(counts[name] - n * size / total) < max(1, len(sizes) - 1)


@settings(deadline=None, max_examples=60)
@given(sizes_st)
def test_all_domains_end_their_epoch_together(sizes: dict[str, int]) -> None:
    drawn = MixedSampler(sizes, 3).next(sum(sizes.values()))
    assert sorted(drawn) == sorted((name, i) for name, size in sizes.items() for i in range(size))


@settings(deadline=None, max_examples=40)
@given(sizes_st, st.integers(0, 40))
def test_a_restored_mix_goes_on_exactly(sizes: dict[str, int], before: int) -> None:
    sampler = MixedSampler(sizes, 3)
    sampler.next(before)
    restored = MixedSampler(dict(reversed(sizes.items())), 3)
    restored.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert restored.next(30) == sampler.next(30)


def test_domains_of_one_size_are_shuffled_apart() -> None:
    drawn = MixedSampler({"a": 30, "b": 30}, 3).next(60)
    assert [i for name, i in drawn if name == "a"] != [i for name, i in drawn if name == "b"]


def test_a_mix_of_other_domains_is_refused() -> None:
    with pytest.raises(DataError, match="draws from a, b, the stage from a, c"):
        MixedSampler({"a": 1, "c": 1}, 1).load_state_dict(MixedSampler({"a": 1, "b": 1}, 1).state_dict())


rates_st = st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=1, max_size=12)


def easy_to_hard(rates: list[float], above: float | None = None) -> ChosenRows:
    return choose_rows(rates, above=above, below=None, easy_to_hard=True)


@settings(deadline=None, max_examples=60)
@given(rates_st, st.integers(1, 3), st.integers(1, 7))
def test_a_curriculum_goes_from_easy_to_hard_and_then_starts_again(rates: list[float], epochs: int, n: int) -> None:
    sampler = CurriculumSampler(easy_to_hard(rates), seed=3)
    drawn: list[int] = []
    while len(drawn) < epochs * len(rates):
        drawn += sampler.next(n)
    for start in range(0, epochs * len(rates), len(rates)):
        epoch = drawn[start : start + len(rates)]
        assert sorted(epoch) == list(range(len(rates)))
        assert [rates[row] for row in epoch] == sorted(rates, reverse=True)


def test_rows_of_one_pass_rate_are_shuffled_by_seed_and_epoch() -> None:
    chosen = easy_to_hard([1.0] * 20 + [0.5] * 20)
    sampler = CurriculumSampler(chosen, seed=3)
    first, second = sampler.next(40), sampler.next(40)
    assert first != second and first != CurriculumSampler(chosen, seed=4).next(40)
    assert set(first[:20]) == set(second[:20]) == set(range(20))


def test_rows_that_were_left_out_are_never_drawn() -> None:
    chosen = choose_rows([0.0, 0.5, 1.0, 0.25], above=0, below=1, easy_to_hard=False)
    assert set(CurriculumSampler(chosen, seed=3).next(20)) == {1, 3}


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.sampled_from("abc"), rates_st, min_size=1), st.integers(0, 40))
def test_mixed_curricula_keep_their_shares_and_each_its_order(rates: dict[str, list[float]], n: int) -> None:
    drawn = MixedSampler({name: easy_to_hard(rates[name]) for name in rates}, 3).next(n)
    plain = MixedSampler({name: len(rates[name]) for name in rates}, 3).next(n)
    assert [name for name, _ in drawn] == [name for name, _ in plain]
    for name in rates:
        rows = [row for domain, row in drawn if domain == name][: len(rates[name])]
        assert [rates[name][row] for row in rows] == sorted(rates[name], reverse=True)[: len(rows)]


@settings(deadline=None, max_examples=40)
@given(rates_st, st.integers(0, 40))
def test_a_restored_curriculum_goes_on_exactly(rates: list[float], before: int) -> None:
    rows = {"a": easy_to_hard(rates), "b": 7}
    sampler, restored = MixedSampler(rows, 3), MixedSampler(rows, 3)
    sampler.next(before)
    restored.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert restored.next(30) == sampler.next(30)


def test_a_state_of_another_curriculum_is_refused() -> None:
    state = CurriculumSampler(easy_to_hard([0.5, 0.75]), 1).state_dict()
    for other in (easy_to_hard([0.75, 0.5]), easy_to_hard([0.0, 0.5, 0.75], above=0)):
        with pytest.raises(DataError, match="drew other rows or in another order"):
            CurriculumSampler(other, 1).load_state_dict(state)
    with pytest.raises(DataError, match="drew other rows or in another order"):
        CurriculumSampler(easy_to_hard([0.5, 0.75]), 1).load_state_dict(EpochSampler(2, 1).state_dict())
