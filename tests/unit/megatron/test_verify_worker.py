"""What verification says about differences."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from millrace.converters.errors import ConversionError
from millrace.megatron.verify_worker import compare_bitwise, compare_logits, given_tokens

TOKENS = torch.tensor([[3, 4], [5, 6]])


def test_equal_bytes_of_a_wider_type_are_equal():
    source = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert compare_bitwise("w", source, source.float()) is None


def test_a_changed_sign_of_zero_and_a_lost_nan_are_differences():
    assert compare_bitwise("w", torch.tensor([0.0]), torch.tensor([-0.0])) is not None
    assert compare_bitwise("w", torch.tensor([math.nan]), torch.tensor([math.nan])) is None
    assert compare_bitwise("w", torch.tensor([math.nan]), torch.tensor([0.0])) is not None


def test_a_difference_says_how_many_elements_and_by_how_much():
    difference = compare_bitwise("w", torch.zeros(4), torch.tensor([0.0, 0.25, 0.0, -0.5]))
    assert difference.how == "differs in 2 of 4 elements, by 0.5 at most"
    assert compare_bitwise("w", torch.zeros(4), torch.zeros(2, 2)).how == "has shape [2, 2] instead of [4]"


def test_the_first_differing_token_is_named():
    reference = torch.eye(8)[TOKENS]
    assert compare_logits(TOKENS, reference + 1e-6, reference, 1e-4, "transformers").passed
    ours = reference.clone()
    ours[1, 0, 7] = 3.0
    verdict = compare_logits(TOKENS, ours, reference, 1e-4, "transformers")
    assert not verdict.passed and verdict.facts["argmax_equal"] == "3 of 4"
    assert verdict.facts["first_difference"] == ("sequence 1, position 0, token 5: differs by 3, argmax 7 instead of 5")


def test_logits_that_are_not_numbers_fail():
    reference = torch.eye(8)[TOKENS]
    ours = torch.full_like(reference, math.nan)
    assert not compare_logits(TOKENS, ours, reference, 1e-4, "transformers").passed


def test_token_ids_outside_the_vocabulary_are_refused():
    shape = SimpleNamespace(vocab_size=10)
    assert given_tokens("1, 9", shape).tolist() == [[1, 9]]
    with pytest.raises(ConversionError, match=r"'10' is no token id below the vocabulary size 10"):
        given_tokens("1,10", shape)
