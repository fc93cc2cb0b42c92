import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.algorithms.advantages import group_advantages

rewards_st = st.integers(2, 8).flatmap(
    lambda size: st.lists(
        st.lists(st.sampled_from([0.0, 0.1, 0.3, 1.0, -1.0]), min_size=size, max_size=size), min_size=1
    )
)


def by_loop(rewards: list[list[float]], baseline: str, scale: str, eps: float = 1e-6) -> list[list[float]]:
    """One answer at a time, in numpy."""
    out = []
    for group in rewards:
        row = []
        for i, reward in enumerate(group):
            peers = group if baseline == "mean" else group[:i] + group[i + 1 :]
            value = reward - float(np.mean(peers))
            varied = len(set(peers)) > 1
            row.append(value / (float(np.std(peers, ddof=1)) + eps) if scale == "std" and varied else value)
        out.append(row if len(set(group)) > 1 else [0.0] * len(group))
    return out


@settings(deadline=None, max_examples=60)
@given(rewards_st, st.sampled_from(["mean", "leave_one_out"]), st.sampled_from(["std", "none"]))
def test_advantages_equal_the_loop_reference(rewards: list[list[float]], baseline: str, scale: str) -> None:
    got = group_advantages(torch.tensor(rewards, dtype=torch.float64), baseline=baseline, scale=scale)
    np.testing.assert_allclose(got.numpy(), by_loop(rewards, baseline, scale), atol=1e-12, rtol=1e-12)


@settings(deadline=None, max_examples=60)
@given(rewards_st, st.floats(-3, 3), st.floats(0.1, 10))
def test_advantages_do_not_see_an_affine_change_of_the_rewards(
    rewards: list[list[float]], shift: float, factor: float
) -> None:
    plain = torch.tensor(rewards, dtype=torch.float64)
    got = group_advantages(plain * factor + shift, eps=0.0)
    torch.testing.assert_close(got, group_advantages(plain, eps=0.0), atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(got.sum(dim=1), torch.zeros(len(rewards), dtype=torch.float64), atol=1e-8, rtol=0)


def test_golden_values_of_one_solved_answer_in_four() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(  # sample std of (1, 0, 0, 0) is 0.5
        group_advantages(rewards), torch.tensor([[1.5, -0.5, -0.5, -0.5]], dtype=torch.float64), atol=1e-5, rtol=0
    )
    third = -1 / 3 / (1 / 3) ** 0.5
    expected = torch.tensor([[1.0, third, third, third]], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(rewards, baseline="leave_one_out"), expected, atol=1e-5, rtol=0)
    expected = torch.tensor([[0.75, -0.25, -0.25, -0.25]], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(rewards, scale="none"), expected)


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_without_variance_gets_exactly_zero(baseline: str, dtype: torch.dtype) -> None:
    # The mean of seven 0.1s is not 0.1 in floating point.
    advantages = group_advantages(torch.full((3, 7), 0.1, dtype=dtype), baseline=baseline)
    assert torch.equal(advantages, torch.zeros(3, 7, dtype=dtype))


def test_rewards_that_are_not_groups_are_refused() -> None:
    for shape in [(4,), (4, 1), (1, 2, 3)]:
        with pytest.raises(ValueError, match="answers >= 2"):
            group_advantages(torch.zeros(shape))
