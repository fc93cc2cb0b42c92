import math

import pytest
import torch

from millrace.algorithms.off_policy import correction

IDS = torch.tensor([4, 4, 4, 9, 9])
MASK = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0])
RATIOS = torch.tensor([50.0, 0.4, 1.5, 2.5, 2.0], dtype=torch.float64)


def weights(kind: str, low: float = 0.5, high: float = 2.0) -> list[float]:
    train = RATIOS.log().requires_grad_()
    weight = correction(train, torch.zeros(5), kind, low=low, high=high, segment_ids=IDS, mask=MASK)
    assert not weight.requires_grad
    return weight.tolist()


def test_each_correction_gives_its_golden_weights() -> None:
    assert weights("none") == [0, 1, 1, 1, 1]
    assert weights("tis") == pytest.approx([0, 0.4, 1.5, 2.0, 2.0])
    assert weights("icepop", high=2.0 + 1e-9) == pytest.approx([0, 0, 1.5, 0, 2.0])
    # Geometric means: sqrt(0.4 * 1.5) = 0.775 and sqrt(2.5 * 2) = 2.236; the masked-out 50 does not count.
    assert weights("sequence_mask") == [0, 1, 1, 0, 0]
    assert weights("sequence_mask", high=2.3) == [0, 1, 1, 1, 1]


def test_a_long_sequence_is_judged_by_its_mean_and_not_by_its_product() -> None:
    n = 1000
    weight = correction(
        torch.full((n,), 0.002),
        torch.zeros(n),
        "sequence_mask",
        low=0.5,
        high=2.0,
        segment_ids=torch.zeros(n, dtype=torch.int64),
        mask=torch.ones(n),
    )
    assert math.exp(0.002 * n) > 7 and weight.eq(1).all()
