"""The fingerprint of a tensor's bytes."""

from __future__ import annotations

import pytest
import torch

from millrace.converters.fingerprint import fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 1001])
def test_it_sees_bytes_of_any_type_and_length(dtype, count):
    tensor = (torch.arange(count) % 2).to(dtype)
    value = fingerprint(tensor)
    assert 0 <= value < 1 << 64
    assert value == fingerprint(tensor.clone()) == fingerprint(tensor.view(torch.uint8))
    assert value != fingerprint(torch.cat([tensor, tensor.new_zeros(1)]))


def test_its_value_is_fixed():
    assert fingerprint(torch.arange(100, dtype=torch.float32)) == 12090018745342493072


def test_a_single_bit_shows_wherever_it_is():
    tensor = torch.zeros(1_200_001)
    value = fingerprint(tensor)
    for place in (0, 1, 4095, 1_048_576, 1_199_999, 1_200_000):
        changed = tensor.clone()
        changed.view(torch.int32)[place] = 1
        assert fingerprint(changed) != value


def test_order_shows_within_and_across_chunks():
    tensor = torch.arange(1_200_000, dtype=torch.float32)
    for first, second in ((0, 2), (10, 1_100_000)):
        swapped = tensor.clone()
        swapped[[first, second]] = tensor[[second, first]]
        assert fingerprint(swapped) != fingerprint(tensor)


def test_it_does_not_depend_on_memory_layout():
    base = torch.randn(64, 33, generator=torch.Generator().manual_seed(0))
    assert fingerprint(base.t().contiguous()) == fingerprint(base.t())
    assert fingerprint(base[1:, :]) == fingerprint(base[1:, :].clone())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_is_the_same_on_a_gpu():
    tensor = torch.randn(1_200_003, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert fingerprint(tensor.cuda()) == fingerprint(tensor)
