import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.algorithms.aggregation import token_weights

masks_st = st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=9), min_size=1, max_size=9)


@settings(deadline=None, max_examples=60)
@given(masks_st)
def test_weights_equal_the_definition(masks: list[list[float]]) -> None:
    mask = torch.tensor([m for sequence in masks for m in sequence])
    lengths = torch.tensor([len(sequence) for sequence in masks])
    tokens, sequences = sum(map(sum, masks)), sum(any(s) for s in masks)
    by_token = [m / max(tokens, 1) for s in masks for m in s]
    by_sequence = [m / (max(sum(s), 1) * max(sequences, 1)) for s in masks for m in s]
    torch.testing.assert_close(token_weights(mask, lengths, "token"), torch.tensor(by_token))
    torch.testing.assert_close(token_weights(mask, lengths, "sequence"), torch.tensor(by_sequence))


def test_golden_weights_of_a_short_and_a_long_sequence() -> None:
    mask, lengths = torch.tensor([0, 1, 0, 1, 1, 1]), torch.tensor([2, 4])
    assert token_weights(mask, lengths, "token").tolist() == [0, 0.25, 0, 0.25, 0.25, 0.25]
    expected = torch.tensor([0, 1 / 2, 0, 1 / 6, 1 / 6, 1 / 6])
    torch.testing.assert_close(token_weights(mask, lengths, "sequence"), expected)


def test_a_part_takes_the_denominator_of_the_whole() -> None:
    mask, lengths = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 1.0]), torch.tensor([2, 4])
    for kind, whole in (("token", 4.0), ("sequence", 2.0)):
        parts = [
            token_weights(mask[:2], lengths[:1], kind, denominator=whole),
            token_weights(mask[2:], lengths[1:], kind, denominator=whole),
        ]
        assert torch.equal(torch.cat(parts), token_weights(mask, lengths, kind))


def test_an_empty_mask_gives_zero_weights() -> None:
    for kind in ("token", "sequence"):
        assert torch.equal(token_weights(torch.zeros(3), torch.tensor([1, 2]), kind), torch.zeros(3))


def test_counts_stay_exact_beyond_what_float32_can_count() -> None:
    n = 2**24 + 2
    weight = token_weights(torch.ones(n), torch.tensor([n]))
    assert weight[0].item() == torch.tensor(1.0 / n, dtype=torch.float64).float().item()
